"""What the tests of the loaders share: manifests of given files, an album of every kind of image, one way to run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.manifest import Manifest, PathList
from imgcls_fast.core.pixels import CHANNELS, Pixels
from imgcls_fast.data.examine import pillow_flags, probe
from imgcls_fast.loading.augment import Augment
from imgcls_fast.loading.backend import Loader
from imgcls_fast.loading.loader import open_loader
from imgcls_fast.loading.sampler import Sampler


@dataclass(frozen=True)
class Delivered:
    """A copy of a batch, in NumPy."""

    pixels: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    rows: np.ndarray


class Kit:
    """Short ways to the things that every loader test needs."""

    strong = Augment((0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    plain = Augment((0.2, 1.0))

    @staticmethod
    def pixels(size: int = 40, color: str = "rgb", crop_pct: float = 0.875, **more: Any) -> Pixels:
        c = CHANNELS[color]
        values = {"interpolation": "bilinear", "exif": "apply", **more}
        return Pixels(size, crop_pct, color=color, mean=(0.5,) * c, std=(0.5,) * c, **values)  # type: ignore[arg-type]

    @staticmethod
    def manifest(root: Path, names: Iterable[str]) -> Manifest:
        """The manifest of some files, as the scan would make it; their classes take turns."""
        listed = list(names)
        head = probe([os.fsencode(root / name) for name in listed], 1)
        n = len(listed)
        return Manifest(
            root=root,
            paths=PathList.of(listed),
            labels=LabelSpace.single(["a", "b", "c"]),
            answers=(np.arange(n, dtype=np.int32) % 3,),
            split=np.zeros(n, np.uint8),
            group=np.full(n, -1, np.int32),
            width=np.asarray(head["width"], np.int32),
            height=np.asarray(head["height"], np.int32),
            orientation=np.asarray(head["orientation"], np.uint8),
            digest=np.zeros((n, 16), np.uint8),
            flags=pillow_flags(head),
        )

    @staticmethod
    def sampler(
        manifest: Manifest, batch: int, augment: Augment | None = None, pixels: Pixels | None = None
    ) -> Sampler:
        rows = np.arange(len(manifest))
        return Sampler(manifest, rows, pixels or Kit.pixels(), batch, seed=7, augment=augment)

    @staticmethod
    def open(sampler: Sampler, backend: str, workers: int = 1, **more: Any) -> Loader:
        return open_loader(sampler, backend, workers=workers, **more)  # type: ignore[arg-type]

    @staticmethod
    def copy(batch: Any) -> Delivered:
        values = (batch.pixels, batch.targets, batch.weight, batch.rows)
        return Delivered(*(value.numpy().copy() for value in values))

    @staticmethod
    def epochs(loader: Loader, *epochs: int, start: int = 0) -> list[Delivered]:
        return [Kit.copy(batch) for epoch in epochs for batch in loader.epoch(epoch, start)]

    @staticmethod
    def run(
        sampler: Sampler, backend: str, workers: int = 1, epochs: tuple[int, ...] = (0,), **more: Any
    ) -> list[Delivered]:
        """All batches of some epochs, by a loader of its own."""
        loader = Kit.open(sampler, backend, workers, **more)
        try:
            return Kit.epochs(loader, *epochs)
        finally:
            loader.close()

    @staticmethod
    def assert_same(ours: list[Delivered], theirs: list[Delivered]) -> None:
        """Bitwise equal batches in the same order."""
        assert len(ours) == len(theirs)
        for k, (one, two) in enumerate(zip(ours, theirs, strict=True)):
            for name in ("rows", "weight", "targets", "pixels"):
                np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=f"batch {k}: {name}")


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


def smooth(seed: int, width: int, height: int, channels: int = 3) -> np.ndarray:
    """A picture with soft shapes, (height, width, channels) uint8: resamplers agree on such, not on noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 11, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(np.ascontiguousarray(coarse[:, :, c])).resize((width, height), Image.Resampling.BICUBIC)
        for c in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], 2)


@pytest.fixture(scope="session")
def photo() -> Callable[..., Image.Image]:
    """photo(seed, width, height) -> a smooth RGB picture."""
    return lambda seed, width=90, height=70: Image.fromarray(smooth(seed, width, height))


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image of every kind that a loader meets; 31 files."""
    root = tmp_path_factory.mktemp("album")

    def save(name: str, mode: str = "RGB", size: tuple[int, int] = (90, 70), **options: Any) -> None:
        seed = len(list(root.iterdir()))
        image = Image.fromarray(smooth(seed, *size))
        if mode == "RGBA":
            image.putalpha(Image.fromarray(smooth(seed + 100, *size, 1)[:, :, 0]))
        image.convert(mode).save(root / name, **options)

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        save(f"turned_{orientation}.jpg", size=(100, 60), exif=exif, quality=92)
    for k in range(6):
        save(f"plain_{k}.jpg", size=(60 + 37 * k, 170 - 23 * k), quality=90, subsampling=k % 3)
    save("progressive.JPG", progressive=True)
    save("gray.jpg", "L")
    save("cmyk.jpg", "CMYK")
    save("rgb.png")
    save("rgba.png", "RGBA")
    save("palette.png", "P")
    save("gray.png", "L")
    save("photo.webp", quality=90)
    save("photo.bmp")
    save("photo.tif")
    save("photo.gif", "P")
    save("with space.jpg")
    save("žluťoučký kůň 花.jpg")
    save("tiny.png", size=(3, 2))
    save("one.jpg", size=(1, 1))
    save("long.png", size=(2000, 1))
    save("tall.jpg", size=(2, 2000))
    deep = (smooth(55, 90, 70, 1)[:, :, 0].astype(np.uint16) * 257).astype(np.uint16)
    Image.fromarray(deep).save(root / "deep.png")
    return root


@pytest.fixture(scope="session")
def album_manifest(album: Path) -> Manifest:
    """The album's files by name."""
    return Kit.manifest(album, sorted(path.name for path in album.iterdir()))
