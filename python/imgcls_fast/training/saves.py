"""The checkpoints of one run: when they are written, with what beside the tensors, and which one is continued from."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

from ..core.manifest import Manifest
from ..core.run import Run
from ..tracking.events import CheckpointSaved, Emit
from .checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from .identity import LOST, environment_key, trajectory, what_differs
from .plan import Plan
from .progress import Progress
from .step import Step


class Saves:
    """Writes and finds the checkpoints of a run.

    Args:
        plan: resolved.
        manifest: images and splits.
        run: the directory, locked by this process.
        emit: receives an event per checkpoint.
    """

    def __init__(self, plan: Plan, manifest: Manifest, run: Run, emit: Emit) -> None:
        self._plan, self._manifest, self._run, self._emit = plan, manifest, run, emit
        self._at = time.monotonic()
        self.step = 0  # optimizer steps in the newest checkpoint
        self.differences: list[str] = []  # between the process that wrote the checkpoint found and this one

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint records beside its tensors; training changes none of it."""
        train = self._plan.config.train
        key = environment_key(int(train.threads), self._plan.config.model.kernels, str(train.device))
        return key | {"trajectory": trajectory(self._plan, self._manifest)}

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest intact checkpoint, if one was written, and what the user should know.

        Raises:
            ModelError: M005 when no checkpoint is intact, M006 when the run would not be the same run.
        """
        found = find_checkpoint(self._run.checkpoints)
        if found is None:
            return None, ["no checkpoint was written yet: starting at the beginning"]
        path, saved, wrong = found
        notes = [f"{text}; using {path.name}" for text in wrong]
        self.differences = what_differs(saved.environment, self._identity, self._run, path)
        notes += [f"{'; '.join(self.differences)}: {LOST}"] if self.differences else []
        self.step = saved.progress.step
        return saved, notes

    def due(self) -> bool:
        """Whether the newest one is older than `train.save_every`."""
        return time.monotonic() - self._at > self._plan.config.train.save_every

    def write(self, progress: Progress, step: Step, *, best: bool) -> None:
        """Write a checkpoint of this step boundary, also as the best one with `best`."""
        tensors, facts = step.state()
        saved = Checkpoint(tensors, progress, self._identity, {"step": facts})
        path = save_checkpoint(self._run.checkpoints, saved, best=best)
        self._at, self.step = time.monotonic(), progress.step
        self._emit(CheckpointSaved(event="checkpoint", path=str(path), epoch=progress.epoch, step=progress.step))
