"""What the scan says about classes and channels: a fact with its figures, and what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.config import RunConfig
from imgcls_fast.core.options import flags_of
from imgcls_fast.core.settings import build_config
from imgcls_fast.data.findings import DataProblems, ScanOptions
from imgcls_fast.data.prepare import training_options
from imgcls_fast.data.scan import inspect, scan
from imgcls_fast.data.separators import joined_labels


def images(root: Path, mode: str = "RGB", ending: str = "png", **counts: int) -> Path:
    """So many pictures of noise per class."""
    for name, n in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            shape = (8, 8, 3) if mode == "RGB" else (8, 8)
            noise = np.random.default_rng([k, *name.encode()]).integers(0, 256, shape, dtype=np.uint8)
            picture = Image.fromarray(noise).convert("RGB" if mode == "gray as RGB" else mode)
            picture.save(root / name / f"{k}.{ending}")
    return root


def notices(source: Path, **options: object) -> list[str]:
    return list(inspect(source, ScanOptions(**options)).notices)  # type: ignore[arg-type]


def test_uneven_classes_are_told_with_the_flag_that_weighs_them(tmp_path: Path) -> None:
    (notice,) = notices(images(tmp_path, rare=20, usual=100))
    assert "usual has 100 images, 5 times as many as rare (20)" in notice and "--class-weights auto" in notice
    assert notices(tmp_path, weighted=True) == [] == notices(tmp_path, advice=False)
    assert notices(images(tmp_path, rare=21)) == []


def test_small_classes_are_counted_and_the_smallest_named(tmp_path: Path) -> None:
    (notice,) = notices(images(tmp_path, a=19, b=25, c=9))
    assert notice.startswith("fewer than 20 images in 2 of 3 classes (c 9, a 19)") and "--init pretrained" in notice
    assert "--init" not in notices(tmp_path, pretrained=True)[0]


@pytest.mark.parametrize(
    ("mode", "ending", "gray"), [("L", "png", True), ("LA", "png", True), ("gray as RGB", "png", True),
                                 ("gray as RGB", "jpg", True), ("RGB", "png", False), ("RGB", "jpg", False), ("P", "gif", False)],
)  # fmt: skip
def test_gray_images_are_found_however_they_are_stored(tmp_path: Path, mode: str, ending: str, gray: bool) -> None:
    root = images(tmp_path, "RGB" if mode == "P" else mode, ending, a=20, b=20)
    assert ["--channels 1" in notice and "all 40 images are gray" in notice for notice in notices(root)] == [True] * gray
    assert notices(root, color="gray") == notices(root, purpose="judge") == []


def test_one_image_in_colour_is_enough_to_say_nothing(tmp_path: Path) -> None:
    root = images(images(tmp_path, "L", a=20, b=20), "RGB", b=1)
    assert notices(root) == []


def test_every_flag_of_a_notice_is_one_of_train() -> None:
    names = {name for flag in flags_of("train") for name in flag.names}
    assert {"--class-weights", "--channels", "--init"} <= names


def test_nothing_is_suggested_that_was_asked_for() -> None:
    options = training_options(build_config({"data.source": "x", "pixels.color": "gray", "loss.class_weights": "auto",
                                            "model.init": "pretrained"}), Path())  # fmt: skip
    assert (options.advice, options.color, options.weighted, options.pretrained) == (True, "gray", True, True)
    assert not training_options(RunConfig(), Path()).advice  # of the embedded digits, which are as we made them


# ---------------------------------------------------------------- several labels in one column


def table(root: Path, labels: list[str], head: str = "path,label") -> Path:
    images(root, x=len(labels))
    rows = "".join(f'x/{k}.png,"{label}"\n' for k, label in enumerate(labels))
    (root / "t.csv").write_text(f"{head}\n{rows}")
    return root / "t.csv"


@pytest.mark.parametrize(
    ("labels", "separator", "classes"),
    [
        (["RBC|WBC", "RBC", "WBC"], "|", ("RBC", "WBC")),
        (["RBC|WBC", "RBC|Platelets", "WBC|Platelets"], "|", ("Platelets", "RBC", "WBC")),
        (["a; b", "a", "b"], ";", ("a", "b")),
        (["a,b", "a", "b", "c"], ",", ("a", "b", "c")),
        (["red|round", "red|big|round", "red|big"], "|", ("big", "red", "round")),
    ],
)
def test_several_labels_in_one_cell_are_several_labels(
    tmp_path: Path, labels: list[str], separator: str, classes: tuple[str, ...]
) -> None:
    found = inspect(table(tmp_path, labels))
    (task,) = found.manifest.labels.tasks
    assert not found.problems and (task.kind, task.classes) == ("any_of", classes)
    notice = f"labels: {len(classes)} classes, several per image (any_of): separator {separator}"
    assert found.notices[0] == notice
    held = [{c for c, v in zip(classes, row, strict=True) if v == 1} for row in found.manifest.answers[0]]
    assert held == [{part.strip() for part in label.split(separator)} for label in labels]


def test_one_of_the_labels_may_be_asked_for_alone(tmp_path: Path) -> None:
    source = table(tmp_path, ["RBC|WBC\",\"1", "RBC\",\"0", "WBC\",\"1"], "path,label,WBC")
    assert scan(source, ScanOptions(label_col="WBC")).manifest.labels.classes == ("0", "1")
    whole = scan(source, ScanOptions(label_kind="one_of")).manifest.labels
    assert whole.is_single and whole.classes == ("RBC", "RBC|WBC", "WBC")


def test_folders_that_seem_to_hold_several_labels_are_to_be_renamed(tmp_path: Path) -> None:
    with pytest.raises(DataProblems) as caught:
        scan(images(tmp_path, **{"a;b": 1, "a": 1, "b": 1}))
    assert caught.value.code == "D017" and "rename the folders: each is one class" in caught.value.try_


@pytest.mark.parametrize(
    "classes",
    [
        ["maillot", "maillot, tank suit", "crane"], ["Smith, Jane", "Smith, John", "Doe, John"], ["a|", "|a", "a"],
        ["yes|no", "maybe"], ["red|round", "red|square", "blue|round", "blue|square"],
        ["Tomato|healthy", "Tomato|blight", "Apple|healthy", "Apple|blight"], ["hot dog", "hot", "dog"], ["1,5", "2,5"],
    ],
)  # fmt: skip
def test_a_name_with_such_a_sign_in_it_is_a_name(classes: list[str]) -> None:
    assert joined_labels(classes) is None
