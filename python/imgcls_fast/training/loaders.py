"""The two loaders of a run: training and validation images, without the rows found bad."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..core.manifest import Manifest
from ..loading.backend import Loader
from ..loading.loader import open_loader
from ..loading.sampler import Sampler
from .plan import Plan


class Loaders:
    """Opens the loaders of a run, and opens them again when it is known which rows are bad.

    Args:
        plan: resolved.
        manifest: images and splits.
        on_bad: receives row, reason and epoch of an image that cannot be decoded.
    """

    def __init__(self, plan: Plan, manifest: Manifest, on_bad: Callable[[int, str, int], None]) -> None:
        self._plan, self._manifest, self._on_bad = plan, manifest, on_bad
        self.train, self.val = self._open("train", {}), self._open("val", {})

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return self.train.sampler.steps

    def reopen(self, bad: Mapping[str, str]) -> None:
        """Leave out `bad` (row -> reason) from now on."""
        self.close()
        self.train, self.val = self._open("train", bad), self._open("val", bad)

    def hurry(self) -> None:
        """Give up waiting for files; called by a signal handler."""
        self.train.hurry()
        self.val.hurry()

    def close(self) -> None:
        """End the workers of both."""
        self.train.close()
        self.val.close()

    def _open(self, split: str, bad: Mapping[str, str]) -> Loader:
        config, training = self._plan.config, split == "train"
        sampler = Sampler(
            self._manifest,
            self._manifest.rows(split),
            self._plan.pixels,
            int(config.train.batch_size if training else config.evaluate.batch_size),
            seed=config.train.seed,
            augment=self._plan.augment if training else None,
        )
        return open_loader(
            sampler,
            config.train.loader,
            workers=int(config.train.workers),
            bad={int(row): reason for row, reason in bad.items()},
            on_bad=self._on_bad,
            device=str(config.train.device),
        )
