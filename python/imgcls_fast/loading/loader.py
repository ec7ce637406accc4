"""The contract of every loader backend, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from ..core.batch import Batch
from ..core.errors import ConfigError, HardwareError
from ..core.manifest import Manifest
from ..core.pixels import Pixels
from .sampler import Request, Sampler

BACKENDS = ("torch", "dali-cpu", "dali-gpu")
OnBad = Callable[[int, str, int], None]  # row, reason, epoch


class Loader(Protocol):
    """Delivers the batches of a Sampler, in order, as uint8 NHWC of constant size.

    A file that turns out to be undecodable keeps its place with weight 0 and row -1, is remembered in `bad`, and is
    reported once through the `on_bad` callback. It is never replaced by another image.

    A file that cannot be reached is not a bad file: it is tried again for some seconds, then `epoch` raises D015 in
    place of the batch, and nothing is remembered of it.
    """

    sampler: Sampler
    bad: dict[int, str]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from index `start` on."""
        ...

    def hurry(self) -> None:
        """Wait no more for files that are out of reach: D015 follows at once. A signal handler may call this."""
        ...

    def close(self) -> None:
        """Stop workers and free memory; the loader cannot be used afterwards."""
        ...


def make_batch(manifest: Manifest, request: Request, pixels: Any) -> Batch:
    """The Batch of a request whose pixels (B, H, W, C) uint8 are ready; CPU torch tensors, pixels on any device."""
    import torch

    known = np.where(request.rows >= 0, request.rows, 0)
    targets = manifest.targets(known) * request.weight[:, None]
    return Batch(
        pixels=torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels,
        targets=torch.from_numpy(targets),
        weight=torch.from_numpy(request.weight),
        rows=torch.from_numpy(request.rows),
    )


def dali_missing() -> str | None:
    """Why DALI cannot be used here, or None."""
    from importlib.util import find_spec

    return None if find_spec("nvidia") and find_spec("nvidia.dali") else "nvidia-dali-cuda130 is not installed"


def usual_loader(pixels: Pixels, device: str) -> str:
    """The loader for judging images that no run has planned for."""
    if dali_missing() or pixels.color == "rgba":
        return "torch"
    return "dali-cpu" if device == "cpu" else "dali-gpu"


def open_loader(
    sampler: Sampler,
    backend: str,
    *,
    workers: int,
    bad: dict[int, str] | None = None,
    on_bad: OnBad | None = None,
    device: str = "cpu",
    once: bool = False,
) -> Loader:
    """Build a loader.

    Args:
        sampler: what to deliver.
        backend: who decodes.
        workers: processes (torch; 0: in this process) or threads (DALI).
        bad: rows known to be bad, with reasons.
        on_bad: told about each newly found bad row.
        device: where the pixels are wanted; `dali-gpu` delivers them there.
        once: a single epoch will be read, so nothing of a following one is prepared.

    Raises:
        HardwareError: H004 when DALI is not installed, H001 when `dali-gpu` has no GPU.
        ConfigError: C003 for an unknown backend, C004 when it cannot deliver the wanted channels.
    """
    require_loader(backend, sampler.pixels.color, device)
    if backend == "torch":
        from .torch_loader import TorchLoader

        return TorchLoader(sampler, workers, dict(bad or {}), on_bad, pin=device != "cpu")
    from .dali import DaliLoader

    return DaliLoader(sampler, backend, workers, dict(bad or {}), on_bad, device=device, once=once)


def require_loader(backend: str, color: str, device: str) -> None:
    """Refuse a loader that cannot deliver such pixels here; asked before the scan, too, which may take long.

    Args:
        color: pixels.color; "auto" where it is not known yet.

    Raises:
        HardwareError, ConfigError: as `open_loader`.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            "C003", f"the loader must be one of {', '.join(BACKENDS)}, got {backend!r}", try_="--loader torch"
        )
    if backend == "torch":
        return
    if missing := dali_missing():
        raise HardwareError("H004", f"the loader {backend} needs DALI: {missing}", try_="--loader torch")
    if color == "rgba":
        raise ConfigError(
            "C004", f"the loader {backend} delivers 1 or 3 channels, and pixels.color is rgba", try_="--loader torch"
        )
    if backend == "dali-gpu" and not device.startswith("cuda"):
        raise HardwareError("H001", f"the loader dali-gpu delivers to a GPU, not to {device}", try_="--loader dali-cpu")
