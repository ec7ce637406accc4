"""Every setting whose legal value is falsy (0, False, "", empty) is obeyed: set, built, and read back from what was built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from imgcls_fast.core.config import setting_names
from imgcls_fast.core.errors import ConfigError, DataError, ImgclsError
from imgcls_fast.core.manifest import NO_SPLIT
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config, flatten
from imgcls_fast.data.prepare import prepare, scan_options
from imgcls_fast.data.scan import scan
from imgcls_fast.exporting.trt_engine import TrtOptions
from imgcls_fast.models.backbones import ModelSpec, weightless
from imgcls_fast.models.build import build_model, sketch_model
from imgcls_fast.tracking.trackers import trackers
from imgcls_fast.training import session

from .test_plan import images, plan_of

FALSY: tuple[Any, ...] = (0, False, "", (), {})
TABLE = "image,label,split,group\nx/0.png,a,train,1\nx/1.png,b,train,1\nx/2.png,a,val,2\nx/3.png,b,val,2\n"


def legal_falsy_values() -> dict[str, Any]:
    """Setting -> the falsy value that the schema takes; None is left out: it means that nothing was asked for."""
    found: dict[str, Any] = {}
    for name in setting_names():
        for value in FALSY:
            try:
                taken = flatten(build_config({name: value}))[name]
            except ImgclsError:
                continue
            assert not taken, f"{name}: {value!r} became {taken!r}"
            found[name] = value
    return found


def read_augment(key: str) -> Callable[..., Any]:
    return lambda value, make_fit: getattr(
        make_fit({f"augment.{key}": value, "augment.policy": "heavy"}).loaders.train.sampler.augment, key
    )


def read_decays(value: float, make_fit: Any) -> float:
    return max(group["weight_decay"] for group in make_fit({"optim.weight_decay": value}).step.optimizer.param_groups)


def read_momentum(value: float, make_fit: Any) -> float:
    fit = make_fit({"optim.momentum": value, "optim.opt": "sgd", "optim.sched": "onecycle", "train.epochs": 1})
    fit.run()
    return max(group["momentum"] for group in fit.step.optimizer.param_groups)


def read_warmup(value: float, make_fit: Any) -> float:
    schedule = make_fit({"optim.warmup": value, "optim.lr": 0.1}).step.schedule
    assert schedule.lr(0) == pytest.approx(0.1)
    return float(schedule.warmup)


def read_floor(value: float, make_fit: Any) -> float:
    schedule = make_fit({"optim.min_lr": value, "optim.sched": "cosine"}).step.schedule
    return float(round(schedule.lr(schedule.total), 12))


def read_drop_rate(value: float, make_fit: Any) -> float:
    return max(m.p for m in make_fit({"model.drop_rate": value}).step.model.modules() if isinstance(m, nn.Dropout))


def read_drop_path(value: float, make_fit: Any) -> float:
    plan = plan_of({"model.arch": "convnext_tiny", "model.drop_path": value})
    network = weightless(ModelSpec.from_dict(plan.spec))
    return max(m.p for m in network.modules() if type(m).__name__ == "StochasticDepth")


def read_events(name: str, kind: str) -> Callable[..., Any]:
    """0 seconds between: one at every step."""

    def read(value: float, make_fit: Any) -> int:
        fit = make_fit({name: value, "train.epochs": 1, "train.batch_size": 21})
        fit.run()
        found = sum(event["event"] == kind for event in fit.events)
        return found - (fit.loaders.steps + (kind == "checkpoint"))  # one more checkpoint at the end of the epoch

    return read


def read_class_weights(value: Any, make_fit: Any) -> int:
    """No names: equal weights; no numbers: refused, as any wrong count."""
    if value == ():
        with pytest.raises(ConfigError, match="0 numbers"):
            make_fit({"loss.class_weights": value})
        return 0
    total = make_fit({"loss.class_weights": value}).step.objective.totals(torch.eye(3), torch.ones(3))[0]
    return int(total != pytest.approx(3))


def read_pixel_numbers(name: str) -> Callable[..., Any]:
    def read(value: Any, make_fit: Any) -> int:
        with pytest.raises(ConfigError, match=f"{name} has 0 numbers"):
            plan_of({name: value})
        return 0

    return read


def read_column(role: str) -> Callable[..., Any]:
    """ "" says that a table has no such column, although one has its usual name."""

    def read(value: str, make_fit: Any, folder: Path) -> int:
        config = build_config({"data.source": str(folder / "t.csv"), f"data.{role}_col": value}).data
        manifest = scan(folder / "t.csv", scan_options(config, "apply", folder)).manifest
        return int(((manifest.split != NO_SPLIT) if role == "split" else (manifest.group >= 0)).any())

    return read


def read_needed_column(role: str) -> Callable[..., Any]:
    def read(value: str, make_fit: Any, folder: Path) -> int:
        with pytest.raises(DataError, match=f"no column for the {role}"):
            prepare(build_config({"data.source": str(folder / "t.csv"), f"data.{role}_col": value}), folder)
        return 0

    return read


def read_max_bad(value: float, make_fit: Any, folder: Path) -> int:
    (folder / "x" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(DataError, match="bad"):
        prepare(build_config({"data.source": str(folder / "t.csv"), "data.max_bad": value}), folder)
    return 0


def trt(value: Any, name: str) -> Any:
    return getattr(TrtOptions.of(build_config({f"export.trt_{name}": value}).export), name)


# setting -> what was built with the value, which must be falsy as well
READ: dict[str, Callable[..., Any]] = {
    "data.path_col": read_needed_column("path"),
    "data.label_col": read_needed_column("label"),
    "data.split_col": read_column("split"),
    "data.group_col": read_column("group"),
    "data.max_bad": read_max_bad,
    "data.split_seed": lambda value, make_fit: plan_of({"data.split_seed": value}).config.data.split_seed,
    "data.near_duplicates": lambda value, make_fit: plan_of({"data.near_duplicates": value}).config.data.near_duplicates,
    "pixels.mean": read_pixel_numbers("pixels.mean"),
    "pixels.std": read_pixel_numbers("pixels.std"),
    **{f"augment.{key}": read_augment(key) for key in ("flip", "brightness", "contrast", "saturation", "hue")},
    "model.args": lambda value, make_fit: plan_of({"model.arch": "resnet18", "model.args": value}).spec["arch_args"],
    "model.attention": lambda value, make_fit: plan_of({"model.attention": value}).spec["attention"],
    "model.drop_rate": read_drop_rate,
    "model.drop_path": read_drop_path,
    "loss.label_smoothing": lambda value, make_fit: make_fit({"loss.label_smoothing": value}).step.objective.terms[0].smoothing,
    "loss.class_weights": read_class_weights,
    "optim.weight_decay": read_decays,
    "optim.momentum": read_momentum,
    "optim.warmup": read_warmup,
    "optim.min_lr": read_floor,
    "optim.ema": lambda value, make_fit: make_fit({"optim.ema": value}).step.averaged,
    "train.compile": lambda value, make_fit: (fit := make_fit({"train.compile": value})).step.forward is not fit.step.model,
    "train.workers": lambda value, make_fit: make_fit({"train.workers": value}).loaders.train._loader.num_workers,
    "train.seed": lambda value, make_fit: make_fit({"train.seed": value}).loaders.train.sampler.seed,
    "train.deterministic": lambda value, make_fit: make_fit({"train.deterministic": value})
    and torch.are_deterministic_algorithms_enabled(),
    "train.save_every": read_events("train.save_every", "checkpoint"),
    "train.log_every": read_events("train.log_every", "progress"),
    "train.track": lambda value, make_fit: trackers(build_config({"train.track": value}).train.track, Run(Path("unused"))),
    "export.search_s": lambda value, make_fit: build_config({"export.search_s": value}).export.search_s > 0,
    "export.trt_level": lambda value, make_fit: trt(value, "level"),
    "export.trt_version_compatible": lambda value, make_fit: trt(value, "version_compatible"),
    "export.trt_refit": lambda value, make_fit: trt(value, "refit"),
}  # fmt: skip
WHOLE_RUN = {"train.baseline", "evaluate.calibrate", "evaluate.top_k"}  # read from a finished run, below


def test_the_table_names_every_setting_that_may_be_falsy() -> None:
    assert legal_falsy_values().keys() == READ.keys() | WHOLE_RUN


@pytest.mark.parametrize("name", ["data.source", "data.group_by", "model.arch", "model.init", "export.gate_data", "out"])
def test_an_empty_name_is_refused_by_the_name_of_its_setting(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a name") as refused:
        build_config({name: ""})
    assert refused.value.code == "C003"
    assert flatten(build_config({name: "no-\udcff"}))[name] == "no-\udcff"  # of a file system that is not UTF-8


@pytest.mark.parametrize("name", READ)
def test_a_falsy_value_is_obeyed(name: str, make_fit: Any, tmp_path: Path) -> None:
    value = legal_falsy_values()[name]
    read = READ[name]
    more = {}
    if "folder" in read.__code__.co_varnames[: read.__code__.co_argcount]:
        from PIL import Image

        (tmp_path / "x").mkdir()
        for k in range(4):
            Image.new("RGB", (40, 40), (60 * k, 10, 200)).save(tmp_path / "x" / f"{k}.png")
        (tmp_path / "t.csv").write_text(TABLE)
        more["folder"] = tmp_path
    assert not read(value, make_fit, **more)


def test_a_run_obeys_what_it_must_not_do(configure: Callable[..., Any]) -> None:
    falsy = {name: legal_falsy_values()[name] for name in WHOLE_RUN}
    run = session.start(configure({**falsy, "train.epochs": 1}))
    assert run.read_json("baseline.json") is None
    assert run.read_json("bundle/bundle.json")["temperature"] == 1.0
    assert run.metrics("test")["top_k"] == {}


OWN = {  # the library's own dropout and stochastic depth
    "torchvision/mobilenet_v3_small": (0.2, 0.0), "torchvision/vgg11": (0.5, 0.0), "torchvision/convnext_tiny": (0.0, 0.1),
    "torchvision/efficientnet_b0": (0.2, 0.1875), "torchvision/googlenet": (0.2, 0.0), "torchvision/resnet18": (0.0, 0.0),
    "torchvision/swin_t": (0.0, 0.2), "timm/ghostnet_050": (0.2, 0.0), "timm/swin_s3_tiny_224": (0.0, 0.1),
    "timm/densenet121": (0.0, 0.0), "timm/resnet10t": (0.0, 0.0),
}  # fmt: skip


def rates(spec: dict[str, Any]) -> tuple[float, float]:
    """Largest dropout and stochastic depth of a network, its auxiliary heads aside; timm's heads keep a number."""
    network = weightless(ModelSpec.from_dict(spec))
    drop, path = [0.0], [0.0]
    for name, module in network.named_modules():
        if not name.startswith("aux"):
            drop += [module.p] if isinstance(module, nn.Dropout) else []
            drop += [getattr(module, "drop_rate", 0.0) if isinstance(getattr(module, "drop_rate", 0.0), float) else 0.0]
        path += [getattr(module, "drop_prob", None) or 0.0] if type(module).__name__ == "DropPath" else []
        path += [module.p] if type(module).__name__ == "StochasticDepth" else []
    return max(drop), max(path)


@pytest.mark.parametrize("arch", OWN)
def test_dropout_and_stochastic_depth_are_what_the_plan_records(arch: str) -> None:
    """0 was recorded while the network kept its own rates."""
    own = plan_of({"model.arch": arch})
    assert (own.config.model.drop_rate, own.config.model.drop_path) == pytest.approx(OWN[arch])
    assert rates(own.spec) == pytest.approx(OWN[arch])
    none = plan_of({"model.arch": arch, "model.drop_rate": 0, "model.drop_path": 0})
    assert (none.config.model.drop_rate, none.config.model.drop_path) == (0, 0)
    assert rates(none.spec) == (0, 0)
    again = plan_of(flatten(own.config), images())
    assert again.spec == own.spec


def test_a_network_is_built_without_its_own_dropout_when_asked() -> None:
    spec = ModelSpec("torchvision/mobilenet_v3_small", num_outputs=3, drop_rate=0.0, drop_path=0.0, image_size=32)
    model = build_model(spec).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(model(pixels), model(pixels))


@pytest.mark.parametrize("arch", ["small-cnn", "torchvision/regnet_y_400mf", "timm/resnet10t"])
def test_parameters_are_counted_without_making_them(arch: str) -> None:
    """torchvision's RegNet could not be made on torch's meta device, and no run of it began."""
    spec = ModelSpec(arch, num_outputs=3, attention=("cbam@stage4",) if "resnet" in arch else ())
    sketch, model = sketch_model(spec), build_model(spec)
    assert [(n, p.shape) for n, p in sketch.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    assert next(sketch.backbone.parameters()).is_meta
    assert sketch.freeze(2) == model.freeze(2)
