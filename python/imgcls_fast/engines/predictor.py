"""Ask a model about images in whatever form they come: paths, bytes, Pillow images, arrays, folders."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ConfigError, DataError
from ..core.files import lack_of
from ..core.labels import JOINT, Task, TaskKind
from ..core.pixels import evaluation_geometry
from ..data import inputs, skipped
from ..data.decode import Undecodable, decode_pixels, read_file
from ..data.scan import unlabelled
from ..loading.render import evaluation_view
from .base import Engine

_NOTICES = 3  # of folders, in one line

Image = Any  # as `inputs.decodable` takes it


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    Args:
        path: name of the file, or what stands for it.
        label: the most probable class; where any number of classes may hold those that do, joined by "|"; empty for several
            tasks, and when there is an error.
        confidence: its probability; NaN unless the answer is one class.
        top: (class, probability), the most probable first; empty for several tasks.
        error: why the image could not be read; empty when it could.
        labels: (class, probability) of the classes that hold: one, or none or several where any number may. Of several tasks the
            names are those of `Predictor.classes`.
        tasks: the answer to each task, by its name; empty for a model with one.
        kind: whether exactly one class holds, or any number.
    """

    path: str
    label: str = ""
    confidence: float = 0.0
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""
    labels: tuple[tuple[str, float], ...] = ()
    tasks: Mapping[str, Prediction] = field(default_factory=dict, hash=False)
    kind: TaskKind = "one_of"

    def __repr__(self) -> str:
        if self.error:
            found = f"error={self.error!r}"
        elif self.tasks or self.kind == "any_of":
            found = f"labels={[(name, round(score, 3)) for name, score in self.labels]}"
        else:
            found = f"label={self.label!r}, confidence={self.confidence:.3f}"
        return f"Prediction(path={self.path!r}, {found})"

    def to_dict(self) -> dict[str, Any]:
        """path with label, confidence and top; or labels and top; or tasks (each of these by its name); or error."""
        if self.error:
            return {"path": self.path, "error": self.error}
        if self.tasks:
            return {"path": self.path, "tasks": {name: answer._found() for name, answer in self.tasks.items()}}
        return {"path": self.path, **self._found()}

    def _found(self) -> dict[str, Any]:
        top = [list(pair) for pair in self.top]
        if self.kind == "any_of":
            return {"labels": [list(pair) for pair in self.labels], "top": top}
        return {"label": self.label, "confidence": self.confidence, "top": top}


class Predictor:
    """A model that answers about images. One image in, one `Prediction` out; many in, a list out, in their order.

    Args:
        engine: what scores.
        batch: images per forward pass.
        top_k: classes in `Prediction.top`.
        threads: number of decoding threads.

    A context manager: leaving it frees the engine.
    """

    def __init__(self, engine: Engine, *, batch: int = 32, top_k: int = 1, threads: int = 2) -> None:
        if batch < 1:
            raise ConfigError("C003", f"batch must be at least 1, got {batch}")
        _check_top_k(top_k)
        self.engine, self.batch, self.top_k, self._threads = engine, min(batch, engine.max_batch), top_k, threads

    def __repr__(self) -> str:
        device = getattr(self.engine, "device", "")
        pixels, known = self.engine.pixels, ", ".join(map(repr, self.classes[:3])) + (", ..." if len(self.classes) > 3 else "")
        what = f"{self.engine.runtime}{f' on {device}' if device else ''}, {pixels.size} x {pixels.size} {pixels.color}"
        return f"Predictor({what}, {len(self.classes)} classes: {known})"

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of every column: the class, and "TASK: CLASS" where there are several tasks."""
        return self.engine.labels.classes

    def __call__(self, image: Image | Iterable[Image], *, top_k: int | None = None) -> Any:
        """One `Prediction` for one image; a list for several, for a batch of tensors, or for a folder.

        Args:
            image: a path, bytes, an open file, a Pillow image, an array (H, W[, C]) or a tensor (C, H, W) of uint8, or of
                floats in 0..1.
            top_k: classes in `Prediction.top`; None: as the Predictor was made.

        Raises:
            DataError: D012 when a single image cannot be read (in a list, its `error` holds the reason); D015 when the disk
                does not hand it out.
        """
        if not inputs.is_one(image) or (isinstance(image, str | Path) and os.path.isdir(Path(image))):
            return list(self.stream(image, top_k=top_k))
        (answer,) = self.stream([image], top_k=top_k)
        if answer.error:
            raise DataError(
                "D012", f"{answer.path} cannot be decoded: {answer.error}", try_="imgcls-fast data check DATA"
            )
        return answer

    def stream(self, images: Iterable[Image] | str | Path, *, top_k: int | None = None) -> Iterator[Prediction]:
        """Answers in the order of `images` (a folder: its images, by name), batch by batch; never holds all of them."""
        return self._stream(iter(self._listed(images)), self.top_k if top_k is None else _check_top_k(top_k))

    def _stream(self, source: Iterator[Image], top_k: int) -> Iterator[Prediction]:
        with ThreadPoolExecutor(self._threads) as pool:
            ahead = [pool.submit(self._try, image) for image in islice(source, self.batch)]
            while ahead:
                following = [pool.submit(self._try, image) for image in islice(source, self.batch)]
                yield from self._answers([job.result() for job in ahead], top_k)
                ahead = following

    def _listed(self, images: Any) -> Iterable[Image]:
        if isinstance(images, str | Path) and os.path.isdir(Path(images)):
            inside = unlabelled(Path(images))
            for notice in inside.notices[:_NOTICES]:
                warnings.warn(notice, stacklevel=4)
            return [Path(images, path) for path in inside.images]
        return inputs.each(images)

    def predict(self, images: Image | Iterable[Image]) -> np.ndarray:
        """(n, K) float32 probabilities of one image or several, or of a folder's.

        Raises:
            DataError: D012 naming the first image that cannot be read; D015 when the disk does not hand it out.
        """
        parts = [self.engine.scores(pixels) for pixels in self._batches(images)]
        return np.concatenate(parts) if parts else np.zeros((0, self.engine.labels.size), np.float32)

    def embed(self, images: Image | Iterable[Image]) -> np.ndarray:
        """(n, F) float32: what the last layer sees, of one image or several; torch models only.

        Raises:
            ConfigError: C004 for another runtime.
        """
        import torch

        model = getattr(self.engine, "model", None)
        if model is None or not hasattr(model, "features"):
            raise ConfigError("C004", f"embed needs the runtime torch, this is {self.engine.runtime}")
        with torch.inference_mode():
            parts = [model.eval().features(torch.from_numpy(p).to(self.engine.device)) for p in self._batches(images)]  # type: ignore[attr-defined]
        return torch.cat(parts).float().cpu().numpy()

    def preprocess(self, image: Image) -> np.ndarray:
        """(size, size, C) uint8: exactly the pixels that evaluation feeds to the model.

        Raises:
            DataError: D012 when the image cannot be read.
        """
        try:
            return self._pixels(image)
        except Undecodable as error:
            raise DataError(
                "D012", f"{error.path} cannot be decoded: {error.reason}", try_="imgcls-fast data check DATA"
            ) from error

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def _batches(self, images: Any) -> Iterator[np.ndarray]:
        source = iter(self._listed(images))
        while part := list(islice(source, self.batch)):
            yield np.stack([self.preprocess(image) for image in part])

    def _pixels(self, image: Image) -> np.ndarray:
        pixels = self.engine.pixels
        name, source = "", inputs.decodable(image)
        if isinstance(source, Path):
            name = str(image)
            try:
                source = read_file(name, pixels.max_megapixels, seen=False)
            except (FileNotFoundError, NotADirectoryError) as error:  # of a name that was never looked at
                raise Undecodable(name, f"cannot be opened: {error.strerror}") from error
        decoded = decode_pixels(
            source, color=pixels.color, exif=pixels.exif, max_megapixels=pixels.max_megapixels, name=name, bits=pixels.bits
        )
        height, width = decoded.shape[:2]
        (place,) = evaluation_geometry(np.array([width]), np.array([height]), pixels.resize_to, pixels.size)
        return np.ascontiguousarray(evaluation_view(decoded, place, pixels))

    def _try(self, image: Image) -> tuple[str, np.ndarray | None, str]:
        name = inputs.name_of(image)
        try:
            return name, self._pixels(image), ""
        except Undecodable as error:
            return name, None, error.reason

    def _answers(self, decoded: list[tuple[str, np.ndarray | None, str]], top_k: int) -> Iterator[Prediction]:
        good = [pixels for _, pixels, _ in decoded if pixels is not None]
        scores = self.engine.scores(np.stack(good)) if good else np.zeros((0, len(self.classes)), np.float32)
        answers = iter(zip(scores, self.engine.labels.decide(scores, self.engine.thresholds), strict=True))
        for name, pixels, error in decoded:
            yield Prediction(name, error=error) if pixels is None else self._answer(name, *next(answers), top_k)

    def _answer(self, name: str, scores: np.ndarray, holds: np.ndarray, top_k: int) -> Prediction:
        parts = self.engine.labels.parts
        tasks = {task.name: _answer_to(task, name, scores[part], holds[part], top_k) for task, part in parts}
        if len(tasks) == 1:
            return next(iter(tasks.values()))
        labels = tuple((self.classes[k], float(scores[k])) for k in np.flatnonzero(holds))
        return Prediction(name, confidence=math.nan, labels=labels, tasks=tasks)


def _answer_to(task: Task, path: str, scores: np.ndarray, holds: np.ndarray, top_k: int) -> Prediction:
    """The answer to one task, from the scores of its classes and which of them hold."""
    order = np.argsort(-scores, kind="stable")
    top = tuple((task.classes[k], float(scores[k])) for k in order[:top_k])
    if task.kind == "one_of":
        return Prediction(path, *top[0], top, labels=top[:1])
    labels = tuple((task.classes[k], float(scores[k])) for k in order if holds[k])
    return Prediction(path, JOINT.join(name for name, _ in labels), math.nan, top, labels=labels, kind="any_of")


def _check_top_k(top_k: int) -> int:
    if top_k < 1:
        raise ConfigError("C003", f"top_k must be at least 1, got {top_k}")
    return top_k


@dataclass(frozen=True)
class Gathered:
    """What is to be predicted: files, and what was not a file of the disk; and files of folders that are no images."""

    images: tuple[Image, ...]
    passed_over: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    def note(self) -> str:
        """What was passed over and which folders cannot be read; empty when there is nothing."""
        return "; ".join([*self.notices[:_NOTICES], *skipped.note(self.passed_over, "passed over")])


def gather(images: Iterable[Image] | str | Path) -> Gathered:
    """List the images that are meant. Those of a folder come by name, found by their content as `train` finds them.

    Raises:
        DataError: D001 for a path that does not exist, or is a run; D002 when a folder holds no image.
    """
    found: list[Image] = []
    passed_over: list[str] = []
    notices: list[str] = []
    for image in inputs.each(images):
        place = Path(image) if isinstance(image, str | Path) else None
        if place is None or not os.path.isdir(place):
            if place is not None and (lack := lack_of(place)):
                raise DataError("D001", f"{place} {lack}", try_="imgcls-fast predict RUN IMAGES...")
            found.append(image if place is None else place)
            continue
        inside = unlabelled(place)
        passed_over += [str(place / path) for path in inside.passed_over]
        notices += inside.notices
        if not inside.images:
            others = f", and {len(inside.passed_over):,} other files" if inside.passed_over else ""
            why = "; ".join(inside.notices[:_NOTICES])
            raise DataError("D002", f"there are no images in {place}{others}", why=why, try_="imgcls-fast data check DATA")
        found += [place / path for path in inside.images]
    return Gathered(tuple(found), tuple(passed_over), tuple(notices))
