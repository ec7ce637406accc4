"""Every "auto" becomes a number, with a reason, before work starts."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from imgcls_fast.core.compilers import Lack
from imgcls_fast.core.config import RunConfig
from imgcls_fast.core.errors import ConfigError, HardwareError, ImgclsError
from imgcls_fast.core.files import read_sealed, write_sealed
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.manifest import FLAG_PILLOW, Manifest, PathList
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config, flatten, to_yaml
from imgcls_fast.models.small_cnn import SmallCNN
from imgcls_fast.training import estimate, session
from imgcls_fast.training.plan import Machine, Plan, make_plan, starting_model
from imgcls_fast.training.schedule import Schedule

LAPTOP = Machine(cpus=2, dali=True)
SERVER = Machine(cpus=32, gpu="NVIDIA H200", bf16=True, dali=True)
OLD_GPU = Machine(cpus=8, gpu="Tesla P100", bf16=False, dali=True)


def images(n: int = 1000, side: int = 400, flags: int = 0) -> Manifest:
    """A manifest of n images that do not exist: 80 % to train, the rest to validate."""
    split = np.where(np.arange(n) % 5 == 0, 1, 0).astype(np.uint8)
    column = np.full(n, side, np.int32)
    return Manifest(
        Path("/nowhere"), PathList.of(f"{k}.jpg" for k in range(n)), LabelSpace.single(("a", "b", "c")),
        ((np.arange(n) % 3).astype(np.int32),),
        split, np.full(n, -1, np.int32), column, column, np.ones(n, np.uint8), np.zeros((n, 16), np.uint8), np.full(n, flags, np.uint8),
    )  # fmt: skip


def plan_of(changes: dict[str, Any] | None = None, manifest: Manifest | None = None, machine: Machine = LAPTOP) -> Plan:
    return make_plan(build_config({"model.init": "scratch", **(changes or {})}), manifest or images(), machine)


@pytest.mark.parametrize("machine", [LAPTOP, SERVER, OLD_GPU], ids=["laptop", "server", "old gpu"])
@pytest.mark.parametrize("init", ["auto", "scratch"])
@pytest.mark.parametrize(
    "more", [{}, {"loss.class_weights": "auto", "train.accum": 4, "pixels.color": "gray"}], ids=["plain", "more"]
)
def test_no_auto_is_left_and_every_decision_has_a_reason(machine: Machine, init: str, more: dict[str, Any]) -> None:
    plan = plan_of({"model.init": init, **more}, machine=machine)
    left = [name for name, value in flatten(plan.config).items() if value == "auto"]
    assert left == ["data.label_kind"], "every scan, also one of other data, reads labels as they look"
    assert to_yaml(plan.config).count("auto") == 1
    assert all(reason for _, _, reason in plan.rows)
    decided = {name for name, value in flatten(RunConfig()).items() if value == "auto"} - set(left)
    assert decided <= {name for name, _, _ in plan.rows}


def test_a_resolved_configuration_gives_the_same_plan_again() -> None:
    plan = plan_of({"loss.class_weights": "auto"})
    again = make_plan(plan.config, images(), LAPTOP)
    assert again.config == plan.config
    assert (again.pixels, again.augment, again.spec) == (plan.pixels, plan.augment, plan.spec)


@pytest.mark.parametrize("init", ["scratch", "pretrained"])
def test_a_plan_comes_back_from_its_dictionary(init: str) -> None:
    plan = plan_of({"model.init": init, "model.arch": "resnet18", "augment.policy": "heavy"})
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict())), plan.config) == plan


def test_what_the_user_set_stays_and_is_shown_as_asked() -> None:
    plan = plan_of({"optim.lr": 0.123, "augment.flip": 0.0, "pixels.size": 64})
    assert (plan.config.optim.lr, plan.config.augment.flip, plan.config.pixels.size) == (0.123, 0.0, 64)
    rows = {name: reason for name, _, reason in plan.rows}
    assert rows["optim.lr"] == rows["augment.flip"] == rows["pixels.size"] == "as asked"


def test_a_batch_is_never_larger_than_the_training_split() -> None:
    plan = plan_of({"train.batch_size": 500}, images(100))
    assert plan.config.train.batch_size == plan.config.train.micro_batch == 80
    assert ("train.batch_size", "80", "lowered from 500: there are 80 training images") in plan.rows


@pytest.mark.parametrize(("batch", "accum", "micro"), [(64, 4, 16), (10, 3, 4), (5, 8, 3)])
def test_accumulation_sets_the_micro_batch(batch: int, accum: int, micro: int) -> None:
    plan = plan_of({"train.batch_size": batch, "train.accum": accum})  # a network with batch norm: no part of one image
    assert (plan.config.train.micro_batch, plan.config.train.accum) == (micro, None)


def test_a_micro_batch_above_the_batch_is_lowered() -> None:
    assert plan_of({"train.batch_size": 8, "train.micro_batch": 64}).config.train.micro_batch == 8


@pytest.mark.parametrize(
    ("changes", "flags", "machine", "loader"),
    [
        ({}, 0, LAPTOP, "dali-cpu"),
        ({}, 0, SERVER, "dali-gpu"),
        ({}, 0, Machine(cpus=2, dali=False), "torch"),
        ({"pixels.color": "rgba"}, 0, LAPTOP, "torch"),
        ({}, FLAG_PILLOW, LAPTOP, "torch"),
        ({"train.loader": "torch"}, 0, SERVER, "torch"),
    ],
)
def test_the_loader_suits_machine_and_images(
    changes: dict[str, Any], flags: int, machine: Machine, loader: str
) -> None:
    assert plan_of(changes, images(flags=flags), machine).config.train.loader == loader


@pytest.mark.parametrize(
    ("machine", "precision", "compiled"), [(LAPTOP, "fp32", False), (SERVER, "bf16", True), (OLD_GPU, "fp16", True)]
)
def test_precision_and_compiling_suit_the_machine(machine: Machine, precision: str, compiled: bool) -> None:
    train = plan_of(machine=machine).config.train
    assert (train.precision, train.compile) == (precision, compiled)


@pytest.mark.parametrize(("arch", "opt", "lr"), [
    ("torchvision/resnet50", "sgd", 0.0125), ("torchvision/efficientnet_b0", "sgd", 0.0125), ("timm/resnet10t", "sgd", 0.0125),
    ("torchvision/vgg11", "sgd", 0.0125), ("torchvision/vit_b_16", "adamw", 1.77e-4), ("torchvision/swin_t", "adamw", 1.77e-4),
    ("torchvision/convnext_tiny", "adamw", 1.77e-4), ("timm/convnext_atto", "adamw", 1.77e-4),
    ("timm/deit_tiny_patch16_224", "adamw", 1.77e-4), ("timm/levit_128", "adamw", 1.77e-4), ("small-cnn", "adamw", 0.002),
])  # fmt: skip
def test_from_scratch_each_kind_of_network_gets_its_own_optimizer(arch: str, opt: str, lr: float) -> None:
    optim = plan_of({"model.arch": arch, "train.batch_size": 32}).config.optim
    assert (optim.opt, optim.lr) == (opt, pytest.approx(lr))
    assert optim.weight_decay == (0.05 if opt == "adamw" else 5e-5)
    asked = plan_of({"model.arch": arch, "train.batch_size": 32, "optim.opt": "sgd"}).config.optim
    assert asked.lr == pytest.approx(0.05 if arch == "small-cnn" else 0.0125)


@pytest.mark.parametrize("init", ["scratch", "pretrained"])
@pytest.mark.parametrize("epochs", [1, 3, 30])
def test_one_cycle_is_planned_as_a_single_cycle(init: str, epochs: int) -> None:
    """The warm-up of the recipe once came before the cycle's own, and the rate went up twice."""
    plan = plan_of({"optim.sched": "onecycle", "train.epochs": epochs, "model.init": init, "model.arch": "resnet18"})
    rates = Schedule(plan.config.optim, 100, epochs)
    values = [rates.lr(step) for step in range(100 * epochs)]
    assert int(np.argmax(values)) == 30 * epochs
    assert values[0] == pytest.approx(values[30 * epochs] / 25)
    assert all((b > a) == (k < 30 * epochs) for k, (a, b) in enumerate(pairwise(values)))
    assert plan_of({"optim.sched": "onecycle", "optim.warmup": 0}).config.optim.warmup == 0


@pytest.mark.parametrize(("side", "size"), [(8, 32), (28, 32), (50, 64), (400, 96)])
def test_small_images_are_not_blown_up(side: int, size: int) -> None:
    assert plan_of({"model.arch": "small-cnn"}, images(side=side)).pixels.size == size


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"train.device": "cuda"}, "H001", "cuda"),
        ({"train.precision": "fp16"}, "C004", "fp16"),
        ({"train.loader": "dali-gpu"}, "C004", "dali-gpu"),
        ({"pixels.mean": (0.5, 0.5)}, "C004", "pixels.mean has 2 numbers"),
        ({"pixels.std": (0.5, 0.5, 0.5), "pixels.color": "gray"}, "C004", "pixels.std has 3 numbers"),
        ({"loss.class_weights": (1.0, 2.0)}, "C003", "2 numbers"),
        ({"loss.class_weights": {"d": 1.0}}, "C003", "'d'"),
        ({"model.arch": "resnet51"}, "M001", "resnet51"),
        ({"model.init": "no-such-run"}, "U003", "no-such-run"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes: dict[str, Any], code: str, word: str) -> None:
    with pytest.raises(ImgclsError) as refused:
        plan_of(changes)
    assert refused.value.code == code
    assert word in str(refused.value)
    assert isinstance(refused.value, HardwareError) == (code == "H001")


def test_a_weights_file_needs_the_name_of_its_architecture(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"does not say its architecture") as refused:
        plan_of({"model.init": str(path)})
    assert refused.value.code == "C004"


@pytest.mark.slow
def test_training_starts_from_a_local_weights_file(
    configure: Callable[..., Any], make_fit: Any, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    torch.manual_seed(1)
    state = {name: value.contiguous() for name, value in resnet18(num_classes=7).state_dict().items()}
    save_file(state, tmp_path / "own.safetensors")
    fit = make_fit(
        {
            "model.arch": "resnet18",
            "model.args": {},
            "model.init": str(tmp_path / "own.safetensors"),
            "optim.ema": 0,
            "train.epochs": 1,
        }
    )
    mine = fit.step.model.state_dict()
    assert torch.equal(mine["backbone.layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    assert mine["backbone.fc.weight"].shape == (3, 512)  # the head fits the data, not the file
    fit.run()
    assert len(fit.run_.epochs) == 1


def test_the_architecture_is_stored_with_its_defaults_so_that_bundles_outlive_a_change_of_them() -> None:
    shaping = set(inspect.signature(SmallCNN).parameters) - {"num_classes", "in_chans", "drop_rate"}
    own = plan_of({"model.arch": "small-cnn"})
    assert set(own.spec["arch_args"]) == shaping
    assert own.config.model.args == {}  # another --model can be asked for with the stored configuration
    partly = plan_of({"model.arch": "small-cnn", "model.args": {"width": 8}}).spec["arch_args"]
    assert partly == {**own.spec["arch_args"], "width": 8}
    assert plan_of({"model.arch": "resnet18"}).spec["arch_args"] == {}


@pytest.mark.slow
def test_a_run_can_begin_with_the_weights_of_another(configure: Callable[..., Any], make_fit: Any) -> None:
    import torch

    from imgcls_fast.core.bundle import read_bundle
    from imgcls_fast.engines.torch_runtime import load_model

    first = session.start(configure({"train.epochs": 1, "pixels.size": 48}))
    second = make_fit(
        {"model.init": str(first.directory), "model.arch": "auto", "model.args": {}, "pixels.size": "auto"}
    )
    assert second.plan.spec["arch"] == "small-cnn"
    assert second.plan.pixels.size == 48
    trained = load_model(read_bundle(first.bundle_path)).state_dict()
    mine = second.step.model.state_dict()
    assert trained.keys() == mine.keys()
    assert all(torch.equal(mine[name], trained[name]) for name in mine)


@pytest.mark.parametrize("name", ["train.seed", "data.split_seed"])
@pytest.mark.parametrize("seed", [-1, 2**64, 2**70])
def test_a_seed_outside_64_bits_is_refused(name: str, seed: int) -> None:
    with pytest.raises(ConfigError) as refused:
        build_config({name: seed})
    assert refused.value.code == "C003"
    assert name in str(refused.value)


@pytest.mark.usefixtures("no_judging")
@pytest.mark.parametrize("seed", [2**32, 2**64 - 1])
def test_any_64_bit_seed_trains_with_its_baseline(seed: int, configure: Callable[..., Any]) -> None:
    """From 2**32 on scikit-learn refused it, after the scan, with a raw error."""
    run = session.start(configure({"train.seed": seed, "train.epochs": 1, "train.baseline": True}))
    assert run.config.train.seed == seed
    assert run.read_json("baseline.json")["accuracy"] > 0


@pytest.mark.usefixtures("no_judging")
def test_the_stored_configuration_can_be_used_again(configure: Callable[..., Any], tmp_path: Path) -> None:
    run = session.start(configure({"train.epochs": 1}))
    stored = yaml.safe_load(run.config_path.read_text())
    assert stored["train"]["epochs"] == 1
    again = build_config({"out": str(tmp_path / "again")}, file=run.config_path)
    other = session.start(again)
    assert {k: v for k, v in flatten(other.config).items() if k != "out"} == {
        k: v for k, v in flatten(run.config).items() if k != "out"
    }
    assert isinstance(other, Run)


# ---------------------------------------------------------------- beginning with another run


def reason_of(plan: Plan, setting: str) -> str:
    return next(reason for name, _, reason in plan.rows if name == setting)


@pytest.mark.parametrize("color", ["gray", "rgba", "rgb"])
def test_colour_and_statistics_come_from_the_starting_run(color: str, bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of(color=color)
    plan = plan_of({"model.init": str(bundle.directory)})
    assert (plan.config.pixels.color, plan.pixels.color) == (color, color)
    assert (plan.pixels.mean, plan.pixels.std) == (bundle.pixels.mean, bundle.pixels.std)
    assert reason_of(plan, "pixels.color") == "of the starting weights"
    assert plan.config.train.loader == ("torch" if color == "rgba" else "dali-cpu")
    assert starting_model(plan.spec, plan.start, images().labels).report.adapted == ()


@pytest.mark.parametrize(("theirs", "asked"), [("gray", "rgb"), ("gray", "rgba"), ("rgb", "gray"), ("rgba", "rgb")])
def test_another_number_of_channels_is_asked_for_by_name_and_converted(
    theirs: str, asked: str, bundle_of: Callable[..., Any]
) -> None:
    plan = plan_of({"model.init": str(bundle_of(color=theirs).directory), "pixels.color": asked})
    assert plan.pixels.color == asked and plan.pixels.mean == (0.5,) * plan.pixels.channels
    assert f"trained on {theirs}, so their first layer is converted" in reason_of(plan, "pixels.color")
    report = starting_model(plan.spec, plan.start, images().labels).report
    assert report.adapted == ("stem.0.weight",)


def relabelled(bundle: Any, classes: tuple[str, ...]) -> Path:
    """The same bundle, of other classes."""
    facts = read_sealed(bundle.directory / "bundle.json")
    facts["labels"] = LabelSpace.single(classes).to_dict()
    write_sealed(bundle.directory / "bundle.json", facts)
    return bundle.directory


@pytest.mark.parametrize("by", ["folder", "file"])
@pytest.mark.parametrize("stored", [False, True], ids=["planned", "resumed"])
@pytest.mark.parametrize(
    ("classes", "rows", "words"),
    [
        (("a", "b", "c"), [0, 1, 2], "as asked; the head with it"),
        (("c", "a", "b"), [1, 2, 0], "the head by name, for all 3 classes"),
        (("x", "c", "y"), [None, None, 1], "the head keeps 1 of 3 classes; begun anew: a, b"),
        (("x", "y", "z"), [None, None, None], "its head has none of these classes; begun anew: a, b, c"),
    ],
)
def test_the_head_of_a_starting_run_goes_by_class_names_and_the_plan_says_how(
    classes: tuple[str, ...], rows: list[int | None], words: str, stored: bool, by: str, bundle_of: Callable[..., Any]
) -> None:
    from safetensors.torch import load_file

    bundle = bundle_of()
    folder = relabelled(bundle, classes)
    plan = plan_of({"model.init": str(folder if by == "folder" else bundle.weights)})
    assert words in reason_of(plan, "model.init")
    if stored:  # a run that is resumed before its first checkpoint
        plan = Plan.from_dict(json.loads(json.dumps(plan.to_dict())), plan.config)
    theirs = load_file(bundle.weights)["backbone.head.weight"]
    mine = starting_model(plan.spec, plan.start, images().labels).state_dict()["backbone.head.weight"]
    for k, row in enumerate(rows):
        assert [j for j in range(3) if (mine[k] == theirs[j]).all()] == ([] if row is None else [row])


def test_a_file_that_names_no_classes_is_taken_by_position_and_the_plan_says_so(
    bundle_of: Callable[..., Any], tmp_path: Path
) -> None:
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(bundle_of().weights.read_bytes())
    plan = plan_of({"model.init": str(lone), "model.arch": "small-cnn", "model.args": {"width": 8}})
    assert "names no classes: a head of 3 outputs is taken as it is" in reason_of(plan, "model.init")


# ---------------------------------------------------------------- threads


def test_threads_and_workers_follow_the_count_and_the_plan_says_why() -> None:
    why = "the CPU quota of the container: 1.5 of 64 cores, rounded up"
    plan = plan_of(machine=Machine(cpus=2, why_cpus=why, dali=True))
    assert (plan.config.train.threads, plan.config.train.workers) == (2, 2)
    assert reason_of(plan, "train.threads") == why and reason_of(plan, "train.workers").endswith(why)
    gpu = plan_of(machine=replace(SERVER, cpus=1, why_cpus="OMP_NUM_THREADS=1; 32 cores are usable"))
    assert reason_of(gpu, "train.workers") == "decoding threads; OMP_NUM_THREADS=1; 32 cores are usable; more with --workers"


# ---------------------------------------------------------------- compiling


NO_CC = Lack("no C compiler was found (gcc or clang)", "apt-get install gcc libc6-dev")


def test_without_a_compiler_a_gpu_trains_eagerly_and_the_plan_says_why() -> None:
    plan = plan_of(machine=replace(SERVER, lacks={"cuda": NO_CC}))
    assert plan.config.train.compile is False
    assert reason_of(plan, "train.compile") == f"off: {NO_CC.what}; for more speed: {NO_CC.remedy}"
    assert plan_of(machine=replace(SERVER, lacks={"cpu": NO_CC})).config.train.compile is True


@pytest.mark.parametrize("machine", [LAPTOP, SERVER], ids=["laptop", "server"])
def test_compiling_that_was_asked_for_is_refused_with_the_line_that_installs_a_compiler(machine: Machine) -> None:
    device = "cuda" if machine.gpu else "cpu"
    with pytest.raises(HardwareError) as refused:
        plan_of({"train.compile": True}, machine=replace(machine, lacks={device: NO_CC}))
    assert (refused.value.code, refused.value.try_) == ("H004", f"{NO_CC.remedy}   (or --no-compile)")
    assert plan_of({"train.compile": True, "train.device": "cpu"}, machine=replace(SERVER, lacks={"cuda": NO_CC}))


@pytest.mark.parametrize("verb", [session.start, estimate.dry_run])
def test_a_missing_compiler_is_told_before_the_scan(
    verb: Callable[..., Any], configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (session, estimate):
        monkeypatch.setattr(module, "look_at_machine", lambda: Machine(lacks={"cpu": NO_CC}))
    with pytest.raises(HardwareError) as refused:  # else D001: there is no such folder
        verb(configure({"train.compile": True, "data.source": str(tmp_path / "none")}))
    assert refused.value.code == "H004"


# ---------------------------------------------------------------- what counts epochs


@pytest.mark.parametrize("sched", ["cosine", "step", "plateau", "none", "onecycle"])
@pytest.mark.parametrize(("epochs", "warmup"), [(2, 5), (2, 2), (1, 1), (30, 100.5)])
def test_a_warm_up_is_shorter_than_the_run_so_that_the_rate_is_reached(epochs: int, warmup: float, sched: str) -> None:
    """With 5 of 2 epochs it ended at 40 % of optim.lr and never fell."""
    notices: list[str] = []
    config = build_config({"model.init": "scratch", "train.epochs": epochs, "optim.warmup": warmup, "optim.sched": sched})
    plan = make_plan(config, images(), LAPTOP, notices.append)
    share = 0.3 if sched == "onecycle" else 0.15
    assert plan.config.optim.warmup == pytest.approx(share * epochs, abs=0.01)
    count = f"{epochs} epoch{'s' * (epochs > 1)}"
    assert reason_of(plan, "optim.warmup") == f"shortened from {warmup:g}: the run has {count}"
    assert any(f"optim.warmup {warmup:g} is as long as the run of {count} or longer" in line for line in notices)
    rates = Schedule(plan.config.optim, 100, epochs)
    values = [rates.lr(step) for step in range(100 * epochs)]
    assert max(values) == pytest.approx(float(plan.config.optim.lr))
    assert (values[-1] < max(values) / 2) == (sched in ("cosine", "onecycle") or (sched == "step" and epochs > 10))


def test_a_warm_up_that_leaves_a_step_of_the_run_is_as_asked() -> None:
    assert reason_of(plan_of({"train.epochs": 2, "optim.warmup": 1.9}), "optim.warmup") == "as asked"
    assert plan_of({"train.epochs": 1, "optim.warmup": 0}).config.optim.warmup == 0
    shortened = plan_of({"train.epochs": 2, "optim.warmup": 5})
    assert reason_of(make_plan(shortened.config, images(), LAPTOP), "optim.warmup") == "as asked"  # a run made again


@pytest.mark.parametrize(("lr", "told"), [(50.0, "diverge"), (1e-8, "hardly move"), (1e-2, ""), (1e-5, ""), ("auto", "")])
def test_a_learning_rate_far_from_the_usual_one_is_told(lr: float | str, told: str) -> None:
    notices: list[str] = []
    config = build_config({"model.init": "scratch", "model.arch": "small-cnn", "optim.opt": "adamw", "optim.lr": lr})
    make_plan(config, images(), LAPTOP, notices.append)
    assert [told in notice for notice in notices if "optim.lr" in notice] == ([True] if told else [])


@pytest.mark.parametrize(
    ("changes", "name", "enough"),
    [
        ({"optim.sched": "step", "optim.step_epochs": 4}, "optim.step_epochs", 5),
        ({"optim.sched": "plateau", "optim.plateau_patience": 2}, "optim.plateau_patience", 5),
        ({"train.patience": 3}, "train.patience", 5),
    ],
)
def test_what_waits_longer_than_the_run_is_told(changes: dict[str, Any], name: str, enough: int) -> None:
    for epochs in (1, enough - 1, enough):
        notices: list[str] = []
        config = build_config({"model.init": "scratch", "train.epochs": epochs, "optim.warmup": 0, **changes})
        plan = make_plan(config, images(), LAPTOP, notices.append)
        told = [reason for row, _, reason in plan.rows if row == name]
        assert bool(told) == bool(notices) == (epochs < enough)
        assert all("never" in line and f"--set {name}=N" in line for line in notices)


def test_a_plateau_and_a_patience_of_just_the_length_do_act() -> None:
    """The counts behind the row above: the first epoch is the best, then none is better."""
    plan = plan_of({"optim.sched": "plateau", "optim.plateau_patience": 2, "train.epochs": 5, "optim.warmup": 0})
    rates = Schedule(plan.config.optim, 10, 5)
    seen = []
    for epoch in range(5):
        seen.append(rates.lr(10 * epoch))
        rates.after_epoch(-float(epoch))
    assert seen[3] == seen[0] > seen[4]
