"""The training loop: epochs, in the order in which things happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import numpy as np
import torch

from ..core.batch import Batch
from ..core.errors import DataError, ImgclsError, Interrupted, ModelError
from ..core.manifest import Manifest
from ..core.run import Run
from ..engines.scoring import predict
from ..engines.torch_runtime import TorchEngine
from ..evaluation.metrics import Metrics
from ..evaluation.tasks import TaskMetrics, judge_all
from ..models.build import Classifier
from ..models.kernels import use_kernels
from ..tracking.events import Emit, EpochDone, ImageLeftOut, Stopped, StoppedEarly, Validating, event_of
from .checkpoint import has_checkpoint
from .display import Display
from .loaders import Loaders
from .objectives import Objective, class_weights
from .plan import Plan, Start, starting_model
from .progress import (
    Pace,
    Progress,
    ShouldStop,
    caller_stops,
    end_epoch,
    how_it_ended,
    memory_mb,
    patience_is_over,
    started,
)
from .quarantined import Quarantined, require_same_validation
from .saves import Saves
from .signals import StopRequest
from .step import Step


class Fit:
    """Runs one training: builds, restores, loops. Holds no state after `run`: everything needed to continue is in the checkpoints.

    Args:
        plan: resolved.
        manifest: images and splits.
        run: the directory, locked by this process.
        emit: receives events.
        should_stop: asked after every epoch but the last, with its row of metrics.csv; True ends training there.
    """

    def __init__(self, plan: Plan, manifest: Manifest, run: Run, emit: Emit, should_stop: ShouldStop | None = None) -> None:
        self.plan, self.manifest, self.run_, self.emit, self.should_stop = plan, manifest, run, emit, should_stop
        self.config, train = plan.config, plan.config.train
        device = torch.device(train.device)
        if device.type == "cpu":
            torch.set_num_threads(int(train.threads))
        torch.use_deterministic_algorithms(train.deterministic)
        torch.manual_seed(train.seed)
        # a checkpoint holds every weight: the file that the run began with need not exist any more
        model = build_network(plan, manifest, begun=has_checkpoint(run.checkpoints))
        torch.manual_seed((train.seed + 1) % 2**64)  # dropout does not depend on how many numbers initialisation took
        self.progress = Progress()
        self.quarantined = Quarantined(run, manifest, self.config.data.max_bad)
        self.loaders = Loaders(plan, manifest, self._on_bad)
        counts = manifest.counts("train"), manifest.known_counts("train")
        weights = class_weights(self.config.loss, manifest.labels, *counts)
        objective = Objective(manifest.labels, self.config.loss, weights, device)
        self.step = Step(model, self.config, objective, self.loaders.steps, emit)
        judged = self.step.averaged.model if self.step.averaged else model
        asked: Any = torch.compile(judged) if train.compile else judged
        self.engine = TorchEngine(asked, manifest.labels, plan.pixels, device=device, precision=train.precision)
        self.pace = Pace()
        self.saves = Saves(plan, manifest, run, emit)
        self.display = Display(train, self.loaders.steps, run.resume_command, emit)
        self._whole = True  # between two steps, where a checkpoint can be written

    def _on_bad(self, row: int, reason: str, epoch: int) -> None:
        if self.progress.history:
            require_same_validation(self.run_, self.manifest, row, reason)
        self.progress.quarantined[str(row)] = reason
        path = self.manifest.paths[row]
        self.emit(ImageLeftOut(event="quarantine", path=path, reason=reason, epoch=epoch + 1, row=row))
        self.quarantined.add(row, reason, f"epoch {epoch + 1}")

    def restore(self) -> list[str]:
        """Continue from the newest intact checkpoint, if there is one; returns what the user should know.

        Raises:
            ModelError: M005 when no checkpoint is intact, M006 when the run would not be the same run.
            DataError: D013 when too many images are quarantined.
        """
        self.quarantined.require_few()
        saved, notes = self.saves.newest()
        if saved:
            self.progress = saved.progress
            self.run_.write_epochs(saved.progress.history)  # a process killed after its last checkpoint has not done so
        late = {str(row): reason for row, reason in self.quarantined.rows().items()}
        self.progress.quarantined = late | self.progress.quarantined  # found since the checkpoint: they stay out
        self.loaders.reopen(self.progress.quarantined)
        if saved:
            self.step.restore(saved.tensors, saved.parts["step"])
        return notes

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint of this step boundary.

        Raises:
            ModelError: M008 when the loss or a weight is not finite.
        """
        if not self.step.is_finite():
            raise diverged(self.plan, self.run_, self.progress, self.step)
        self.progress.spent = self.pace.seconds
        self.saves.write(self.progress, self.step, best=best)

    # the loop
    def run(self) -> None:
        """Train until the last epoch, early stopping, or a signal.

        Raises:
            Interrupted: X130, after a checkpoint was written.
            ModelError: M008 when the loss is not finite.
            DataError: D015 when images cannot be reached, D013 when too many are bad, D010 when a validation image went bad.
        """
        train, progress = self.config.train, self.progress
        begun_with, by_caller = progress.epoch, False
        self.emit(started(train, progress, self.loaders.steps))
        try:
            with StopRequest(self.loaders.hurry) as stop, self._saved_when_it_fails(stop):
                while progress.epoch < int(train.epochs) and not patience_is_over(train, progress):
                    if by_caller := caller_stops(self.should_stop, progress):
                        break
                    self._epoch(stop)
                if begun_with < progress.epoch < int(train.epochs):  # a run that only has to be judged has told it before
                    ended = how_it_ended(train, progress.history, by_caller=by_caller)
                    self.emit(StoppedEarly(event="stopped_early", **ended))
                if stop.requested:  # it came after the last step
                    self._interrupt()
        finally:
            self.loaders.close()

    @contextmanager
    def _saved_when_it_fails(self, stop: StopRequest) -> Iterator[None]:
        """After an error between two steps, write a checkpoint; in the middle of one the weights cannot be trusted."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, DataError) and error.code == "D015" and stop.requested:  # it gave up waiting for files
                self._interrupt()
            hopeless = isinstance(error, ModelError) and error.code == "M008"  # or somebody who wants an end at once
            if self._whole and self.progress.step > self.saves.step and isinstance(error, Exception) and not hopeless:
                with suppress(ImgclsError, RuntimeError, MemoryError):  # a full disk, a GPU that answers no more
                    self.save()
            raise

    def _epoch(self, stop: StopRequest) -> None:
        progress = self.progress
        self.pace.begin(progress.spent)
        self.step.model.train()
        for batch in self.pace.waiting(self.loaders.train.epoch(progress.epoch, progress.index)):
            self._whole = False
            lr = self._learn(batch)
            self._whole = True
            if stop.requested:
                self._interrupt()
            if self.saves.due():
                self.save()
            if not self.display.show(progress, self.pace, self.step, lr):
                raise diverged(self.plan, self.run_, progress, self.step)
        metrics = self._validate(stop)
        seconds = self.pace.seconds
        self._whole = False  # until all that an epoch's end changes has been saved
        progress.seconds += seconds
        self._finish_epoch(metrics, seconds)

    def _learn(self, batch: Batch) -> float:
        before = self.step.images
        lr = self.step.take(batch, self.progress.step)
        self.pace.images += self.step.images - before
        self.progress.index += 1
        self.progress.step += 1
        return lr

    def _validate(self, stop: StopRequest) -> Metrics | TaskMetrics:
        total = len(self.loaders.val.sampler.rows)

        def progress(done: int) -> None:
            if stop.requested:
                self._interrupt()
            self.emit(Validating(event="validate", epoch=self.progress.epoch + 1, done=done, total=total))

        batches = self.loaders.val.epoch(self.progress.epoch)
        predictions = predict(self.engine, batches, paths=self.manifest.paths, progress=progress)
        if not np.isfinite(predictions.scores).all():
            raise diverged(self.plan, self.run_, self.progress, self.step)
        return judge_all(predictions, top_k=(1,), bootstrap=0)

    def _finish_epoch(self, metrics: Metrics | TaskMetrics, seconds: float) -> None:
        progress, train, step = self.progress, self.config.train, self.step
        facts = {
            "train_loss": step.loss,
            "lr": step.schedule.lr(max(0, progress.step - 1)),
            "images": step.images,
            "images_per_s": round(self.pace.images_per_s, 1),
            "data_share": round(self.pace.data_share, 4),
            "memory_mb": memory_mb(step.device),
            "seconds": round(seconds, 3),
        }
        record, value, delta = end_epoch(progress, train.monitor, metrics, facts)
        best = bool(record["best"])
        step.schedule.after_epoch(value)
        progress.epoch, progress.index = progress.epoch + 1, 0
        step.begin_epoch()
        self.pace.begin(0.0)
        self.save(best=best)
        self._whole = True
        self.run_.write_epochs(progress.history)
        left = int(train.epochs) - progress.epoch
        eta_s = left * progress.seconds / max(progress.epoch, 1)
        more = {"event": "epoch", "epochs": int(train.epochs), "best": best, "monitor": train.monitor, "eta_s": eta_s}
        self.emit(event_of(EpochDone, {**record, **more, "delta": delta}))

    def _interrupt(self) -> NoReturn:
        """Save, and raise X130."""
        self.save()
        run, progress = self.run_, self.progress
        last, command = str(run.checkpoints / "last"), run.resume_command
        self.emit(Stopped(event="interrupted", command=command, path=last))
        at = f"stopped at epoch {progress.epoch + 1}, batch {progress.index} of {self.loaders.steps}"
        text = "stopped after the last epoch" if progress.epoch == self.config.train.epochs else at
        raise Interrupted("X130", f"{text}; the work is saved", where=last, try_=command)


def diverged(plan: Plan, run: Run, progress: Progress, step: Step) -> ModelError:
    """Return M008 for a loss or a weight that is not finite."""
    last, config = run.checkpoints / "last", plan.config
    return ModelError(
        "M008",
        f"training diverged in epoch {progress.epoch + 1}: the loss is not finite",
        why=f"learning rate {step.schedule.lr(progress.step):g}, precision {config.train.precision}",
        where=f"the last good checkpoint is {last}" if last.exists() else "before the first checkpoint",
        try_=f"--lr {float(config.optim.lr) / 5:g}   (or --clip 1.0, or --precision fp32)",
    )


def build_network(plan: Plan, manifest: Manifest, *, begun: bool) -> Classifier:
    """Build the network of a run on its device, frozen and laid out as the plan has it.

    Args:
        begun: a checkpoint holds every weight, so that those it began with are not read.
    """
    model = starting_model(plan.spec, Start("scratch") if begun else plan.start, manifest.labels)
    if plan.config.model.freeze != "none":
        model.freeze(plan.config.model.freeze)
    use_kernels(model, plan.config.model.kernels)
    if plan.config.train.memory_format == "contiguous":
        model.lay_out("contiguous")
    return model.to(plan.config.train.device)
