"""Measures images per second from files, and whether the loader or the model limits them. Part of `imgcls-fast bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import numpy as np

from ..core import env
from ..core.bundle import Bundle
from ..core.manifest import Manifest
from ..core.run import Run
from ..loading.loader import read_rows, usual_loader
from .contenders import Contender

_DURATION_S = 2.0  # of each timing
_LEAST = 3  # batches in it
_ROWS = 1_000_000  # the rows of the split, again and again; a timing ends long before
_NEAR = 0.9  # rates that are nearer than this limit alike
_FIGHT = 0.5  # of the rate of one after the other; less is lost to waiting for cores


def data_rates(
    run: Run, bundle: Bundle, engines: Mapping[str, tuple[Contender, dict[str, Any]]], device: str, threads: int
) -> dict[str, Any] | None:
    """Decoding alone, and decoding with scoring, over the test (else val) rows of a run, whose files are in memory by then.

    Args:
        engines: name -> (what to open, its row of `efficiency.examine`).
        device: where the pixels are wanted.
        threads: threads of an engine on the CPU.

    Returns:
        `data` of `efficiency`; None where no image can be read.
    """
    manifest, size = run.manifest, int(run.config.evaluate.batch_size)
    rows = next((rows for split in ("test", "val") if len(rows := manifest.rows(split))), None)
    if rows is None:
        return None
    rows = manifest.fair_order(rows)  # the time may be up before the second class
    workers = min(4, env.usable_cpus())

    def rate(where: str, work: Callable[[Any], Any]) -> float | None:
        backend = usual_loader(bundle.pixels, where)
        return _rate(manifest, rows, bundle, size, backend, workers, where, work)

    decoded = rate(device, lambda pixels: None)
    if decoded is None:
        return None
    found = []
    for name, (contender, row) in engines.items():
        engine = contender.open(bundle, device, threads)
        try:
            both = rate(str(getattr(engine, "device", "cpu")), engine.scores)
        finally:
            engine.close()
        alone = row["best"]["images_per_s"]
        if both is not None:
            limit = limit_of(decoded, alone, both)
            found.append({"name": name, "images_per_s": both, "alone_images_per_s": alone, "limit": limit})
    backend = usual_loader(bundle.pixels, device)
    facts = {"loader": backend, "workers": workers, "batch": size, "decode_images_per_s": decoded, "engines": found}
    return facts | {"line": _line(facts)}


def limit_of(decoded: float, alone: float, both: float) -> str:
    """What limits: "loader" or "model", whichever is slower alone, "both", or "contention".

    Args:
        decoded, alone, both: images per second of decoding alone, of the engine alone, and of both together.
    """
    if both < _FIGHT / (1 / decoded + 1 / alone):
        return "contention"
    if min(decoded, alone) >= _NEAR * max(decoded, alone):
        return "both"
    return "loader" if decoded < alone else "model"


def _rate(
    manifest: Manifest,
    rows: np.ndarray,
    bundle: Bundle,
    size: int,
    backend: str,
    workers: int,
    device: str,
    work: Callable[[Any], Any],
) -> float | None:
    """Images per second from the second batch on."""
    again = np.resize(rows, _ROWS)
    with closing(
        read_rows(manifest, again, bundle.pixels, batch_size=size, backend=backend, workers=workers, device=device)
    ) as stream:
        first = next(stream)
        if not (np.asarray(first.weight) > 0).any():
            return None
        work(first.pixels)
        images, batches, began, elapsed = 0, 0, time.perf_counter(), 0.0
        while batches < _LEAST or elapsed < _DURATION_S:
            batch = next(stream)
            work(batch.pixels)
            images, batches = images + int((np.asarray(batch.weight) > 0).sum()), batches + 1
            elapsed = time.perf_counter() - began
        return round(images / elapsed, 1) or None


def _line(facts: Mapping[str, Any]) -> str:
    limits = {"loader": "the loader limits", "model": "the model limits", "both": "both limit alike",
              "contention": "their threads get in each other's way"}  # fmt: skip
    parts = [
        f"with {entry['name']} {entry['images_per_s']:,.0f} (it alone {entry['alone_images_per_s']:,.0f}): {limits[entry['limit']]}"
        for entry in facts["engines"]
    ]
    return f"images/s from files ({facts['loader']}): decoding alone {facts['decode_images_per_s']:,.0f}; " + "; ".join(
        parts
    )
