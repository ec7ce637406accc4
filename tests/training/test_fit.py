"""The training loop: what it minimises, what it counts, and what it never does."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from imgcls_fast.core.batch import Batch
from imgcls_fast.core.errors import ModelError
from imgcls_fast.core.run import Run
from imgcls_fast.training import session
from imgcls_fast.training.checkpoint import read_checkpoint
from imgcls_fast.training.fit import Fit
from imgcls_fast.training.objectives import Objective, OneOf, cross_entropy
from imgcls_fast.training.optim import Averaged
from imgcls_fast.training.step import Step

MakeFit = Callable[..., Any]


class Plain(nn.Module):
    """A classifier without batch norm: each image by itself."""

    aux_weights = ()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels.permute(0, 3, 1, 2).float() / 255)


def batch_of(n: int, bad: tuple[int, ...] = ()) -> Batch:
    draw = torch.Generator().manual_seed(n)
    targets = torch.nn.functional.one_hot(torch.arange(n) % 3, 3).float()
    weight, rows = torch.ones(n), torch.arange(n)
    for k in bad:
        weight[k], rows[k], targets[k] = 0, -1, 0
    return Batch(torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=draw), targets, weight, rows)


def gradients(fit: Any, batch: Batch, micro: int) -> tuple[torch.Tensor, float]:
    """All gradients as one vector, and the sum of the row losses."""
    model = Plain()
    fit.step.model = fit.step.forward = model
    fit.step.micro_batch = micro
    summed = fit.step.gradients(batch, fit.step.objective.totals(batch.targets, batch.weight))
    return torch.cat([p.grad.flatten() for p in model.parameters()]), float(summed)


@pytest.mark.parametrize("micro", [1, 3, 5, 12])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal classes", "weighted classes"])
def test_accumulated_gradients_equal_those_of_one_big_batch(micro: int, weighted: bool, make_fit: MakeFit) -> None:
    fit = make_fit({"loss.class_weights": (1.0, 2.0, 4.0)} if weighted else {})
    whole, loss = gradients(fit, batch_of(12), 12)
    parts, again = gradients(fit, batch_of(12), micro)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert again == pytest.approx(loss, rel=1e-6)


def test_padding_and_bad_rows_change_neither_loss_nor_gradient(make_fit: MakeFit) -> None:
    fit = make_fit({"loss.class_weights": (1.0, 2.0, 4.0)})
    padded = batch_of(12, bad=(4, 11))
    keep = torch.tensor([k for k in range(12) if k not in (4, 11)])
    clean = Batch(*(getattr(padded, name)[keep] for name in ("pixels", "targets", "weight", "rows")))
    expected, loss = gradients(fit, clean, 10)
    for micro in (12, 5):
        found, again = gradients(fit, padded, micro)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert again == pytest.approx(loss, rel=1e-6)


def test_a_batch_of_bad_images_is_passed_over(make_fit: MakeFit) -> None:
    fit = make_fit()
    before = [p.clone() for p in fit.step.model.parameters()]
    fit._learn(batch_of(8, bad=tuple(range(8))))
    assert all(torch.equal(a, b) for a, b in zip(before, fit.step.model.parameters(), strict=True))
    assert fit.step.loss_weight == 0
    assert float(fit.step.loss_sum) == 0


def test_the_train_loss_is_a_mean_over_images_whatever_the_batch_size(make_fit: MakeFit) -> None:
    """With a learning rate too small to move anything, each batch size must report the same loss of the same images."""
    losses = {}
    for size in (7, 14, 42):  # all divide 42: every image counts once
        fit = make_fit({"train.batch_size": size, "train.epochs": 1, "optim.lr": 1e-30, "augment.policy": "none", "model.drop_rate": 0.0,
                        "optim.opt": "sgd", "loss.label_smoothing": 0.0})  # fmt: skip
        fit.step.model = fit.step.forward = Plain()
        fit.step.optimizer = torch.optim.SGD(fit.step.model.parameters(), lr=1e-30)
        fit.step.averaged = None
        for batch in fit.loaders.train.epoch(0):
            fit._learn(batch)
        losses[size] = fit.step.loss
        assert fit.step.images == 42
    assert losses[7] == pytest.approx(losses[42], rel=1e-5)
    assert losses[14] == pytest.approx(losses[42], rel=1e-5)


def test_the_validation_loss_does_not_depend_on_the_batch_size(make_fit: MakeFit) -> None:
    losses = []
    for size in (1, 5, 64):
        fit = make_fit({"evaluate.batch_size": size})
        fit.step.model.eval()
        losses.append(fit._validate(_Quiet()).log_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


class _Quiet:
    requested = False


def test_validation_runs_in_order_without_augmentation_and_without_gradients(
    make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = make_fit({"augment.policy": "heavy", "evaluate.batch_size": 5})
    seen: list[bool] = []
    original = fit.engine.model.forward
    monkeypatch.setattr(
        fit.engine.model,
        "forward",
        lambda x: (seen.append(torch.is_grad_enabled() or fit.engine.model.training), original(x))[1],
    )
    fit._validate(_Quiet())
    assert seen
    assert not any(seen)
    epochs = [list(fit.loaders.val.epoch(e)) for e in (0, 1)]
    rows = np.concatenate([np.asarray(b.rows) for b in epochs[0]])
    assert (rows[rows >= 0] == fit.manifest.rows("val")).all()
    for one, other in zip(*epochs, strict=True):
        assert torch.equal(torch.as_tensor(one.pixels), torch.as_tensor(other.pixels))


def test_label_smoothing_and_class_weights_equal_torchs_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(9, 4), torch.randint(0, 4, (9,))
    hot, one = nn.functional.one_hot(label, 4).float(), torch.ones(9)
    for smoothing in (0.0, 0.1, 0.5):
        mine = OneOf(cross_entropy, smoothing, None, torch.device("cpu"))
        expected = nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, label)
        torch.testing.assert_close(mine.sum(logits, hot, one) / mine.total(hot, one), expected)
    weights = np.array([0.5, 1, 2, 4], np.float32)
    mine = OneOf(cross_entropy, 0.0, weights, torch.device("cpu"))
    expected = nn.CrossEntropyLoss(weight=torch.from_numpy(weights))(logits, label)
    torch.testing.assert_close(mine.sum(logits, hot, one) / mine.total(hot, one), expected)


def test_averaged_weights_follow_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    averaged = Averaged(model, 0.8)
    expected = {k: v.clone().double() for k, v in model.state_dict().items()}
    for step in range(60):
        model(torch.randn(4, 2)).sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        averaged.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        for k, v in model.state_dict().items():
            expected[k] = v.double() if k.endswith("tracked") else decay * expected[k] + (1 - decay) * v.double()
    for k, v in averaged.model.state_dict().items():
        torch.testing.assert_close(v.double(), expected[k], rtol=1e-5, atol=1e-5)
    assert not averaged.model.training
    assert not any(p.requires_grad for p in averaged.model.parameters())


def test_clipping_limits_the_norm_of_the_whole_gradient(make_fit: MakeFit) -> None:
    fit = make_fit({"optim.clip": 1e-3, "optim.opt": "sgd", "optim.momentum": 0.0, "optim.weight_decay": 0.0, "optim.ema": 0,
                    "optim.sched": "none", "optim.warmup": 0.0, "optim.lr": 1.0})  # fmt: skip
    before = torch.cat([p.detach().flatten().clone() for p in fit.step.model.parameters()])
    fit._learn(batch_of(8))
    moved = torch.cat([p.detach().flatten() for p in fit.step.model.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_no_step_waits_for_the_device(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device "meta", which holds no numbers, every .item(), float() or bool() of a tensor raises."""
    fit = make_fit({"optim.clip": 1.0, "loss.class_weights": (1.0, 2.0, 4.0)})
    meta = torch.device("meta")
    fit.step.device, fit.step.model, fit.step.averaged = meta, fit.step.model.to(meta), Averaged(fit.step.model.to(meta), 0.9)
    fit.step.forward = fit.step.model
    from imgcls_fast.training.optim import build_optimizer

    fit.step.optimizer = build_optimizer(fit.step.model, fit.config.optim, meta)
    weights = np.array([1, 2, 4], np.float32)
    fit.step.objective = Objective(fit.manifest.labels, fit.config.loss, weights, meta)
    fit.step.loss_sum = fit.step.loss_sum.to(meta)
    monkeypatch.setattr(fit.step, "_autocast", nullcontext)
    for step in range(3):
        fit.progress.step = step
        fit.display.show(fit.progress, fit.pace, fit.step, fit._learn(batch_of(8)))  # log_every is large: no look at the loss either
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(fit.step.loss_sum)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(
    make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = make_fit()
    expected, loss = gradients(fit, batch_of(12), 12)
    original = Step._accumulate

    def scarce(self: Step, batch: Batch, totals: list[float]) -> Any:
        answer = original(self, batch, totals)  # gradients of a failed attempt must not be counted
        if self.micro_batch > 3:
            raise torch.OutOfMemoryError("injected")
        return answer

    monkeypatch.setattr(Step, "_accumulate", scarce)

    class Optimizer:
        def zero_grad(self, set_to_none: bool) -> None:
            fit.step.model.zero_grad()

    fit.step.optimizer = Optimizer()
    found, again = gradients(fit, batch_of(12), 12)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert again == pytest.approx(loss, rel=1e-6)
    assert fit.step.micro_batch == 3
    assert [e["event"] for e in fit.events] == ["warning", "warning"]
    assert "3 images per forward pass" in fit.events[-1]["text"]


def test_memory_that_does_not_hold_one_image_is_h002(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Step, batch: Batch, totals: list[float]) -> Any:
        raise torch.OutOfMemoryError("injected")

    fit = make_fit()
    monkeypatch.setattr(Step, "_accumulate", never)
    with pytest.raises(ModelError) as refused:
        fit.step.gradients(batch_of(8), [8.0])
    assert refused.value.code == "H002"


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_a_loss_that_is_not_finite_stops_with_m008_and_the_earlier_checkpoint_is_intact(
    where: str, make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = make_fit({"train.save_every": 0.0, "train.log_every": 0.0})
    original = Fit._learn

    def poisoned(self: Fit, batch: Batch) -> float:
        answer = original(self, batch)
        if self.progress.step == 4:
            with torch.no_grad():
                if where == "loss":
                    self.step.loss_sum.fill_(float("nan"))
                else:  # an overflow in the backward pass: this loss was still finite
                    next(self.step.model.parameters()).fill_(float("inf"))
        return answer

    monkeypatch.setattr(Fit, "_learn", poisoned)
    with pytest.raises(ModelError) as stopped:
        fit.run()
    assert stopped.value.code == "M008"
    found = read_checkpoint(fit.run_.checkpoints / "last")
    assert found.progress.step == 3
    assert all(torch.isfinite(v).all() for k, v in found.tensors.items() if v.is_floating_point() and k.startswith("model."))


@pytest.mark.usefixtures("no_judging")
class TestWholeRuns:
    """Small runs from the beginning to the last epoch."""

    def test_equal_seeds_give_equal_weights_and_another_seed_does_not(
        self, configure: Callable[..., Any], same_result: Any
    ) -> None:
        one, two, other = (session.start(configure({"train.seed": seed})) for seed in (4, 4, 5))
        same_result(one, two)
        with pytest.raises(AssertionError):
            same_result(one, other)

    def test_every_parameter_learns_and_freezing_is_obeyed(self, make_fit: MakeFit) -> None:
        for freeze, frozen in (("none", False), ("backbone", True)):
            fit = make_fit({"model.freeze": freeze, "optim.weight_decay": 0.0, "train.epochs": 2})
            before = {name: p.detach().clone() for name, p in fit.step.model.named_parameters()}
            fit.run()
            same = {name for name, p in fit.step.model.named_parameters() if torch.equal(p, before[name])}
            backbone = {name for name in before if not name.startswith("backbone.head.")}
            assert same == (backbone if frozen else set())

    def test_the_best_epoch_is_on_disk_at_once_and_early_stopping_watches_the_same_value(
        self, make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values = [0.5, 0.7, 0.6, 0.7, 0.6, 0.9]
        losses = [1.0, 1.0, 0.1, 1.0, 0.1, 0.1]  # the loss improves while the accuracy does not
        fit = make_fit({"train.epochs": 6, "train.patience": 3, "train.monitor": "val/accuracy"})
        original = Fit._validate
        weights: list[torch.Tensor] = []

        def scripted(self: Fit, stop: Any) -> Any:
            epoch = self.progress.epoch
            metrics = original(self, stop)
            weights.append(next(self.step.averaged.model.parameters()).clone())  # type: ignore[union-attr]
            if epoch == 2:  # the best so far lies on the disk, not only in memory
                assert read_checkpoint(self.run_.checkpoints / "best").progress.best_epoch == 1
            return replace(metrics, accuracy=values[epoch], log_loss=losses[epoch])

        monkeypatch.setattr(Fit, "_validate", scripted)
        fit.run()
        assert [line["best"] for line in fit.run_.epochs] == [1, 1, 0, 0, 0]
        found = read_checkpoint(fit.run_.checkpoints / "best")
        assert found.progress.best_epoch == 1
        name = "ema." + next(iter(fit.step.names.values()))
        assert torch.equal(found.tensors[name], weights[1])

    def test_equal_values_are_parted_by_the_loss(self, make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
        fit = make_fit({"train.epochs": 3})
        original = Fit._validate
        monkeypatch.setattr(
            Fit,
            "_validate",
            lambda self, stop: replace(
                original(self, stop), accuracy=0.5, log_loss=(2.0, 1.0, 1.5)[self.progress.epoch]
            ),
        )
        fit.run()
        assert fit.progress.best_epoch == 1

    def test_the_reported_time_is_the_sum_of_the_epochs(
        self, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = [0.0]

        def tick() -> float:
            clock[0] += 1.0
            return clock[0]

        monkeypatch.setattr(time, "monotonic", tick)
        run = session.start(configure({"train.epochs": 3}))
        progress = read_checkpoint(run.checkpoints / "last").progress
        seconds = [line["seconds"] for line in run.epochs]
        assert min(seconds) > 1
        assert progress.seconds == pytest.approx(sum(seconds))

    def test_the_time_of_an_interrupted_epoch_is_not_lost(
        self, configure: Callable[..., Any], stop_at: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from imgcls_fast.core.errors import Interrupted
        clock = [0.0]

        def tick() -> float:
            clock[0] += 1.0
            return clock[0]

        monkeypatch.setattr(time, "monotonic", tick)
        whole = session.start(configure({"train.epochs": 1}))
        stop_at(3)
        config = configure({"train.epochs": 1})
        with pytest.raises(Interrupted):
            session.start(config)
        run = session.resume(Run(Path(config.out)), {})
        assert run.epochs[0]["seconds"] >= 0.8 * whole.epochs[0]["seconds"]  # without it: half

    def test_sinks_that_fail_do_not_stop_training(self, configure: Callable[..., Any]) -> None:
        heard: list[dict[str, Any]] = []

        def broken(event: dict[str, Any]) -> None:
            raise ConnectionError("the tracker is away")

        run = session.start(configure({"train.epochs": 1}), [broken, heard.append])
        assert len(run.epochs) == 1
        texts = [e["text"] for e in heard if e["event"] == "warning"]
        assert len(texts) == 1
        assert "the tracker is away" in texts[0]

    @pytest.mark.slow
    def test_an_architecture_with_auxiliary_outputs_trains(self, make_fit: MakeFit) -> None:
        fit = make_fit({"model.arch": "googlenet", "model.init": "scratch", "model.args": {}, "pixels.size": 64, "train.epochs": 1,
                        "model.drop_rate": 0.0, "optim.ema": 0})  # fmt: skip
        assert fit.step.model.aux_weights == (0.3, 0.3)
        aux = {n: p.detach().clone() for n, p in fit.step.model.named_parameters() if "aux" in n}
        fit.run()
        assert aux
        assert not any(torch.equal(p, aux[n]) for n, p in fit.step.model.named_parameters() if n in aux)
        assert len(fit.run_.epochs) == 1

    @pytest.mark.slow
    def test_a_compiled_network_trains_to_nearly_the_same_loss(self, make_fit: MakeFit) -> None:
        losses = []
        for compiled in (False, True):
            fit = make_fit({"train.compile": compiled, "train.epochs": 1, "model.drop_rate": 0.0})
            fit.run()
            losses.append(fit.run_.epochs[0]["train_loss"])
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_what_identifies_a_run_is_looked_up_once_however_many_checkpoints_it_writes(
    make_fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from imgcls_fast.training import saves as module

    asked: list[str] = []
    for name in ("trajectory", "environment_key"):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, name=name, original=original: (asked.append(name), original(*a))[1]
        )
    make_fit({"train.save_every": 0, "train.epochs": 1}).run()
    assert sorted(asked) == ["environment_key", "trajectory"]


def test_the_undo_of_a_batch_copies_each_dtype_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from imgcls_fast.training.rewind import Rewind

    network = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2))
    rewind, original, calls = Rewind(network), torch._foreach_copy_, list[set[torch.dtype]]()

    def copying(into: list[torch.Tensor], source: list[torch.Tensor]) -> None:
        calls.append({tensor.dtype for tensor in [*into, *source]})
        original(into, source)

    monkeypatch.setattr(torch, "_foreach_copy_", copying)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rewind.keep()
    assert calls == [{torch.float32}, {torch.int64}]
    network(torch.randn(4, 2))
    rewind.restore()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
