"""One optimizer step: forward and backward in parts, halving when memory runs out, clipping, update, averaging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import Batch
from ..core.config import RunConfig
from ..core.errors import ModelError
from ..engines.torch_runtime import AUTOCAST
from ..loading.sampler import forward_passes
from ..models.build import Classifier
from ..tracking.events import Emit, Warned
from .checkpoint import optimizer_tensors, random_states, restore_optimizer, restore_random_states
from .objectives import Objective
from .optim import Averaged, build_optimizer
from .rewind import Rewind
from .schedule import Schedule, set_rates


class Step:
    """Takes optimizer steps; owns everything that they change, and carries it through a checkpoint.

    Args:
        model: on its device, in training mode when `take` is called.
        config: resolved.
        objective: what is minimised.
        steps_per_epoch: optimizer steps.
        emit: receives a warning when memory runs out.
    """

    def __init__(
        self,
        model: Classifier,
        config: RunConfig,
        objective: Objective,
        steps_per_epoch: int,
        emit: Emit,
    ) -> None:
        optim, train = config.optim, config.train
        self.model, self.config, self.objective, self._emit = model, config, objective, emit
        self.device = torch.device(train.device)
        self.images_needed, self.rewind = model.images_needed, Rewind(model)
        self.schedule = Schedule(optim, steps_per_epoch, int(train.epochs))
        self.optimizer = build_optimizer(model, optim, self.device)
        self.averaged = Averaged(model, float(optim.ema)) if optim.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")
        self.forward: Any = torch.compile(model) if train.compile else model
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.micro_batch = int(train.micro_batch)  # images per forward pass; halved when memory runs out
        several = len(objective.terms)
        self._shape = (several,) if several > 1 else ()  # one number per task
        self.loss_sum = torch.zeros(self._shape, dtype=torch.float32, device=self.device)  # of this epoch
        self.loss_weight = torch.zeros(self._shape, dtype=torch.float64)
        self.images = 0  # of this epoch, that counted

    # state
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the next step depends on: tensors by name, and what JSON can hold."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.averaged:
            tensors |= {f"ema.{name}": value for name, value in self.averaged.model.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer, self.names) | random_states()
        tensors |= {"sum.loss": self.loss_sum, "sum.weight": self.loss_weight}
        return tensors, {
            "micro_batch": self.micro_batch,
            "images": self.images,
            "schedule": dict(self.schedule.state),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        _copy_into(self.model, tensors, "model.")
        if self.averaged:
            _copy_into(self.averaged.model, tensors, "ema.")
        restore_optimizer(self.optimizer, self.names, tensors)
        self.micro_batch, self.images = facts["micro_batch"], facts["images"]
        self.schedule.state.update(facts["schedule"])
        self.scaler.load_state_dict(facts["scaler"])
        self.loss_sum.copy_(tensors["sum.loss"])
        self.loss_weight.copy_(tensors["sum.weight"])
        restore_random_states(tensors)

    # of an epoch
    def begin_epoch(self) -> None:
        """Forget the loss and the images of the epoch before."""
        self.loss_sum.zero_()
        self.loss_weight.zero_()
        self.images = 0

    @property
    def loss(self) -> float:
        """Loss of the epoch so far, as validation reports it: the mean over tasks with an answer of their means. Waits for the device."""
        means, seen = self.loss_sum.cpu().double() / self.loss_weight.clamp(min=1e-12), self.loss_weight > 0
        return float((means[seen] if seen.any() else means).mean())

    def is_finite(self) -> bool:
        """Whether the loss and every weight are numbers: a finite loss can hide a gradient that was not."""
        if not math.isfinite(float(self.loss_sum.sum())):
            return False
        norms = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        return math.isfinite(float(torch.stack([norm.float() for norm in norms]).sum()))

    # the step
    def take(self, batch: Batch, number: int) -> float:
        """Take optimizer step `number` (from 0) on one batch; returns the learning rate. No host sync."""
        lr = set_rates(self.optimizer, self.schedule, number)
        good = int((batch.weight > 0).sum())
        if good < self.images_needed:  # the others are bad: nothing to learn from, or a lone image for a batch norm
            return lr
        totals = self.objective.totals(batch.targets, batch.weight)
        if not any(totals):  # no answer to anything is known
            return lr
        self.images += good
        self.loss_sum += self.gradients(batch, totals)
        self.loss_weight += torch.tensor(totals, dtype=torch.float64).reshape(self._shape)
        if self.config.optim.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged:
            self.averaged.update(number)
        return lr

    def gradients(self, batch: Batch, totals: Sequence[float]) -> Tensor:
        """Accumulate the gradient of the batch's loss; returns the weighted sum of each task's losses.

        When memory runs out the micro-batch is halved, for good, and the batch is done again as if it had not been begun.

        Raises:
            ModelError: H002 when the smallest part does not fit into memory.
        """
        self.rewind.keep()
        while True:
            try:
                return self._accumulate(batch, totals)
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
            self.micro_batch = smaller
            torch.cuda.empty_cache()
            text = f"out of memory: from here on {smaller} images per forward pass; the batch size stays"
            self._emit(Warned(event="warning", text=text))

    def _smaller_parts(self, size: int) -> int | None:
        """Return half the images per forward pass, or None where a batch cannot be cut further."""
        needed, micro = self.images_needed, self.micro_batch
        before = len(forward_passes(size, micro, needed))
        while micro > 1:
            micro = (micro + 1) // 2
            parts = forward_passes(size, micro, needed)
            if len(parts) > before:
                return max(part.stop - part.start for part in parts)
        return None

    def _accumulate(self, batch: Batch, totals: Sequence[float]) -> Tensor:
        summed = torch.zeros_like(self.loss_sum)
        for part in forward_passes(len(batch), self.micro_batch, self.images_needed):
            pixels, targets, weight = (
                x[part].to(self.device, non_blocking=True) for x in (batch.pixels, batch.targets, batch.weight)
            )
            with self._autocast():
                outputs = self.forward(pixels)
            logits, *aux = outputs if isinstance(outputs, tuple) else (outputs,)
            sums = self.objective.sums(logits, targets, weight)
            summed += torch.stack(sums).detach().reshape(self._shape)
            for share, extra in zip(self.model.aux_weights, aux, strict=False):
                further = self.objective.sums(extra, targets, weight)
                sums = [one + share * other for one, other in zip(sums, further, strict=True)]
            self.scaler.scale(self.objective.mean(sums, totals)).backward()
        return summed

    def _autocast(self) -> torch.autocast:
        precision = self.config.train.precision
        return torch.autocast(self.device.type, AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)


def _copy_into(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    """Load in place, so that parameters keep their identity and memory format."""
    state = module.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(tensors[prefix + name])
