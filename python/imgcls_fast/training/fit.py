"""The training loop, in the order in which things happen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ..core.batch import Batch
from ..core.errors import DataError, ImgclsError, Interrupted, ModelError
from ..core.manifest import Manifest
from ..core.run import Run
from ..engines.scoring import predict
from ..engines.torch_runtime import AUTOCAST, TorchEngine
from ..evaluation.metrics import Metrics, judge
from ..loading.backend import Loader
from ..loading.loader import open_loader
from ..loading.sampler import Sampler, forward_passes
from ..models.build import Classifier
from ..models.kernels import use_kernels
from ..tracking.events import (
    CheckpointSaved,
    Emit,
    EpochDone,
    ImageLeftOut,
    Started,
    Stepped,
    Stopped,
    Validating,
    Warned,
    event_of,
)
from . import checkpoint
from .checkpoint import Progress
from .crowding import Crowd
from .identity import LOST, environment_key, trajectory, what_differs
from .objectives import CrossEntropy, class_weights
from .optim import Averaged, Schedule, build_optimizer, set_rates
from .plan import Plan, Start, starting_model
from .progress import Pace, end_epoch, how_it_ended, memory_mb
from .quarantined import Quarantined, require_same_validation
from .rewind import Rewind
from .signals import StopRequest


class Fit:
    """One training run: build, restore, loop. Nothing of it survives `run`; what counts is in the checkpoints.

    Args:
        plan: resolved.
        manifest: images and splits.
        run: the directory, locked by this process.
        emit: receives events.
    """

    def __init__(self, plan: Plan, manifest: Manifest, run: Run, emit: Emit) -> None:
        self.plan, self.manifest, self.run_directory, self.emit = plan, manifest, run, emit
        self.config = plan.config
        train = self.config.train
        self.device = torch.device(train.device)
        if self.device.type == "cpu":
            torch.set_num_threads(int(train.threads))
        torch.use_deterministic_algorithms(train.deterministic)
        torch.manual_seed(train.seed)
        self.model = self._build_model()
        torch.manual_seed((train.seed + 1) % 2**64)  # dropout does not depend on how many numbers initialisation took
        self.images_needed, self.rewind = self.model.images_needed, Rewind(self.model)
        self.progress = Progress(micro_batch=int(train.micro_batch))
        self.quarantined = Quarantined(run, manifest, self.config.data.max_bad)
        self.train_loader = self._loader("train")
        self.steps = self.train_loader.sampler.steps
        self.val_loader = self._loader("val")
        self.schedule = Schedule(self.config.optim, self.steps, int(train.epochs))
        self.optimizer = build_optimizer(self.model, self.config.optim, self.device)
        weights = class_weights(self.config.loss, manifest.labels.classes, manifest.counts("train"))
        self.objective = CrossEntropy(float(self.config.loss.label_smoothing), weights, self.device)
        self.averaged = Averaged(self.model, float(self.config.optim.ema)) if self.config.optim.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")
        self.forward: Any = torch.compile(self.model) if train.compile else self.model
        judged = self.averaged.model if self.averaged else self.model
        asked: Any = torch.compile(judged) if train.compile else judged
        self.engine = TorchEngine(
            asked,
            manifest.labels, plan.pixels, device=self.device, precision=train.precision,
        )  # fmt: skip
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
        self.loss_weight = 0.0
        self._saved_at = self._shown_at = time.monotonic()
        self.pace = Pace()
        self.crowd = Crowd(self.device.type, int(train.threads), run.resume_command)
        self._saved_step = 0  # of the newest checkpoint
        self.differences: list[str] = []  # between the process that wrote the restored checkpoint and this one
        self._whole = True  # between two steps, where a checkpoint can be written

    def _build_model(self) -> Classifier:
        # a checkpoint holds every weight: the file that the run began with need not exist any more
        start = Start("scratch") if checkpoint.has_checkpoint(self.run_directory.checkpoints) else self.plan.start
        model = starting_model(self.plan.spec, start, self.manifest.labels)
        freeze = self.config.model.freeze
        if freeze != "none":
            model.freeze(freeze)
        use_kernels(model, self.config.model.kernels)
        if self.config.train.memory_format == "contiguous":
            model.lay_out("contiguous")
        return model.to(self.device)

    def _loader(self, split: str) -> Loader:
        train = self.config.train
        training = split == "train"
        sampler = Sampler(
            self.manifest,
            self.manifest.rows(split),
            self.plan.pixels,
            int(train.batch_size if training else self.config.evaluate.batch_size),
            seed=train.seed,
            augment=self.plan.augment if training else None,
        )
        bad = {int(row): reason for row, reason in self.progress.quarantined.items()}
        return open_loader(
            sampler,
            train.loader,
            workers=int(train.workers),
            bad=bad,
            on_bad=self._on_bad,
            device=str(self.device),
        )

    def _on_bad(self, row: int, reason: str, epoch: int) -> None:
        if self.progress.history:
            require_same_validation(self.run_directory, self.manifest, row, reason)
        self.progress.quarantined[str(row)] = reason
        path = self.manifest.paths[row]
        self.emit(ImageLeftOut(event="quarantine", path=path, reason=reason, epoch=epoch + 1, row=row))
        self.quarantined.add(row, reason, f"epoch {epoch + 1}")

    # state
    def restore(self) -> list[str]:
        """Continue from the newest intact checkpoint, if there is one; returns what the user should know.

        Raises:
            ModelError: M005 when no checkpoint is intact, M006 when the run would not be the same run.
            DataError: D013 when too many images are quarantined.
        """
        self.quarantined.require_few()
        found = checkpoint.find_checkpoint(self.run_directory.checkpoints)
        late = {str(row): reason for row, reason in self.quarantined.rows().items()}
        if found is None:
            self.progress.quarantined = late
            self._reopen()
            return ["no checkpoint was written yet: starting at the beginning"]
        path, (tensors, progress, environment), wrong = found
        notes = [f"{text}; using {path.name}" for text in wrong]
        self.differences = what_differs(environment, self._identity, self.run_directory, path)
        notes += [f"{'; '.join(self.differences)}: {LOST}"] if self.differences else []
        self.progress = progress
        progress.quarantined = late | progress.quarantined  # those found between the checkpoint and the end stay out
        self._saved_step = progress.step
        self.run_directory.write_epochs(progress.history)  # a process killed after its last checkpoint has not done so
        self._reopen()
        _copy_into(self.model, tensors, "model.")
        if self.averaged:
            _copy_into(self.averaged.model, tensors, "ema.")
        checkpoint.restore_optimizer(self.optimizer, self.names, tensors)
        self.schedule.state.update(progress.schedule)
        self.scaler.load_state_dict(progress.scaler)
        self.loss_sum.copy_(tensors["sum.loss"])
        self.loss_weight = float(tensors["sum.weight"])
        checkpoint.restore_random_states(tensors)
        return notes

    def _reopen(self) -> None:
        """Loaders that know which rows are bad."""
        for loader in (self.train_loader, self.val_loader):
            loader.close()
        self.train_loader, self.val_loader = self._loader("train"), self._loader("val")

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint records beside its tensors; a `Fit` changes none of it."""
        key = environment_key(int(self.config.train.threads), self.config.model.kernels, str(self.device))
        return key | {"trajectory": trajectory(self.plan, self.manifest)}

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint of this step boundary."""
        if not math.isfinite(float(self.loss_sum)) or not _finite(self.model):
            self._diverged()
        self.progress.spent = self.pace.seconds
        self.progress.schedule = dict(self.schedule.state)
        self.progress.scaler = self.scaler.state_dict()
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.averaged:
            tensors |= {f"ema.{name}": value for name, value in self.averaged.model.state_dict().items()}
        tensors |= checkpoint.optimizer_tensors(self.optimizer, self.names) | checkpoint.random_states()
        tensors |= {"sum.loss": self.loss_sum, "sum.weight": torch.tensor(self.loss_weight, dtype=torch.float64)}
        folder = self.run_directory.checkpoints
        path = checkpoint.save_checkpoint(folder, tensors, self.progress, self._identity, best=best)
        self._saved_at, self._saved_step = time.monotonic(), self.progress.step
        done = self.progress
        self.emit(CheckpointSaved(event="checkpoint", path=str(path), epoch=done.epoch, step=done.step))

    # the loop
    def run(self) -> None:
        """Train until the last epoch, early stopping, or a signal.

        Raises:
            Interrupted: X130, after a checkpoint was written.
            ModelError: M008 when the loss is not finite.
            DataError: D015 when images cannot be reached, D013 when too many are bad, D010 when a validation image went bad.
        """
        epochs = int(self.config.train.epochs)
        progress = self.progress
        begun_with = progress.epoch
        self.emit(
            Started(
                event="start",
                epoch=progress.epoch + 1,
                epochs=epochs,
                steps_per_epoch=self.steps,
                resumed=progress.step > 0,
                step=progress.step,
                batch=progress.index,
                monitor=self.config.train.monitor,
                patience=self.config.train.patience,
            )
        )
        try:
            with StopRequest(self._hurry) as stop, self._saved_when_it_fails():
                while progress.epoch < epochs and not self._patience_is_over():
                    self._epoch_or_stop(stop)
                if begun_with < progress.epoch < epochs:  # a run that only has to be judged has told it before
                    self.emit({"event": "stopped_early", **how_it_ended(self.config.train, progress.history)})
                if stop.requested:  # it came after the last step
                    self._interrupt()
        finally:
            self.train_loader.close()
            self.val_loader.close()

    @contextmanager
    def _saved_when_it_fails(self) -> Iterator[None]:
        """After an error between two steps, write a checkpoint; in the middle of one the weights cannot be trusted."""
        try:
            yield
        except BaseException as error:
            hopeless = isinstance(error, ModelError) and error.code == "M008"  # or somebody who wants an end at once
            if self._whole and self.progress.step > self._saved_step and isinstance(error, Exception) and not hopeless:
                with suppress(ImgclsError, RuntimeError, MemoryError):  # a full disk, a GPU that answers no more
                    self.save()
            raise

    def _hurry(self) -> None:
        """Called by a signal handler: a loader that waits for files gives up."""
        self.train_loader.hurry()
        self.val_loader.hurry()

    def _epoch_or_stop(self, stop: StopRequest) -> None:
        try:
            self._epoch(stop)
        except DataError as error:
            if error.code == "D015" and stop.requested:
                self._interrupt()
            raise

    def _patience_is_over(self) -> bool:
        patience = self.config.train.patience
        return patience is not None and self.progress.wait >= patience and self.progress.index == 0

    def _epoch(self, stop: StopRequest) -> None:
        progress = self.progress
        self.pace.begin(progress.spent)
        self.model.train()
        for batch in self.pace.waiting(self.train_loader.epoch(progress.epoch, progress.index)):
            self._whole = False
            lr = self._step(batch)
            progress.index += 1
            progress.step += 1
            self._whole = True
            if stop.requested:
                self._interrupt()
            if time.monotonic() - self._saved_at > self.config.train.save_every:
                self.save()
            self._show(lr)
        metrics = self._validate(stop)
        seconds = self.pace.seconds
        self._whole = False  # until all that an epoch's end changes has been saved
        progress.seconds += seconds
        self._finish_epoch(metrics, seconds)

    def _step(self, batch: Batch) -> float:
        """One optimizer step on one batch; returns the learning rate. No host sync."""
        lr = set_rates(self.optimizer, self.schedule, self.progress.step)
        good = int((batch.weight > 0).sum())
        if good < self.images_needed:  # the others are bad: nothing to learn from, or a lone image for a batch norm
            return lr
        total = self.objective.total(batch.targets, batch.weight)
        self.pace.images += good
        self.progress.images += good
        self.loss_sum += self._gradients(batch, total)
        self.loss_weight += total
        if self.config.optim.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged:
            self.averaged.update(self.progress.step)
        return lr

    def _gradients(self, batch: Batch, total: float) -> Tensor:
        """Accumulate the gradient of the batch's mean loss; returns the sum of its row losses.

        When memory runs out the micro-batch is halved, for good, and the batch is done again as if it had not been begun.
        """
        self.rewind.keep()
        while True:
            try:
                return self._accumulate(batch, total)
            except torch.OutOfMemoryError as error:
                smaller = self._smaller_parts(len(batch))
                if smaller is None:
                    raise ModelError(
                        "H002",
                        f"{self.images_needed} image{'s' * (self.images_needed > 1)} at a time do not fit into memory: {error}",
                        try_="--img-size 160   (or a smaller --model)",
                    ) from error
            self.optimizer.zero_grad(set_to_none=True)
            self.rewind.restore()
            self.progress.micro_batch = smaller
            torch.cuda.empty_cache()
            text = f"out of memory: from here on {smaller} images per forward pass; the batch size stays"
            self.emit(Warned(event="warning", text=text))

    def _smaller_parts(self, size: int) -> int | None:
        """Half the images per forward pass, or None where a batch cannot be cut further."""
        needed = self.images_needed
        before = len(forward_passes(size, self.progress.micro_batch, needed))
        micro = self.progress.micro_batch
        while micro > 1:
            micro = (micro + 1) // 2
            parts = forward_passes(size, micro, needed)
            if len(parts) > before:
                return max(part.stop - part.start for part in parts)
        return None

    def _accumulate(self, batch: Batch, total: float) -> Tensor:
        summed = torch.zeros_like(self.loss_sum)
        for part in forward_passes(len(batch), self.progress.micro_batch, self.images_needed):
            pixels, targets, weight = (
                x[part].to(self.device, non_blocking=True) for x in (batch.pixels, batch.targets, batch.weight)
            )
            with self._autocast():
                outputs = self.forward(pixels)
            logits, *aux = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = self.objective.sum(logits, targets, weight)
            summed += loss.detach()
            for share, extra in zip(self.model.aux_weights, aux, strict=False):
                loss = loss + share * self.objective.sum(extra, targets, weight)
            self.scaler.scale(loss / total).backward()
        return summed

    def _autocast(self) -> torch.autocast:
        precision = self.config.train.precision
        return torch.autocast(self.device.type, AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)

    def _validate(self, stop: StopRequest) -> Metrics:
        total = len(self.val_loader.sampler.rows)

        def progress(done: int) -> None:
            if stop.requested:
                self._interrupt()
            self.emit(Validating(event="validate", epoch=self.progress.epoch + 1, done=done, total=total))

        batches = self.val_loader.epoch(self.progress.epoch)
        predictions = predict(self.engine, batches, paths=self.manifest.paths, progress=progress)
        if not np.isfinite(predictions.scores).all():
            self._diverged()
        return judge(predictions, top_k=(1,), bootstrap=0)

    def _finish_epoch(self, metrics: Metrics, seconds: float) -> None:
        progress, train = self.progress, self.config.train
        record, value, delta = end_epoch(progress, train.monitor, metrics, {
            "train_loss": float(self.loss_sum) / max(self.loss_weight, 1e-12),
            "lr": self.schedule.lr(max(0, progress.step - 1)),
            "images": progress.images,
            "images_per_s": round(self.pace.images_per_s, 1),
            "data_share": round(self.pace.data_share, 4),
            "memory_mb": memory_mb(self.device),
            "seconds": round(seconds, 3),
        })  # fmt: skip
        best = bool(record["best"])
        self.schedule.after_epoch(value)
        progress.epoch, progress.index, progress.images = progress.epoch + 1, 0, 0
        self.loss_sum.zero_()
        self.loss_weight = 0.0
        self.pace.begin(0.0)
        self.save(best=best)
        self._whole = True
        self.run_directory.write_epochs(progress.history)
        left = int(train.epochs) - progress.epoch
        more = {
            "event": "epoch",
            "epochs": int(train.epochs),
            "best": best,
            "monitor": train.monitor,
            "eta_s": left * progress.seconds / max(progress.epoch, 1),
            "delta": delta,
        }
        self.emit(event_of(EpochDone, {**record, **more}))

    def _show(self, lr: float) -> None:
        """A look at the loss, at most every `log_every` seconds: the only point where the host waits for the device."""
        now = time.monotonic()
        if now - self._shown_at < self.config.train.log_every:
            return
        self._shown_at = now
        loss = float(self.loss_sum) / max(self.loss_weight, 1e-12)
        if not math.isfinite(loss):
            self._diverged()
        progress, rate = self.progress, self.pace.images_per_s
        left = self.steps - progress.index + self.steps * (int(self.config.train.epochs) - progress.epoch - 1)
        self.emit(
            Stepped(
                event="progress",
                epoch=progress.epoch + 1,
                epochs=int(self.config.train.epochs),
                step=progress.index,
                steps=self.steps,
                loss=loss,
                lr=lr,
                images_per_s=rate,
                data_share=self.pace.data_share,
                eta_s=left * int(self.config.train.batch_size) / max(rate, 1e-9),
            )
        )
        if crowded := self.crowd.look(progress.step * int(self.config.train.batch_size)):
            self.emit(Warned(event="warning", text=crowded))

    def _interrupt(self) -> None:
        self.save()
        command = self.run_directory.resume_command
        path = str(self.run_directory.checkpoints / "last")
        self.emit(Stopped(event="interrupted", command=command, path=path))
        progress = self.progress
        ended = progress.epoch == self.config.train.epochs
        raise Interrupted(
            "X130",
            (
                "stopped after the last epoch"
                if ended
                else f"stopped at epoch {progress.epoch + 1}, batch {progress.index} of {self.steps}"
            )
            + "; the work is saved",
            where=str(self.run_directory.checkpoints / "last"),
            try_=command,
        )

    def _diverged(self) -> NoReturn:
        last = self.run_directory.checkpoints / "last"
        raise ModelError(
            "M008",
            f"training diverged in epoch {self.progress.epoch + 1}: the loss is not finite",
            why=f"learning rate {self.schedule.lr(self.progress.step):g}, precision {self.config.train.precision}",
            where=f"the last good checkpoint is {last}" if last.exists() else "before the first checkpoint",
            try_=f"--lr {float(self.config.optim.lr) / 5:g}   (or --clip 1.0, or --precision fp32)",
        )


def _finite(model: nn.Module) -> bool:
    """Whether every weight is a number: a finite loss can hide a gradient that was not."""
    norms = torch._foreach_norm([p.detach() for p in model.parameters()])
    return math.isfinite(float(torch.stack([norm.float() for norm in norms]).sum()))


def _copy_into(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    """Load in place, so that parameters keep their identity and memory format."""
    state = module.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(tensors[prefix + name])


def final_state(run: Run) -> tuple[dict[str, Tensor], Progress]:
    """The weights that a run is judged by: of its best epoch, averaged ones where averaging is on.

    Raises:
        ModelError: M005 when there is no intact best checkpoint.
    """
    tensors, progress, _ = checkpoint.read_checkpoint(run.checkpoints / "best")
    prefix = "ema." if any(name.startswith("ema.") for name in tensors) else "model."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}, progress
