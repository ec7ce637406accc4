"""Makes a manifest with splits from the settings, and looks at it: statistics, and whether the files are still the same."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..core import env
from ..core.bundle import Bundle
from ..core.config import DataConfig, RunConfig
from ..core.errors import DataError
from ..core.labels import LabelSpace
from ..core.manifest import SPLITS, Manifest
from ..core.phases import phase
from ..core.pixels import CHANNELS, FULL_BITS, Pixels
from ..core.undecoded import Undecoded
from . import fetch, reach
from .decode import Color, Undecodable, decode_pixels, read_file
from .depth import used_bits
from .digits import write_digits
from .findings import ScanOptions, ScanResult, task_facts
from .scan import scan
from .split import make_splits
from .store import open_store

_STATISTICS_IMAGES = 500
_CHANGED_PIECE = 64  # rows per job, so that ten million rows do not become ten million futures


@dataclass(frozen=True, eq=False)
class Prepared:
    """A manifest in which every row has a split, and what the scan found."""

    manifest: Manifest
    found: ScanResult

    def facts(self) -> dict[str, Any]:
        """The data line of the console, as plain values."""
        manifest, counts = self.manifest, self.manifest.counts()
        return {
            "source": manifest.source,
            "root": str(manifest.root),
            "images": len(manifest),
            "classes": list(manifest.labels.classes),
            **task_facts(manifest),
            "counts": {name: int(n) for name, n in zip(manifest.labels.classes, counts, strict=True)},
            "smallest": int(counts.min()) if len(counts) else 0,
            "splits": {name: len(manifest.rows(name)) for name in SPLITS},
            "quarantined": len(self.found.quarantine),
            "duplicates_removed": self.found.dropped,
            "skipped": self.found.skipped,
            "skipped_files": [vars(file) for file in self.found.skipped_files],
            "notices": list(self.found.notices),
            "fingerprint": manifest.fingerprint,
        }


def _imbalance(manifest: Manifest) -> float:
    """Largest / smallest class; of several tasks the worst, of a label the images with and without it."""
    counts, known, worst = manifest.counts(), manifest.known_counts(), 1.0
    for task, part in manifest.labels.parts:
        found = counts[part]
        pairs = np.stack([found, known[part] - found]) if task.kind == "any_of" else found
        worst = max(worst, float((pairs.max(0) / np.maximum(1, pairs.min(0))).max()))
    return worst


def scan_options(config: DataConfig, exif: str, cache: Path | None, **more: Any) -> ScanOptions:
    """The scan's options from the settings."""
    return ScanOptions(
        exif=exif,  # type: ignore[arg-type]
        bad_images=config.bad_images,
        max_bad=config.max_bad,
        max_megapixels=config.max_megapixels,
        verify=config.verify,
        group_by=config.group_by,
        group_col=config.group_col,
        path_col=config.path_col,
        label_col=config.label_col,
        label_cols=config.label_cols,
        label_kind=config.label_kind,
        split_col=config.split_col,
        duplicates=config.duplicates,
        near_duplicates=config.near_duplicates,
        cache=cache / "archives" if cache else None,
        **more,
    )


def training_options(config: RunConfig, cache: Path | None = None) -> ScanOptions:
    """The scan's options for a training run, with what has been asked for and so need not be suggested."""
    pixels = config.pixels
    return scan_options(
        config.data,
        pixels.exif,
        cache or _cache_for(config.data.source),
        advice=config.data.source is not None,
        color=pixels.color,
        weighted=config.loss.class_weights != "none",
        pretrained=config.model.init not in ("auto", "scratch"),
        bits=None if pixels.bits == "auto" else pixels.bits,
    )


def _cache_for(source: Path | str | None) -> Path | None:
    """The user's cache where this source needs one: a folder or a table is learnt from on a machine without any such place."""
    return env.cache_dir() if source and fetch.is_archive(Path(source)) else None


def prepare(config: RunConfig, cache: Path | None = None) -> Prepared:
    """Scan the source (none: the embedded digits) and give every row a split.

    Args:
        config: settings of the run; sections data, pixels, model and loss are read.
        cache: folder for extracted archives and the digits; None: the user's, which is asked for only where it is needed.

    Raises:
        DataError: everything that is wrong with the data, at once.
    """
    data = config.data
    source = Path(data.source) if data.source else write_digits(cache or env.cache_dir())
    found = scan(source, training_options(config, cache))
    manifest = make_splits(found.manifest, fractions=data.split, seed=data.split_seed)
    return Prepared(manifest, found)


def require_splits(prepared: Prepared) -> None:
    """Refuse to train without training or validation images.

    Raises:
        DataError: D008.
    """
    splits = prepared.facts()["splits"]
    for name in ("train", "val"):
        if not splits[name]:
            raise DataError(
                "D008",
                f"there are no {name} images in {prepared.manifest.source}",
                why=f"splits: {splits}",
                try_="imgcls-fast data split DATA",
            )


class Changed(NamedTuple):
    """Files that are not what they were at the scan: paths of the manifest, in its order."""

    missing: list[str]  # gone, and did not come back in time
    changed: list[str]  # with other bytes
    all: list[str]


@phase("checking that no image has changed")
def changed_files(manifest: Manifest, threads: int, without: Collection[int] = ()) -> Changed:
    """Look for files with other bytes than at the scan, and for files that are gone and do not come back in time.

    Args:
        manifest: images with digests.
        threads: files read at a time.
        without: rows that are not looked at.

    Raises:
        DataError: D015 when a file is there and the disk does not hand it out.
    """
    store, patience = open_store(manifest.root), reach.Patience()  # of all files together

    def differs(row: int) -> bool:
        name = manifest.paths[row]
        try:
            found = store.digest(name, patience=patience)
        except reach.NotAFile:
            return True
        except DataError:
            if store.holds(name):
                raise
            return True
        return found[:16] != manifest.digest[row].tobytes()

    def changed_in(rows: range) -> list[str]:
        return [manifest.paths[row] for row in rows if row not in without and differs(row)]

    n = len(manifest)
    pieces = [range(first, min(first + _CHANGED_PIECE, n)) for first in range(0, n, _CHANGED_PIECE)]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        found = [path for piece in pool.map(changed_in, pieces) for path in piece]
    missing = {path for path in found if not store.holds(path)}
    return Changed([path for path in found if path in missing], [path for path in found if path not in missing], found)


def channel_statistics(
    manifest: Manifest, color: Color, max_megapixels: float = 50.0, bits: int = FULL_BITS
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, 0..1, over at most 500 training images, spread over the classes."""
    rows = manifest.spread(manifest.rows("train"), _STATISTICS_IMAGES)
    store = open_store(manifest.root)
    shares = np.zeros((CHANNELS[color], 256))  # of each level; every image counts the same, whatever its size
    for row in rows:
        try:
            content = read_file(manifest.paths[row], max_megapixels, store=store)
            pixels = decode_pixels(content, color=color, max_megapixels=max_megapixels, bits=bits)
        except Undecodable:
            continue  # the loader will find it and report it
        # Pillow counts without a copy; as float64 a 50-megapixel photo would need 1.2 GB
        counts = Image.fromarray(pixels[:, :, 0] if color == "gray" else pixels).histogram()
        shares += np.array(counts).reshape(shares.shape) / (pixels.shape[0] * pixels.shape[1])
    shares /= np.maximum(shares.sum(1, keepdims=True), 1e-12)
    levels = np.arange(256) / 255.0
    mean = shares @ levels
    deviation = np.sqrt(np.maximum(shares @ levels**2 - mean**2, 1e-6))
    return tuple(mean.tolist()), tuple(deviation.tolist())


def per_split(manifest: Manifest) -> dict[str, dict[str, int]]:
    """{split: {class: images}}; classes of several tasks as "TASK: CLASS"."""
    names = manifest.labels.classes
    return {split: {c: int(n) for c, n in zip(names, manifest.counts(split), strict=True)} for split in SPLITS}


def statistics(prepared: Prepared, bits: int | None = None, max_megapixels: float = 50.0) -> dict[str, Any]:
    """What the images are like: classes, splits, sizes, orientations, channel means.

    Args:
        bits: bits that 16-bit gray images use; None: as many as the training images use.
        max_megapixels: larger images are not decoded.
    """
    manifest = prepared.manifest
    used = used_bits(manifest, max_megapixels) if bits is None else bits
    width, height = manifest.turned_size()
    mean, deviation = channel_statistics(manifest, "rgb", max_megapixels, used or FULL_BITS)

    def spread(values: np.ndarray) -> dict[str, float]:
        low, middle, high = np.percentile(values, [5, 50, 95])
        return {
            "min": float(values.min()),
            "p5": float(low),
            "median": float(middle),
            "p95": float(high),
            "max": float(values.max()),
        }

    return {
        **prepared.facts(),
        "per_split": per_split(manifest),
        "width": spread(width),
        "height": spread(height),
        "aspect": spread(width / height),
        **({} if used is None else {"bits": used}),
        "turned_by_exif": int((manifest.orientation > 1).sum()),
        "imbalance": _imbalance(manifest),
        "mean": [round(v, 4) for v in mean],
        "std": [round(v, 4) for v in deviation],
    }


def scan_to_judge(data: DataConfig, source: Path, pixels: Pixels, labels: LabelSpace) -> ScanResult:
    """Other labelled images, whose classes must be classes of a model and are numbered as the model numbers them.

    Args:
        data: settings of the model's own data.
        pixels, labels: the model's own.

    Returns:
        The manifest, and what was left out of it: who uses it must report `quarantine` and `notices`.

    Raises:
        DataError: as `scan`.
    """
    asked: dict[str, Any] = {"classes": labels.classes} if labels.is_single else {"labels": labels}
    return scan(source, scan_options(data, pixels.exif, _cache_for(source), purpose="judge", **asked))


def more_rows(data: DataConfig, source: Path, bundle: Bundle, say: Callable[[str], None]) -> Manifest:
    """Labelled images of elsewhere, with the classes of a model; what the scan leaves out is reported through `say`."""
    found = scan_to_judge(data, source, bundle.pixels, bundle.labels)
    bad = Undecoded({file.path: file.reason for file in found.quarantine})
    for sentence in filter(None, (bad.sentence(), *found.notices)):
        say(f"{source}: {sentence}")
    return found.manifest
