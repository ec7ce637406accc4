"""Predictor from Python: every form of an image, one or several, and answers that can be read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import imgcls_fast as ic
from imgcls_fast.api import judge as api
from imgcls_fast.core.errors import ConfigError, DataError, UsageError
from imgcls_fast.core.run import Run
from imgcls_fast.engines.predictor import Predictor
from imgcls_fast.engines.runtimes import open_engine


@pytest.fixture(scope="module")
def predictor(shared_bundle_of: Callable[..., Any]) -> Predictor:
    return Predictor(open_engine(shared_bundle_of()), batch=4, top_k=2)


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def test_open_files_buffers_and_tensors_are_the_same_picture(predictor: Predictor, pictures: list[np.ndarray], tmp_path: Path) -> None:
    picture, content = pictures[0], _png(pictures[0])
    (tmp_path / "a.png").write_bytes(content)
    written = io.BytesIO()
    written.write(content)  # and left at its end
    chw = torch.from_numpy(picture).permute(2, 0, 1)
    with (tmp_path / "a.png").open("rb") as file:
        forms: list[Any] = [
            file, written, bytearray(content), memoryview(content), chw, chw.float() / 255, chw.double() / 255,
            torch.from_numpy(picture), picture.astype(np.float32) / 255, (tmp_path / "a.png"),
        ]  # fmt: skip
        pixels = [predictor.preprocess(form) for form in forms]
    for form, found in zip(forms, pixels, strict=True):
        np.testing.assert_array_equal(found, predictor.preprocess(picture), err_msg=str(type(form)))


def test_gray_and_half_precision_tensors_are_read(predictor: Predictor, pictures: list[np.ndarray]) -> None:
    gray = pictures[1][:, :, 0]
    for form in (torch.from_numpy(gray), torch.from_numpy(gray)[None]):
        np.testing.assert_array_equal(predictor.preprocess(form), predictor.preprocess(gray))
    bright = torch.ones(3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    assert (predictor.preprocess(bright) == 255).all()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "None is no image; expected a path, bytes, an open file, a Pillow image"),
        ({"path": "a.jpg"}, "an object of type dict is no image"),
        (3, "an object of type int is no image"),
        (torch.zeros(5, 8, 9), r"shape \(C, H, W\) or \(H, W\), got \(5, 8, 9\)"),
        (torch.full((3, 8, 8), 255.0), r"must lie in 0\.\.1, got 255 to 255"),
        (torch.randn(3, 8, 8), "the model normalises by itself"),
        (np.full((8, 8), np.nan), r"must lie in 0\.\.1"),
        (io.StringIO("text"), "open it with mode 'rb'"),
        (io.BytesIO(b""), "empty"),
    ],
    ids=["None", "dict", "int", "shape", "0 to 255", "normalised", "NaN", "text", "empty"],
)
def test_what_is_no_image_is_told_and_has_an_error_in_a_list(
    image: Any, words: str, predictor: Predictor, pictures: list[np.ndarray]
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        predictor(image)
    assert caught.value.code == "D012"
    good, bad = predictor([pictures[0], image])
    assert good.label and not good.error and bad.error and not bad.label


def test_batches_and_single_images_are_told_apart(predictor: Predictor, pictures: list[np.ndarray], tmp_path: Path) -> None:
    batch = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (0, 99, 255)])
    alone = [predictor(picture).label for picture in batch]
    for form in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2), list(batch), iter(batch)):
        assert [answer.label for answer in predictor(form)] == alone
    (tmp_path / "a.png").write_bytes(_png(pictures[0]))
    for form in (str(tmp_path / "a.png"), tmp_path, pictures[0], _png(pictures[0])):
        assert predictor.predict(form).shape == (1, 3)
        assert len(predictor.embed(form)) == 1


def test_top_k_can_be_given_with_each_call(predictor: Predictor, pictures: list[np.ndarray]) -> None:
    assert len(predictor(pictures[0]).top) == 2 and len(predictor(pictures[0], top_k=3).top) == 3
    assert [len(answer.top) for answer in predictor.stream(pictures[:2], top_k=1)] == [1, 1]
    with pytest.raises(ConfigError, match="top_k must be at least 1, got 0"):
        predictor(pictures[0], top_k=0)


def test_leaving_the_block_frees_the_engine(shared_bundle_of: Callable[..., Any], pictures: list[np.ndarray]) -> None:
    with Predictor(open_engine(shared_bundle_of())) as opened:
        assert opened(pictures[0]).label
    with pytest.raises(RuntimeError, match="closed"):
        opened(pictures[0])


def test_objects_show_what_they_are(predictor: Predictor, pictures: list[np.ndarray], tmp_path: Path) -> None:
    assert repr(predictor).startswith("Predictor(torch on cpu, ") and "3 classes: 'class 0', 'class 1', 'class 2')" in repr(predictor)
    answer = predictor(pictures[0])
    assert repr(answer) == f"Prediction(path='<ndarray>', label={answer.label!r}, confidence={answer.confidence:.3f})"
    (bad,) = predictor([None])
    assert repr(bad).startswith("Prediction(path='<NoneType>', error='None is no image")
    assert repr(Run(tmp_path)) == f"Run({str(tmp_path)!r}, not finished)"


def test_predict_takes_images_alone_and_asks_for_them_where_a_run_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    class Recorder:
        def stream(self, images: Any) -> Any:
            asked.append(tuple(images))
            return iter(())

        def close(self) -> None:
            pass

    def opened(run: Any, **_: Any) -> Recorder:
        asked.append(run)
        return Recorder()

    monkeypatch.setattr(api, "Predictor", opened)
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path))
    image = tmp_path / "a.png"
    image.write_bytes(b"x")
    for form in (str(image), image, [image], b"x", np.zeros((2, 2), np.uint8)):
        ic.predict(form)
        run, images = asked[-2:]
        assert run is None and len(images) == 1
    ic.predict("first", [image])
    assert asked[-2:] == ["first", (image,)]
    with pytest.raises(DataError, match=r"absent\.png does not exist"):
        ic.predict("absent.png")
    for arguments in ((), (None, None), (Run(tmp_path),)):
        with pytest.raises(UsageError, match="predict needs images") as caught:
            ic.predict(*arguments)
        assert "ic.predict(run, images)" in str(caught.value)
