"""Class weights and learning-rate schedules against their formulas."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from imgcls_fast.core.config import LossConfig, OptimConfig
from imgcls_fast.core.errors import ConfigError
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.models.backbones import ModelSpec, weightless
from imgcls_fast.models.build import build_model
from imgcls_fast.training.objectives import class_weights
from imgcls_fast.training.optim import build_optimizer, parameter_groups
from imgcls_fast.training.progress import Progress, is_better
from imgcls_fast.training.schedule import Schedule, set_rates

COUNTS = np.array([90, 9, 1])
LABELS = LabelSpace.single(("cat", "dog", "owl"))


def weights(value: Any) -> np.ndarray:
    found = class_weights(LossConfig(class_weights=value), LABELS, COUNTS, np.full(3, 100))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("asked", "raw"),
    [
        ("auto", 1 / COUNTS),
        ("effective", 0.001 / (1 - 0.999**COUNTS)),
        ((1, 2, 5), np.array([1, 2, 5])),
        ("1,2,5", np.array([1, 2, 5])),
        ("owl=3,cat=0.5", np.array([0.5, 1, 3])),
        ({"owl": 3, "cat": 0.5}, np.array([0.5, 1, 3])),
    ],
)
def test_class_weights_follow_their_formula_and_average_to_one_over_the_images(asked: Any, raw: np.ndarray) -> None:
    found = weights(asked)
    np.testing.assert_allclose(found / found[0], raw / raw[0], rtol=1e-5)
    assert float((found * COUNTS).sum() / COUNTS.sum()) == pytest.approx(1, rel=1e-6)


def test_no_weights_are_none() -> None:
    assert class_weights(LossConfig(class_weights="none"), LABELS, COUNTS, np.full(3, 100)) is None


@pytest.mark.parametrize(("asked", "words"), [((1, 2), ("2 numbers", "3 classes")), ({"ow": 2}, ("'ow'",))])
def test_a_wrong_count_or_name_is_c003_and_says_the_class_order(asked: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        weights(asked)
    assert refused.value.code == "C003"
    text = str(refused.value)
    assert all(word in text for word in words)
    assert "cat, dog, owl" in text


def schedule(steps: int = 10, epochs: int = 10, **settings: Any) -> Schedule:
    values: dict[str, Any] = {"lr": 0.5, "warmup": 0.0, "momentum": 0.9, "weight_decay": 0.0, "ema": 0.0, "opt": "sgd"}
    return Schedule(OptimConfig(**{**values, **settings}), steps, epochs)


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    rates = schedule(sched="cosine", warmup=2.0)
    np.testing.assert_allclose([rates.lr(step) for step in range(20)], [0.5 * (step + 1) / 20 for step in range(20)])
    assert rates.lr(20) == pytest.approx(0.5)


def test_cosine_follows_its_formula_and_its_floor() -> None:
    rates = schedule(sched="cosine", warmup=2.0, min_lr=0.1)
    for step in (20, 33, 60, 99):
        formula = 0.25 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert rates.lr(step) == pytest.approx(max(formula, 0.05))


def test_cosine_equals_torchs_schedule() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    rates = schedule(sched="cosine")
    for step in range(100):
        assert rates.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        reference.step()


def test_one_cycle_rises_for_three_tenths_and_momentum_mirrors_it() -> None:
    rates = schedule(sched="onecycle", warmup=3.0)
    assert rates.lr(0) == pytest.approx(0.5 / 25)
    assert rates.lr(30) == pytest.approx(0.5)
    assert rates.lr(15) == pytest.approx(0.5 * (0.04 + 0.96 / 2))
    assert rates.lr(99) < 0.002
    values = [rates.lr(step) for step in range(100)]
    assert int(np.argmax(values)) == 30
    assert [rates.momentum(step) for step in (0, 30)] == [pytest.approx(0.95), pytest.approx(0.85)]
    assert rates.momentum(99) == pytest.approx(0.95, abs=0.002)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_one_cycle_writes_rate_and_momentum_into_the_optimizer(opt: str) -> None:
    rates = schedule(sched="onecycle", opt=opt, warmup=3.0)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), rates.config, torch.device("cpu"))
    assert set_rates(optimizer, rates, 30) == pytest.approx(0.5)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.5)
        assert (group["momentum"] if opt == "sgd" else group["betas"][0]) == pytest.approx(0.85)


def formula(sched: str, step: int, rise: int, drops: int, settings: dict[str, Any]) -> float:
    """The share of the peak at a step of a run of 100, written down without looking at the code.

    Args:
        rise: steps of warm-up.
        drops: how often plateau has dropped by then.
    """
    if step < rise:
        cycle = (1 - math.cos(math.pi * step / rise)) / 2
        return max(settings["min_lr"], 1 / 25 + 24 / 25 * cycle) if sched == "onecycle" else (step + 1) / rise
    way = (step - rise) / (100 - rise)
    cosine = (1 + math.cos(math.pi * way)) / 2
    shares = {
        "cosine": cosine,
        "onecycle": 1e-4 + (1 - 1e-4) * cosine,
        "step": settings["gamma"] ** (step // 10 // settings["step_epochs"]),
        "plateau": settings["gamma"] ** drops,
        "none": 1.0,
    }
    return max(settings["min_lr"], shares[sched])


@pytest.mark.parametrize("resumed", [None, 0, 1, 15, 20, 37, 99], ids=lambda at: f"resumed at {at}")
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.5, 3.0, 9.9])
@pytest.mark.parametrize("floor", [0.0, 0.2])
@pytest.mark.parametrize("sched", ["cosine", "onecycle", "step", "plateau", "none"])
def test_every_schedule_with_every_warm_up_follows_its_formula_also_when_resumed(
    sched: str, floor: float, warmup: float, resumed: int | None
) -> None:
    settings = {"gamma": 0.3, "step_epochs": 4, "plateau_patience": 1, "min_lr": floor}
    rates = schedule(sched=sched, warmup=warmup, **settings)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), rates.config, torch.device("cpu"))
    values = [0.1, 0.3, 0.2, 0.2, 0.4, 0.1, 0.1, 0.1, 0.1, 0.5]  # plateau drops after epochs 4, 7 and 9
    drops, rise = 0, round(warmup * 10)
    for step in range(100):
        if step == resumed:  # as from a checkpoint: a new object, whose state went through JSON
            state = json.loads(json.dumps(rates.state))
            rates = schedule(sched=sched, warmup=warmup, **settings)
            rates.state.update(state)
        expected = 0.5 * formula(sched, step, rise, drops, settings)
        assert set_rates(optimizer, rates, step) == pytest.approx(expected, rel=1e-12), step
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)
        way = step / rise if step < rise else 1 - (step - rise) / (100 - rise)
        momentum = 0.95 - 0.1 * way if sched == "onecycle" else 0.9
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(momentum, rel=1e-12)
        if step % 10 == 9:
            rates.after_epoch(values[step // 10])
            drops += sched == "plateau" and step // 10 in (3, 6, 8)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.5, 3.0, 9.9])
@pytest.mark.parametrize("sched", ["cosine", "onecycle", "step", "plateau", "none"])
def test_after_its_peak_no_rate_rises_again(sched: str, warmup: float) -> None:
    rates = schedule(sched=sched, warmup=warmup, step_epochs=20)
    values = [rates.lr(step) for step in range(100)]
    peak = int(np.argmax(values))
    assert values[peak] == pytest.approx(0.5, rel=0.01)
    assert peak in (round(warmup * 10), max(0, round(warmup * 10) - 1))
    assert all(later <= earlier for earlier, later in pairwise(values[peak:]))
    assert all(later >= earlier for earlier, later in pairwise(values[: peak + 1]))


def test_one_cycle_leaves_sgd_without_momentum_as_it_is() -> None:
    rates = schedule(sched="onecycle", momentum=0.0, warmup=3.0)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), rates.config, torch.device("cpu"))
    set_rates(optimizer, rates, 30)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.0}


def test_steps_fall_by_gamma_every_few_epochs() -> None:
    rates = schedule(sched="step", step_epochs=3, gamma=0.2)
    for epoch in range(10):
        for step in (epoch * 10, epoch * 10 + 9):
            assert rates.lr(step) == pytest.approx(0.5 * 0.2 ** (epoch // 3))


def test_plateau_falls_after_the_patience_and_its_state_can_be_restored() -> None:
    """As torch's ReduceLROnPlateau (threshold 0) does it."""
    values = [0.5, 0.6, 0.6, 0.59, 0.6, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=2, threshold=0)
    rates = schedule(sched="plateau", gamma=0.5, plateau_patience=2)
    for value in values:
        reference.step(value)
        rates.after_epoch(value)
        assert rates.lr(5) == pytest.approx(optimizer.param_groups[0]["lr"])
        twin = schedule(sched="plateau", gamma=0.5, plateau_patience=2)
        twin.state.update(rates.state)
        rates = twin
    assert rates.lr(5) < 0.5


def test_a_figure_that_is_not_defined_neither_drops_the_rate_nor_hides_the_loss() -> None:
    """Average precision is NaN where no validation image has any of the labels."""
    rates = schedule(sched="plateau", gamma=0.5, plateau_patience=1)
    for _ in range(4):
        rates.after_epoch(math.nan)
    assert rates.lr(5) == 0.5
    before = Progress(best=math.nan, best_loss=1.0)
    assert [is_better(math.nan, loss, before) for loss in (0.9, 1.0, 1.1)] == [True, False, False]
    assert is_better(0.1, 2.0, before)
    assert not is_better(math.nan, 0.1, Progress(best=0.1, best_loss=2.0))


def test_biases_and_norms_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    groups = parameter_groups(model, 0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [len(group["params"]) for group in groups] == [1, 4]


EXEMPT = {  # besides what has one dimension: the last part of the name, and how many of them
    "torchvision/convnext_tiny": {"layer_scale": 18},
    "torchvision/swin_t": {"relative_position_bias_table": 12},
    "torchvision/swin_v2_t": {"logit_scale": 12, "weight": 24},  # of the perceptron that computes the bias table
    "torchvision/vit_b_16": {"class_token": 1, "pos_embedding": 1},
    "torchvision/maxvit_t": {"relative_position_bias_table": 22},
    "timm/swin_tiny_patch4_window7_224": {"relative_position_bias_table": 12},
    "timm/swinv2_tiny_window8_256": {"logit_scale": 12, "weight": 24},
    "timm/deit_tiny_distilled_patch16_224": {"cls_token": 1, "dist_token": 1, "pos_embed": 1},
    "timm/beit_base_patch16_224": {"cls_token": 1, "relative_position_bias_table": 12},
    "timm/levit_128": {"attention_biases": 14},
    "timm/xcit_nano_12_p16_224": {"cls_token": 1, "temperature": 12, "weight": 1},  # of the position embedding
    "timm/crossvit_tiny_240": {"cls_token_0": 1, "cls_token_1": 1, "pos_embed_0": 1, "pos_embed_1": 1},
    "timm/fastvit_sa12": {"gamma": 24},
    "torchvision/resnet18": {},
    "torchvision/mobilenet_v3_small": {},
    "timm/convnext_atto": {},
    "small-cnn": {},
}


@pytest.mark.parametrize("arch", EXEMPT)
def test_scales_tokens_and_tables_do_not_decay_in_any_family(arch: str) -> None:
    network = weightless(ModelSpec(arch, num_outputs=1))  # a head of one row is still a matrix
    names = {id(p): name for name, p in network.named_parameters()}
    decay, plain = ({names[id(p)] for p in group["params"]} for group in parameter_groups(network, 0.05))
    flat = {name for name, p in network.named_parameters() if p.ndim < 2}
    assert flat <= plain
    assert Counter(name.rpartition(".")[2] for name in plain - flat) == EXEMPT[arch]
    if hasattr(network, "no_weight_decay"):  # never more decay than timm's own groups
        from timm.optim import param_groups_weight_decay

        theirs = param_groups_weight_decay(network, 0.05, no_weight_decay_list=network.no_weight_decay())
        assert {names[id(p)] for group in theirs if not group["weight_decay"] for p in group["params"]} <= plain
    assert decay | plain == set(names.values())


def test_the_model_around_a_network_has_the_same_groups() -> None:
    model = build_model(ModelSpec("timm/vit_tiny_patch16_224", num_outputs=3, image_size=32, arch_args={"depth": 1}))
    inner, outer = ([len(g["params"]) for g in parameter_groups(m, 0.1)] for m in (model.backbone, model))
    assert inner == outer


def test_sgd_without_momentum_works() -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), schedule(sched="none", momentum=0.0).config, torch.device("cpu"))
    assert not optimizer.param_groups[0]["nesterov"]
