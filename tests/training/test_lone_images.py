"""No forward pass in training ever takes the statistics of a batch norm from one image; halving starts a batch anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imgcls_fast.core.errors import ConfigError, ModelError
from imgcls_fast.loading.sampler import forward_passes
from imgcls_fast.training.fit import Fit

from .conftest import _write_images
from .test_fit import batch_of
from .test_plan import images, plan_of

MakeFit = Callable[..., Any]


@pytest.mark.parametrize("least", [1, 2])
def test_parts_cover_the_batch_and_none_is_too_small(least: int) -> None:
    for batch in range(least, 40):
        for most in range(1, 45):
            parts = forward_passes(batch, most, least)
            sizes = [part.stop - part.start for part in parts]
            assert [k for part in parts for k in range(part.start, part.stop)] == list(range(batch))
            assert min(sizes) >= least
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= most or len(parts) == batch // least  # larger only where smaller is impossible


@pytest.mark.parametrize("arch", ["small-cnn", "resnet18"])
@pytest.mark.parametrize("train", [2, 3, 5, 8, 15, 16, 17, 31])
def test_few_training_images_are_planned_in_batches_of_two_at_least(train: int, arch: str) -> None:
    """Fewer than 16 once gave a batch of 1, and batch norm ended the run with a raw error."""
    manifest = images(train * 5 // 4 + 1)
    assert len(manifest.rows("train")) in (train, train + 1)
    train_settings = plan_of({"model.arch": arch}, manifest).config.train
    batch, micro = int(train_settings.batch_size), int(train_settings.micro_batch)
    assert 2 <= batch <= len(manifest.rows("train"))
    assert all(part.stop - part.start >= 2 for part in forward_passes(batch, micro, 2))


@pytest.mark.parametrize(
    ("batch", "accum", "micro"), [(3, 2, 3), (2, 2, 2), (7, 4, 3), (9, 9, 3), (12, 12, 2), (12, 5, 3)]
)
def test_accumulation_leaves_no_lone_image_and_the_plan_says_so(batch: int, accum: int, micro: int) -> None:
    plan = plan_of({"train.batch_size": batch, "train.accum": accum})
    assert plan.config.train.micro_batch == micro
    sizes = [part.stop - part.start for part in forward_passes(batch, micro, 2)]
    assert min(sizes) >= 2
    assert max(sizes) == micro
    if micro > -(-batch // accum):
        reason = {name: reason for name, _, reason in plan.rows}["train.micro_batch"]
        assert "batch norm needs 2 images in every forward pass" in reason


def test_a_network_without_batch_norm_or_a_frozen_one_may_see_single_images() -> None:
    for changes in ({"model.arch": "vgg11"}, {"model.freeze": "backbone"}):
        plan = plan_of({"train.batch_size": 5, "train.accum": 8, **changes})
        assert plan.config.train.micro_batch == 1
        assert plan_of({"train.batch_size": 1, **changes}).config.train.batch_size == 1


@pytest.mark.parametrize(("changes", "n", "words"), [
    ({}, 2, ("there is 1 training image", "batch norm", "freeze='backbone'")),
    ({"train.batch_size": 1}, 100, ("train.batch_size must be at least 2 for small-cnn, got 1", "batch_size=2")),
])  # fmt: skip
def test_a_lone_image_that_cannot_be_avoided_is_refused_before_the_run(
    changes: dict[str, Any], n: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_of(changes, images(n))
    assert refused.value.code == "C004"
    assert all(word in str(refused.value) for word in words)


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Seven images to train, three to validate."""
    return _write_images(tmp_path / "few", {"train": 7, "val": 3})


def sizes_seen(fit: Any) -> list[int]:
    """Images of each forward pass in training mode of `fit`, as they happen."""
    seen: list[int] = []
    fit.step.model.register_forward_pre_hook(lambda model, inputs: seen.append(len(inputs[0])) if model.training else None)
    return seen


@pytest.mark.parametrize("changes", [
    {"train.batch_size": "auto"},
    {"train.batch_size": 3, "train.accum": 2},
    {"train.batch_size": 7, "train.micro_batch": 1},
    {"train.batch_size": 5, "train.micro_batch": 2, "optim.ema": 0},
], ids=str)  # fmt: skip
def test_a_small_run_never_shows_batch_norm_a_single_image(
    changes: dict[str, Any], few: Path, make_fit: MakeFit
) -> None:
    fit = make_fit({"train.epochs": 1, **changes}, data=few)
    seen = sizes_seen(fit)
    fit.run()
    assert len(fit.run_.epochs) == 1
    assert seen
    assert min(seen) >= 2


def test_a_batch_with_a_single_good_image_is_passed_over(make_fit: MakeFit) -> None:
    """The others were quarantined: copies of the good one stand in their places."""
    fit = make_fit()
    seen = sizes_seen(fit)
    fit._learn(batch_of(8, bad=tuple(range(1, 8))))
    assert not seen
    assert fit.step.images == 0
    fit._learn(batch_of(8, bad=tuple(range(2, 8))))
    assert seen == [8]
    assert fit.step.images == 2


def short_of_memory(fit: Any, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, int], bool]) -> list[int]:
    """Let the forward pass run out of memory, after it was computed, where `fails(call, images)`; the sizes seen."""
    original, sizes = fit.step.forward, []

    def forward(pixels: torch.Tensor) -> Any:
        sizes.append(len(pixels))
        outputs = original(pixels)
        if fails(len(sizes), len(pixels)):
            raise torch.OutOfMemoryError("injected")
        return outputs

    monkeypatch.setattr(fit.step, "forward", forward)
    return sizes


@pytest.mark.parametrize("batch", [7, 4, 5])
def test_halving_goes_down_to_two_images_and_then_says_what_to_do(
    batch: int, make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = make_fit({"train.batch_size": batch})
    sizes = short_of_memory(fit, monkeypatch, lambda call, n: True)
    with pytest.raises(ModelError, match="2 images at a time do not fit") as refused:
        fit.step.gradients(batch_of(batch), [float(batch)])
    assert refused.value.code == "H002"
    assert min(sizes) >= 2


def state_of(fit: Any) -> list[torch.Tensor]:
    return [
        *(p.grad for p in fit.step.model.parameters()),
        *fit.step.model.buffers(),
        torch.get_rng_state(),
    ]


@pytest.mark.parametrize("call", [1, 2])
def test_a_halved_batch_ends_as_if_it_had_been_cut_so_from_the_beginning(
    call: int, make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics of the parts that had run, and their draws of dropout, once stayed."""
    small = {"train.batch_size": 12, "model.drop_rate": 0.5}
    disturbed = make_fit({**small, "train.micro_batch": 6})
    disturbed.step.model.train()
    short_of_memory(disturbed, monkeypatch, lambda at, n: at == call)
    loss = disturbed.step.gradients(batch_of(12), [12.0])
    found = state_of(disturbed)
    calm = make_fit({**small, "train.micro_batch": 3})
    calm.step.model.train()
    assert torch.equal(calm.step.gradients(batch_of(12), [12.0]), loss)
    assert disturbed.step.micro_batch == calm.step.micro_batch == 3
    assert all(torch.equal(a, b) for a, b in zip(found, state_of(calm), strict=True))


def test_a_run_that_ran_out_of_memory_equals_one_that_was_planned_so(
    make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = []
    for micro in (8, 4):
        fit = make_fit({"train.epochs": 1, "train.micro_batch": micro, "model.drop_rate": 0.5})
        if micro == 8:
            short_of_memory(fit, monkeypatch, lambda at, n: at == 1)
        fit.run()
        final.append({k: v.clone() for k, v in fit.step.model.state_dict().items()})
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_what_a_network_needs_follows_its_norms(make_fit: MakeFit) -> None:
    assert make_fit().step.images_needed == 2
    assert make_fit({"model.freeze": "backbone"}).step.images_needed == 1
    assert isinstance(make_fit({"model.freeze": 4}), Fit)
