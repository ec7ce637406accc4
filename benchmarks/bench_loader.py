"""Loaders beside what people use instead, by CPU time of all processes; and the header probe beside Pillow.

Everybody makes random-resized-crop 224 with a flip from the same JPEG files, two workers, and delivers one epoch a call. The
rivals: torchvision's Pillow pipeline in a DataLoader as its references have it (float32, normalised), the same left as
uint8 (stricter: ours normalises inside the model), with `decode_image` instead of Pillow, timm's loader, DALI's own reader
with its usual operators, and Hugging Face `datasets` with a torchvision transform. Crops are random, so results can only be
compared in the mean: each must deliver as many images of that size, and the mean and deviation of their pixels must agree
within what the choice of the crops explains.
Workers live on between epochs. The limit is plain decoding with libjpeg-turbo to full size, without crop or resize; whoever
decodes only the crop can be faster than that.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from duels import Contender, Contest, Disagree, Pair, Setup, wall_and_family_cpu
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from imgcls_fast import _C
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.manifest import Manifest, PathList
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.data.digits import write_digits
from imgcls_fast.data.examine import pillow_flags, probe
from imgcls_fast.loading.augment import Augment
from imgcls_fast.loading.loader import open_loader
from imgcls_fast.loading.sampler import Sampler

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = Pixels(SIZE, 0.875, "bilinear", "rgb", "apply", MEAN, STD)
WORKERS = 2
REFERENCE = "torchvision, Pillow"
CHECKED_EPOCHS = 3
ERRORS, LEVELS = (
    4.5,
    2.0,
)  # standard errors and levels of 255 by which mean and deviation of the random crops may differ

CONTESTS = [
    Contest("loader", "epoch", "loaders", {"images": 32, "batch": 16}, threads=1, devices=("cpu",)),
    Contest("loader", "epoch, large", "loaders", {"images": 512, "batch": 64}, threads=1, full=True),
    Contest("loader", "small epoch", "loaders", {"images": 32, "batch": 16, "small": True}, threads=1, devices=("cpu",), small=True),
    Contest("loader", "epoch on a GPU", "loaders", {"images": 512, "batch": 128}, threads=1, devices=("cuda",)),
    Contest("loader", "headers", "headers", threads=1, devices=("cpu",)),
]  # fmt: skip


@pytest.mark.parametrize("contest", CONTESTS, ids=str)
def bench_loader(duel: Callable[[Contest], list[dict[str, Any]]], contest: Contest) -> None:
    first = duel(contest)[0]
    assert first["cases"] or first["slow"], first["absent"]


def default_folder() -> Path:
    """jpeg_full of the shared test data."""
    shared = os.environ.get("IMGCLS_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(shared) / "jpeg_full" / "images"


def files(work: Path, count: int) -> list[Path]:
    """JPEG files: the shared photos where they are, else the embedded digits, enlarged and written as JPEG once."""
    folder = default_folder()
    if not folder.is_dir():
        folder = work / "digits-jpeg"
        if not (folder / "done").exists():
            folder.mkdir(parents=True, exist_ok=True)
            for k, path in enumerate(sorted(write_digits(work / "digits").rglob("*.png"))[:256]):
                with Image.open(path) as image:
                    image.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(
                        folder / f"{k:03}.jpg", quality=90
                    )
            (folder / "done").touch()
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    return (found * -(-count // len(found)))[:count]


# --- epochs -----------------------------------------------------------------------------------------------------------


def loaders(work: Path, images: int, batch: int, device: str, full: bool = False, small: bool = False) -> Setup:
    """One epoch of each loader; output: count, shape, mean and deviation of an image in levels, with their standard errors."""
    paths = files(work, images)
    case = f"{images} JPEG files, batches of {batch}"
    makers: dict[str, Callable[[], Callable[[], Iterator[Any]]]] = {
        "dali-cpu": partial(_ours, paths, "dali-cpu", batch, device),
        "torch": partial(_ours, paths, "torch", batch, device),
        REFERENCE: partial(_torchvision, paths, batch, "pillow", True),
        "torchvision, Pillow, uint8": partial(_torchvision, paths, batch, "pillow", False),
        "torchvision, decode_image, uint8": partial(_torchvision, paths, batch, "decode_image", False),
        "timm": partial(_timm, paths, batch),
        "DALI reader": partial(_plain_dali, paths, batch, work),
        "HF datasets": partial(_datasets, paths, batch),
    }
    if device == "cuda":
        makers["dali-gpu"] = partial(_ours, paths, "dali-gpu", batch, device)
    if small:
        makers = {name: makers[name] for name in ("dali-cpu", "torchvision, Pillow, uint8")}
    rivals = [name for name in makers if name not in ("dali-cpu", "dali-gpu", "torch")]
    pairs = [Pair("dali-cpu", rival, {"": 0.55} if rival == REFERENCE else {}) for rival in rivals]
    if not small:
        pairs += [Pair("torch", REFERENCE)]
        pairs += [Pair("dali-gpu", rival) for rival in rivals] if device == "cuda" else []
    return Setup(
        {name: partial(_epochs, make, case, images) for name, make in makers.items()},
        pairs,
        partial(_same_images, images=images),
        clock="cpu" if device == "cpu" else "wall",
        images={case: images},
        limits={case: ("plain decoding", partial(_decoding, paths))},
    )


def _epochs(make: Callable[[], Callable[[], Iterator[Any]]], case: str, images: int) -> Contender:
    epoch = make()
    means: list[np.ndarray] = []
    deviations: list[np.ndarray] = []
    shape: tuple[int, ...] = ()
    for _ in range(CHECKED_EPOCHS):
        for pixels in epoch():
            array = np.asarray(pixels.cpu() if hasattr(pixels, "cpu") else pixels)
            shape = tuple(sorted(array.shape[1:]))
            levels = _levels(array).reshape(len(array), -1)
            means.append(levels.mean(1))
            deviations.append(levels.std(1))
    values = {"mean": np.concatenate(means), "deviation": np.concatenate(deviations)}
    output = {"images": len(values["mean"]), "shape": shape} | {
        key: (float(found.mean()), float(found.std() / len(found) ** 0.5)) for key, found in values.items()
    }

    def run() -> None:
        seen = sum(len(pixels) for pixels in epoch())
        assert seen == images, f"{seen} of {images} images"

    return Contender({case: run}, output)


def _levels(pixels: np.ndarray) -> np.ndarray:
    """Pixels in levels of 255, whatever was done to them."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32)
    mean, std = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (MEAN, STD))
    return 255 * (pixels * std + mean)


def _same_images(name: str, outputs: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Mean and deviation of an image's pixels, on average over all, against the median of what all contenders deliver."""
    mine, expected = outputs[name], CHECKED_EPOCHS * images
    if (mine["images"], mine["shape"]) != (expected, (3, SIZE, SIZE)):
        raise Disagree(
            f"{name} delivers {mine['images']} images of {mine['shape']}, not {expected} of (3, {SIZE}, {SIZE})"
        )
    apart = {}
    for key in ("mean", "deviation"):
        value, error = mine[key]
        apart[key] = abs(value - float(np.median([output[key][0] for output in outputs.values()])))
        if apart[key] > ERRORS * error + LEVELS:
            raise Disagree(
                f"the {key} of the pixels of {name} differs by {apart[key]:.1f} levels from that of the others"
            )
    return {f"{key}_off_by_levels": round(value, 2) for key, value in apart.items()}


def _decoding(paths: list[Path]) -> float:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    data = [read_file(str(path)) for path in paths]

    def decode() -> None:
        for content in data:
            decode_jpeg(content, mode=ImageReadMode.RGB)

    decode()
    return min(wall_and_family_cpu(decode)[1] for _ in range(2))


def _ours(paths: list[Path], backend: str, batch: int, device: str) -> Callable[[], Iterator[Any]]:
    sampler = Sampler(manifest_of(paths), np.arange(len(paths)), PIXELS, batch, seed=0, augment=Augment((0.08, 1.0)))
    loader = open_loader(sampler, backend, workers=WORKERS, device=device)
    number = iter(range(1 << 30))

    def epoch() -> Iterator[Any]:
        for item in loader.epoch(next(number)):
            yield item.pixels

    return epoch


def manifest_of(paths: list[Path]) -> Manifest:
    """A manifest of files that are known to be good."""
    head = probe([os.fsencode(path) for path in paths], 2)
    n = len(paths)
    return Manifest(
        root=Path("/"), paths=PathList.of(str(path.resolve()) for path in paths), labels=LabelSpace.single(["image"]),
        answers=(np.zeros(n, np.int32),), split=np.zeros(n, np.uint8), group=np.full(n, -1, np.int32),
        width=np.asarray(head["width"], np.int32), height=np.asarray(head["height"], np.int32),
        orientation=np.asarray(head["orientation"], np.uint8), digest=np.zeros((n, 16), np.uint8), flags=pillow_flags(head),
    )  # fmt: skip


class _Files(Dataset):  # type: ignore[type-arg]
    """What torchvision's references do: open, convert, crop, flip; then float32 and normalised, or left as uint8."""

    def __init__(self, paths: list[Path], decoder: str, normalised: bool) -> None:
        self.paths, self.decoder = paths, decoder
        first = [] if decoder == "decode_image" else [v2.PILToTensor()]
        last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)] if normalised else []
        crop = v2.RandomResizedCrop(SIZE, antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *first, *last])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.decoder == "decode_image":
            from torchvision.io import ImageReadMode, decode_image

            return self.transform(decode_image(str(self.paths[index]), mode=ImageReadMode.RGB))
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def _torchvision(paths: list[Path], batch: int, decoder: str, normalised: bool) -> Callable[[], Iterator[Any]]:
    loader = DataLoader(
        _Files(paths, decoder, normalised), batch_size=batch, shuffle=True, drop_last=True, num_workers=WORKERS,
        persistent_workers=True,
    )  # fmt: skip
    return lambda: iter(loader)


class _Labelled:
    """The paths as timm's datasets are: (image, target) with a transform that timm sets."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.transform = paths, None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with Image.open(self.paths[index]) as image:
            picture = image.convert("RGB")
        return (self.transform(picture) if self.transform else picture), 0  # type: ignore[misc]


def _timm(paths: list[Path], batch: int) -> Callable[[], Iterator[Any]]:
    from timm.data import create_loader

    loader = create_loader(
        _Labelled(paths), input_size=(3, SIZE, SIZE), batch_size=batch, is_training=True, use_prefetcher=False,
        color_jitter=None, interpolation="bilinear", mean=MEAN, std=STD, num_workers=WORKERS, device=torch.device("cpu"),
        pin_memory=False,
    )  # fmt: skip
    return lambda: (pixels for pixels, _ in loader)


def _plain_dali(paths: list[Path], batch: int, work: Path) -> Callable[[], Iterator[Any]]:
    """DALI as its documentation shows it for training: its own reader and random crops; none of our sampler."""
    from nvidia.dali import fn, pipeline_def, types

    listing = work / f"files-{len(paths)}.txt"
    listing.write_text("".join(f"{path} 0\n" for path in paths), "utf-8")

    @pipeline_def(batch_size=batch, num_threads=WORKERS, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        jpegs, _ = fn.readers.file(file_list=str(listing), random_shuffle=True, name="files")
        crops = fn.decoders.image_random_crop(jpegs, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        sized = fn.resize(crops, size=SIZE, interp_type=types.INTERP_TRIANGULAR)
        return fn.flip(sized, horizontal=fn.random.coin_flip())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipeline()
        pipe.build()

    def epoch() -> Iterator[Any]:
        for _ in range(len(paths) // batch):
            (pixels,) = pipe.run()
            yield pixels.as_array()

    return epoch


def _datasets(paths: list[Path], batch: int) -> Callable[[], Iterator[Any]]:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", datasets.Image())
    crop = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[torch.Tensor]]:
        return {"pixels": [crop(image.convert("RGB")) for image in rows["image"]]}

    loader = DataLoader(
        table.with_transform(transform), batch_size=batch, shuffle=True, drop_last=True, num_workers=WORKERS,
        persistent_workers=True,
    )  # fmt: skip
    return lambda: (rows["pixels"] for rows in loader)


# --- headers ----------------------------------------------------------------------------------------------------------


def headers(work: Path, device: str, full: bool = False) -> Setup:
    """Width, height and orientation of each file, warm, on one thread."""
    paths = files(work, 220)
    names = [os.fsencode(path) for path in paths]
    case = f"headers of {len(paths)} JPEG files"

    def ours() -> list[tuple[int, ...]]:
        found = _C.probe(names, 1)
        return list(zip(*(found[key].tolist() for key in ("width", "height", "orientation")), strict=True))

    def pillow() -> list[tuple[int, ...]]:
        answers = []
        for path in paths:
            with Image.open(path) as image:
                orientation = image.getexif().get(274, 1)
                answers.append((*image.size, orientation if orientation in range(1, 9) else 1))
        return answers

    def check(name: str, outputs: Mapping[str, Any]) -> dict[str, Any]:
        differ = sum(a != b for a, b in zip(outputs["probe"], outputs[name], strict=True))
        if differ:
            raise Disagree(f"{differ} of {len(paths)} headers differ")
        return {"different": 0}

    calls = {"probe": ours, "Pillow": pillow}
    return Setup(
        {name: partial(lambda call: Contender({case: call}, call()), call) for name, call in calls.items()},
        [Pair("probe", "Pillow")], check, images={case: len(paths)},
    )  # fmt: skip
