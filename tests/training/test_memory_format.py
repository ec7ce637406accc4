"""Channels-last or not: what the plan decides, that training obeys it, and that no network crashes by it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imgcls_fast.core.config import free_settings
from imgcls_fast.core.errors import ConfigError, ModelError
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config
from imgcls_fast.models.build import ModelSpec, build_model, outline_of
from imgcls_fast.training import layout, session

from .test_plan import LAPTOP, SERVER, images, plan_of

MakeFit = Callable[..., Any]
BROKEN = ("timm/mobileone_s1", "timm/fastvit_t8", "timm/fastvit_sa12")


@pytest.mark.parametrize("arch", BROKEN)
def test_networks_that_crash_in_channels_last_are_trained_contiguous_on_a_cpu(arch: str) -> None:
    plan = plan_of({"model.arch": arch, "train.batch_size": 8})
    assert plan.config.train.memory_format == "contiguous"
    reason = {name: reason for name, _, reason in plan.rows}["train.memory_format"]
    assert "overwrites memory in stem" in reason
    assert plan_of({"model.arch": arch}, machine=SERVER).config.train.memory_format == "channels-last"
    with pytest.raises(ConfigError, match="overwrites memory") as refused:
        plan_of({"model.arch": arch, "train.memory_format": "channels-last"})
    assert refused.value.code == "C004"


@pytest.mark.parametrize("arch", ["small-cnn", "torchvision/resnet50", "torchvision/regnet_y_400mf", "timm/resnet10t"])
def test_usual_networks_have_no_such_layer(arch: str) -> None:
    assert outline_of(ModelSpec(arch, num_outputs=3)).breaks_channels_last == ""


@pytest.mark.parametrize(
    ("layer", "broken"),
    [
        ((3, 48, 1, 2), True), ((1, 8, 1, 2), True), ((15, 48, 1, 4), True), ((16, 48, 1, 2), False), ((3, 48, 1, 1), False),
        ((3, 48, 3, 2), False), ((3, 48, 2, 2), False),
    ],
    ids=str,
)  # fmt: skip
def test_the_condition_is_a_strided_1x1_convolution_of_few_channels(layer: tuple[int, ...], broken: bool) -> None:
    from imgcls_fast.models.outline import breaks_channels_last

    network = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(*layer))
    assert breaks_channels_last(network) == ("1" if broken else "")


TRAINS = """
import sys, torch
from imgcls_fast.models.build import ModelSpec, build_model
sys.path.insert(0, sys.argv[1])
from test_plan import plan_of
torch.set_num_threads(1)
plan = plan_of({"model.arch": sys.argv[2], "train.batch_size": 4, "pixels.size": 224})
model = build_model(ModelSpec.from_dict(plan.spec)).train()
if plan.config.model_dump()["train"].get("memory_format") == "contiguous":
    model.lay_out("contiguous")
for _ in range(2):
    model(torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8)).float().sum().backward()
print("trained")
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", BROKEN)
def test_two_steps_of_such_a_network_at_224_pixels_do_not_kill_the_process(arch: str) -> None:
    command = [sys.executable, "-c", TRAINS, str(Path(__file__).parent), arch]
    watched = {
        "LD_PRELOAD": "libc_malloc_debug.so.0",
        "GLIBC_TUNABLES": "glibc.malloc.check=3",
    }  # glibc's own, if there
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, **watched}
    )
    assert (answer.returncode, answer.stdout.strip()) == (0, "trained"), answer.stderr[-500:]


@pytest.mark.parametrize("arch", ["small-cnn", "timm/resnet10t", "torchvision/mobilenet_v3_small"])
def test_both_formats_give_the_same_outputs_and_gradients(arch: str) -> None:
    torch.manual_seed(0)
    one = build_model(ModelSpec(arch, num_outputs=3, image_size=64)).eval()  # batch statistics amplify rounding
    other = copy.deepcopy(one)
    other.lay_out("contiguous")
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    answers = []
    for model in (one, other):
        logits = model(pixels)
        logits.square().sum().backward()
        answers.append([logits, *(p.grad for p in model.parameters())])
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert one.state_dict().keys() == other.state_dict().keys()
    with pytest.raises(ValueError, match="channels-last or contiguous"):
        other.lay_out("nchw")


@pytest.mark.parametrize("wanted", ["channels-last", "contiguous"])
def test_training_obeys_the_format_with_its_averages_and_optimizer(wanted: str, make_fit: MakeFit) -> None:
    fit = make_fit({"train.memory_format": wanted, "train.epochs": 1, "optim.ema": 0.9})
    form = torch.channels_last if wanted == "channels-last" else torch.contiguous_format
    maps: list[torch.Tensor] = []
    fit.step.model.backbone.stem[0].register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
    fit.run()
    filters = [p for m in (fit.step.model, fit.step.averaged.model) for p in m.parameters() if p.dim() == 4 and p.shape[-1] > 1]
    moments = [s["exp_avg"] for p in fit.step.model.parameters() if (s := fit.step.optimizer.state[p])["exp_avg"].dim() == 4]
    assert maps
    assert all(x.is_contiguous(memory_format=form) for x in (*maps, *filters, *moments))


@pytest.mark.usefixtures("no_judging")
def test_a_resumed_run_keeps_its_format_and_cannot_change_it(configure: Callable[..., Any], same_result: Any,
                                                             stop_at: Any) -> None:  # fmt: skip
    from imgcls_fast.core.errors import Interrupted

    assert "train.memory_format" not in free_settings()
    whole = session.start(configure({"train.memory_format": "contiguous"}))
    stop_at(7)
    config = configure({"train.memory_format": "contiguous"})
    with pytest.raises(Interrupted):
        session.start(config)
    run = Run(Path(config.out))
    assert run.config.train.memory_format == "contiguous"
    with pytest.raises(ModelError) as refused:
        session.resume(run, {"train.memory_format": "channels-last"})
    assert refused.value.code == "M006"
    same_result(whole, session.resume(run, {}))


class TestMeasured:
    """`faster_format`: the quicker one by a margin, measured once on a machine."""

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "cache"))

    def ask(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> tuple[tuple[str, str], list[str]]:
        steps: list[str] = []

        def step(model: Any, name: str, pixels: torch.Tensor, precision: str) -> float:
            steps.append(name)
            return seconds[name]

        monkeypatch.setattr(layout, "step_s", step)
        config = build_config({"train.precision": "fp32", "train.threads": 1, "model.kernels": "off"})
        spec = ModelSpec("small-cnn", num_outputs=3, image_size=32, arch_args={"width": 4}).to_dict()
        return layout.faster_format(spec, config, 4), steps

    @pytest.mark.parametrize(("cl", "nchw", "chosen"), [(0.4, 0.2, "contiguous"), (0.2, 0.4, "channels-last"),
                                                        (0.2, 0.198, "channels-last")])  # fmt: skip
    def test_the_faster_one_is_taken_and_kept(
        self, cl: float, nchw: float, chosen: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (found, reason), steps = self.ask(monkeypatch, {"channels-last": cl, "contiguous": nchw})
        assert found == chosen
        assert "ms per image, measured on this machine" in reason
        assert steps == ["channels-last", "contiguous"] * 4
        again, steps = self.ask(monkeypatch, {"channels-last": nchw, "contiguous": cl})
        assert (again, steps) == ((found, reason), [])  # the machine has answered before

    def test_a_slow_network_is_timed_once_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, steps = self.ask(monkeypatch, {"channels-last": 9.0, "contiguous": 8.0})
        assert steps == ["channels-last", "contiguous"]

    def test_it_is_announced_before_it_begins_and_times_what_training_builds(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        happened: list[str] = []
        monkeypatch.setattr(layout, "use_kernels", lambda model, mode: happened.append(f"kernels {mode}"))
        monkeypatch.setattr(layout, "step_s", lambda model, name, *more: happened.append(name) or 9.0)
        config = build_config({"train.precision": "fp32", "train.threads": 1, "model.kernels": "off"})
        spec = ModelSpec("small-cnn", num_outputs=3, image_size=32, arch_args={"width": 4}).to_dict()
        layout.faster_format(spec, config, 4, happened.append)
        assert happened[0].startswith("timing two memory formats of small-cnn")
        assert happened[1:] == ["kernels off", "channels-last", "contiguous"]

    def test_a_network_without_convolutions_but_its_patches_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from dataclasses import replace

        def answer(*arguments: Any) -> tuple[str, str]:
            raise AssertionError("it was timed")

        monkeypatch.setattr(layout, "faster_format", answer)
        may = replace(LAPTOP, cpus=1, measures=True)
        plan = plan_of({"model.arch": "timm/vit_tiny_patch16_224", "model.init": "scratch"}, machine=may)
        assert plan.config.train.memory_format == "channels-last"
        assert not outline_of(ModelSpec("torchvision/swin_t", num_outputs=3)).convolves
        assert outline_of(ModelSpec("torchvision/convnext_tiny", num_outputs=3)).convolves

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"k": 1}', "\x00"])
    def test_a_damaged_memory_is_measured_anew(
        self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "memory-format.json").write_text(text)
        (found, _), steps = self.ask(monkeypatch, {"channels-last": 0.4, "contiguous": 0.2})
        assert found == "contiguous"
        assert steps

    def test_measuring_leaves_random_numbers_and_threads_as_they_were(self) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state(), torch.get_num_threads()
        spec = ModelSpec("small-cnn", num_outputs=3, image_size=32, arch_args={"width": 4}).to_dict()
        found = layout.measure(spec, 2, "fp32", 2, "off")
        assert set(found) == {"channels-last", "contiguous"}
        assert min(found.values()) > 0
        assert torch.equal(torch.get_rng_state(), before[0])
        assert torch.get_num_threads() == before[1]

    def test_the_plan_measures_only_where_it_may_and_nothing_is_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from dataclasses import replace

        asked: list[str] = []

        def answer(spec: dict[str, Any], config: Any, micro: int, notice: Any) -> tuple[str, str]:
            asked.append(spec["arch"])
            return "contiguous", "measured"

        monkeypatch.setattr(layout, "faster_format", answer)
        may = replace(LAPTOP, cpus=1, measures=True)
        assert plan_of({"model.arch": "resnet18"}, machine=LAPTOP).config.train.memory_format == "channels-last"
        assert plan_of({"model.arch": "small-cnn"}, machine=may).config.train.memory_format == "channels-last"
        assert plan_of({"model.arch": "resnet18", "train.memory_format": "channels-last"}, images(), may).rows
        assert asked == []
        assert plan_of({"model.arch": "resnet18"}, machine=may).config.train.memory_format == "contiguous"
        assert asked == ["torchvision/resnet18"]
