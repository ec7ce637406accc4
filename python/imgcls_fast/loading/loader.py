"""Chooses a loader, and reads some rows once."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from ..core import env
from ..core.batch import Batch
from ..core.bundle import Bundle
from ..core.errors import ConfigError, HardwareError
from ..core.manifest import Manifest
from ..core.phases import phase
from ..core.pixels import Pixels
from ..core.undecoded import Undecoded
from .backend import Loader, OnBad
from .sampler import Sampler

BACKENDS = ("torch", "dali-cpu", "dali-gpu")


def dali_missing() -> str | None:
    """Return why DALI cannot be used here, or None."""
    from importlib.util import find_spec

    return None if find_spec("nvidia") and find_spec("nvidia.dali") else "nvidia-dali-cuda130 is not installed"


def usual_loader(pixels: Pixels, device: str) -> str:
    """Choose the loader for images that no run has planned for."""
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
        sampler: order and crops of the images to deliver.
        backend: image loader to use, one of BACKENDS.
        workers: processes (torch; 0: in this process) or threads (DALI).
        bad: rows known to be bad, with reasons.
        on_bad: called for each newly found bad row.
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


# ---------------------------------------------------------------- some rows, once


def read_rows(
    manifest: Manifest,
    rows: np.ndarray,
    pixels: Pixels,
    *,
    batch_size: int = 32,
    backend: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    bad: dict[int, str] | None = None,
    on_bad: OnBad | None = None,
) -> Generator[Batch, None, None]:
    """Read some rows once, in their order, as evaluation sees them; padding has weight 0. Ends its loader, however it ends.

    Args:
        backend: image loader to use; None: `usual_loader`. On the CPU `dali-gpu` becomes `dali-cpu`.
        workers: processes or threads; None: at most two.
        bad, on_bad, device: as in `open_loader`.

    Raises:
        ValueError: there are no rows.
        DataError: D015 when a file cannot be reached.
        HardwareError, ConfigError: as `open_loader`.
    """
    backend = backend or usual_loader(pixels, device)
    if backend == "dali-gpu" and device == "cpu":
        backend = "dali-cpu"
    count = min(2, env.usable_cpus()) if workers is None else workers
    sampler = Sampler(manifest, rows, pixels, batch_size)
    loader = open_loader(sampler, backend, workers=count, bad=bad, on_bad=on_bad, device=device, once=True)
    try:
        yield from loader.epoch(0)
    finally:
        loader.close()


@phase("reading images")
def pixels_of(
    bundle: Bundle, manifest: Manifest, rows: np.ndarray, left: Undecoded, *, batch_size: int = 32
) -> list[np.ndarray]:
    """Return (n, S, S, C) uint8 arrays of some rows, without padding; undecodable ones are left out, into `left`."""
    found = []
    for batch in read_rows(manifest, rows, bundle.pixels, batch_size=batch_size, on_bad=left.of(manifest)):
        keep = np.asarray(batch.weight) > 0
        if keep.any():
            found.append(np.ascontiguousarray(np.asarray(batch.pixels)[keep]))
    return found


def comparison_rows(manifest: Manifest, images: int) -> np.ndarray:
    """Return (n,) int64, at most `images` rows to compare on: test, then val, then train, each in fair order.

    In that order the first few (all that the reference evaluator of BF16 takes) are a sample as well.
    """
    picked: list[np.ndarray] = []
    for split in ("test", "val", "train"):
        picked.append(manifest.fair_order(manifest.rows(split))[: max(0, images - sum(map(len, picked)))])
    return np.concatenate(picked)
