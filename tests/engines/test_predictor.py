"""Predictor: the same answer for the same picture, in whatever form it comes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.errors import ConfigError, DataError
from imgcls_fast.data.scan import inspect
from imgcls_fast.engines.predictor import Predictor, gather
from imgcls_fast.engines.runtimes import open_engine


@pytest.fixture
def predictor(bundle_of: Callable[..., Any]) -> Predictor:
    return Predictor(open_engine(bundle_of()), batch=4, top_k=3)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def test_path_text_bytes_pillow_and_array_get_the_same_answer(
    predictor: Predictor, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(pictures[0]))
    forms: list[Any] = [path, str(path), path.read_bytes(), Image.open(path), pictures[0]]
    scores = predictor.predict(forms)
    assert scores.shape == (5, 3)
    np.testing.assert_allclose(scores, scores[[0] * 5], atol=1e-6)  # not equal: batches of 4 and 1 add in another order
    assert len({predictor.preprocess(form).tobytes() for form in forms}) == 1
    answers = [predictor(form) for form in forms]
    assert len({(a.label, a.confidence) for a in answers}) == 1
    assert answers[0].label == predictor.classes[scores[0].argmax()]
    assert answers[0].confidence == pytest.approx(float(scores[0].max()))


def test_gray_rgba_and_16_bit_arrays_are_read_as_files_of_them_are(
    predictor: Predictor, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    gray = pictures[1][:, :, 0]
    rgba = np.dstack([pictures[1], np.full(gray.shape, 128, np.uint8)])
    deep = gray.astype(np.uint16) * 257
    for name, array in (("gray", gray), ("rgba", rgba), ("deep", deep)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(
            predictor.preprocess(array), predictor.preprocess(tmp_path / f"{name}.png"), err_msg=name
        )
    np.testing.assert_array_equal(predictor.preprocess(gray[:, :, None]), predictor.preprocess(gray))


def test_a_bad_one_in_a_list_is_told_and_the_others_keep_their_places(
    predictor: Predictor, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing")
    images: list[Any] = [*pictures[:5], broken, *pictures[5:9], tmp_path / "absent.png"]
    answers = predictor(images)
    assert [bool(a.error) for a in answers] == [False] * 5 + [True] + [False] * 4 + [True]
    assert answers[5].path == str(broken)
    assert [a.label for a in answers if not a.error] == [predictor(p).label for p in pictures[:9]]
    assert set(answers[5].to_dict()) == {"path", "error"}


def test_a_single_bad_image_raises_d012(predictor: Predictor) -> None:
    for ask in (predictor, predictor.preprocess, lambda image: predictor.predict([image])):
        with pytest.raises(DataError) as refused:
            ask(b"not an image")
        assert refused.value.code == "D012"


def test_predict_takes_of_a_folder_exactly_what_train_takes(
    predictor: Predictor, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    names = ("c0", "d1.png!d", "img.jpg_large", "D2.PNG", "deep/e.dat")
    for k, name in enumerate(names):
        path = tmp_path / "cat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pictures[k % len(pictures)]))
    (tmp_path / "cat" / "broken.png").write_bytes(b"no image")
    for name in ("notes.txt", "README", "empty"):
        (tmp_path / "cat" / name).write_bytes(b"no image"[len(name) - 5 :])
    found = inspect(tmp_path)
    taken = [*found.manifest.paths, *(bad.path for bad in found.quarantine)]
    asked = gather(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in asked.images) == sorted(taken)
    assert set(taken) == {"cat/broken.png", *(f"cat/{name}" for name in names)}
    assert len(asked.passed_over) == 3 == found.skipped and "3 files that are not images were passed over" in asked.note()
    assert len(list(predictor.stream(tmp_path))) == len(taken)


def test_a_run_is_no_folder_of_images(tmp_path: Path) -> None:
    for name in ("config.yaml", "manifest.npz", "plots.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="is a run"):
        gather(tmp_path)


def test_a_folder_is_answered_by_name_without_hidden_and_foreign_files(
    predictor: Predictor, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    for k in (3, 1, 2, 0, 4, 5):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / ("sub" if k > 3 else "") / f"{k}.png").write_bytes(png(pictures[k]))
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    answers = predictor(tmp_path)
    assert [Path(a.path).name for a in answers] == [f"{k}.png" for k in range(6)]
    assert [a.label for a in answers] == [predictor(pictures[k]).label for k in range(6)]


def test_a_stream_is_answered_in_order_and_never_held_as_a_whole(
    predictor: Predictor, pictures: list[np.ndarray]
) -> None:
    taken: list[int] = []

    def source() -> Any:
        for k in range(40):
            taken.append(k)
            yield pictures[k % len(pictures)]

    answers = predictor.stream(source())
    first = next(answers)
    assert len(taken) <= 3 * predictor.batch
    rest = list(answers)
    expected = predictor.predict([pictures[k % len(pictures)] for k in range(40)])
    assert [a.label for a in (first, *rest)] == [predictor.classes[k] for k in expected.argmax(1)]


def test_the_top_classes_come_in_order_and_sum_to_one(predictor: Predictor, pictures: list[np.ndarray]) -> None:
    answer = predictor(pictures[0])
    values = [value for _, value in answer.top]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1, abs=1e-5)
    assert answer.top[0] == (answer.label, answer.confidence)


@pytest.mark.parametrize(("size", "crop_pct"), [(32, 0.875), (64, 1.0)])
def test_the_pixels_are_those_of_torchvisions_evaluation_at_the_bundles_size(
    size: int, crop_pct: float, bundle_of: Callable[..., Any], pictures: list[np.ndarray]
) -> None:
    from torchvision.transforms import v2

    predictor = Predictor(open_engine(bundle_of(size=size, crop_pct=crop_pct)))
    resize_to = predictor.engine.pixels.resize_to
    reference = v2.Compose([v2.Resize(resize_to, antialias=True), v2.CenterCrop(size)])
    for picture in pictures[:8]:
        mine = predictor.preprocess(picture)
        assert mine.shape == (size, size, 3)
        expected = np.asarray(reference(Image.fromarray(picture)))
        difference = np.abs(mine.astype(int) - expected.astype(int))
        assert difference.max() <= 2
        assert difference.mean() <= 0.25


def test_a_turned_photo_gets_the_answer_of_the_upright_one(
    predictor: Predictor, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    upright = Image.fromarray(pictures[2])
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise for viewing
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(predictor.preprocess(tmp_path / "turned.png"), predictor.preprocess(pictures[2]))


def test_embeddings_are_what_the_last_layer_sees(predictor: Predictor, pictures: list[np.ndarray]) -> None:
    import torch

    features = predictor.embed(pictures[:6])
    head = predictor.engine.model.backbone.head  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = head(torch.from_numpy(features))
    scores = torch.softmax(logits / predictor.engine.temperature[0], 1).numpy()  # type: ignore[attr-defined]
    np.testing.assert_allclose(scores, predictor.predict(pictures[:6]), atol=1e-5)


def test_no_images_give_no_answers(predictor: Predictor) -> None:
    assert predictor([]) == []
    assert predictor.predict([]).shape == (0, 3)


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"top_k": 0}])
def test_a_batch_or_top_k_below_one_is_c003(arguments: dict[str, int], bundle_of: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError):
        Predictor(open_engine(bundle_of()), **arguments)
