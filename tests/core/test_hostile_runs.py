"""A stranger's run folder: whatever lies in it, reading it ends soon, with one clear error."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.bundle import read_bundle
from imgcls_fast.core.diary import last_end
from imgcls_fast.core.errors import DataError
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.manifest import Manifest, PathList
from imgcls_fast.core.overview import brief
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.core.run import Run


def manifest(n: int = 4) -> Manifest:
    ones = np.ones(n, np.int32)
    paths, labels = PathList.of([f"{k}.jpg" for k in range(n)]), LabelSpace.single(["a", "b"])
    small = ones.astype(np.uint8)
    return Manifest(
        Path("/d"), paths, labels, (ones,), small, -ones, ones, ones, small, np.zeros((n, 16), np.uint8), small
    )


def changed_manifest(path: Path, **columns: np.ndarray) -> None:
    """A manifest with other columns, and no digest of them: as a version before would have written it."""
    manifest().save(path)
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    head = json.loads(content["head"].tobytes())
    del head["sha256"]
    content["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    np.savez_compressed(path, **{**content, **columns})


def bomb(path: Path) -> None:
    """A column of 4 GB of zeros in 4 MB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (4 << 30,)})
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("label.npy", "w", force_zip64=True) as out,
    ):
        out.write(header.getvalue())
        for _ in range(1 << 8):
            out.write(bytes(1 << 20))


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(20 << 30)


def deep(path: Path) -> None:
    path.write_text("[" * 200_000)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def read_json(run: Run) -> Any:
    return run.read_json("data.json")


def predictions(run: Run) -> Any:
    return Predictions.load(run.evaluation("test"))


def oversized_scores(path: Path) -> None:
    (path.parent / "predictions.json").write_text('{"labels": {"tasks": []}, "fingerprint": "", "has_targets": false}')
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    path.write_bytes(header.getvalue() + bytes(64))


CASES: dict[str, tuple[str, Callable[[Path], Any], Callable[[Run], Any], str]] = {
    "20 GB of JSON": ("data.json", huge, read_json, "D016"),
    "200,000 brackets": ("data.json", deep, read_json, "D016"),
    "a pipe for JSON": ("data.json", pipe, read_json, "D016"),
    "20 GB of epochs": ("metrics.csv", huge, lambda run: run.epochs, "D016"),
    "a pipe for epochs": ("metrics.csv", pipe, lambda run: run.epochs, "D016"),
    "a cell of 1 MB": ("metrics.csv", lambda path: path.write_text("a\n" + "x" * 1_000_000), lambda run: run.epochs, "D016"),
    "20 GB of manifest": ("manifest.npz", huge, lambda run: run.manifest, "D009"),
    "a manifest that inflates": ("manifest.npz", bomb, lambda run: run.manifest, "D009"),
    "a pipe for a manifest": ("manifest.npz", pipe, lambda run: run.manifest, "D009"),
    "a label of 2 ** 31": (
        "manifest.npz", lambda path: changed_manifest(path, label=np.full(4, 2**31 - 1, np.int32)),
        lambda run: run.manifest.counts(), "D009"),
    "offsets behind the end": (
        "manifest.npz", lambda path: changed_manifest(path, path_offsets=np.array([0, 1, 2, 3, 1 << 40])),
        lambda run: list(run.manifest.paths), "D009"),
    "labels that are text": (
        "manifest.npz", lambda path: changed_manifest(path, label=np.array(["x"] * 4)), lambda run: run.manifest, "D009"),
    "20 GB of settings": ("config.yaml", huge, lambda run: run.config, "C005"),
    "20 GB of bundle": ("bundle/bundle.json", huge, lambda run: read_bundle(run.bundle_path), "M004"),
    "a deep bundle": ("bundle/bundle.json", deep, lambda run: read_bundle(run.bundle_path), "M004"),
    "a pipe for a bundle": ("bundle/bundle.json", pipe, lambda run: read_bundle(run.bundle_path), "M004"),
    "scores of 4 TB in 200 bytes": ("eval/test/scores.npy", oversized_scores, predictions, "D001"),
    "20 GB of predictions": ("eval/test/predictions.json", huge, predictions, "D001"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_of_a_run_is_refused_within_bounds(
    name: str, tmp_path: Path, in_bounds: Callable[..., Any]
) -> None:
    file, make, read, code = CASES[name]
    path = tmp_path / "run" / file
    path.parent.mkdir(parents=True)
    make(path)
    found = in_bounds(read, Run(tmp_path / "run"), memory_mib=400)
    assert found.code == code, found
    assert path.name in found.text or path.parent.name in found.text
    assert len(found.text) < 1000


def test_a_run_with_a_damaged_file_is_listed_beside_the_others(tmp_path: Path) -> None:
    for name, text in (("good", '{"source": "photos"}'), ("deep", "[" * 200_000), ("list", "[1]")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text("train: {}\n")
        (folder / "data.json").write_text(text)
    data = {name: brief(Run(tmp_path / name))["data"] for name in ("good", "deep", "list")}
    assert data == {"good": "photos", "deep": "unreadable (D016)", "list": None}


def test_hostile_lines_of_the_log_of_events_are_passed_over(tmp_path: Path) -> None:
    run = Run(tmp_path)
    good = json.dumps({"event": "done"})
    (tmp_path / "events.jsonl").write_bytes(b"[" * 200_000 + b"\n" + b"\xff\n" + good.encode() + b"\n" + b'{"event": "fai')
    ended = last_end(run.directory)
    assert ended is not None and ended["event"] == "done"


def test_a_huge_log_of_events_is_read_from_its_end(tmp_path: Path) -> None:
    huge(tmp_path / "events.jsonl")
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'\n{"event": "done"}\n')
    ended = last_end(tmp_path)
    assert ended is not None and ended["event"] == "done"


def test_a_pipe_in_place_of_the_log_of_events_does_not_block(tmp_path: Path) -> None:
    pipe(tmp_path / "events.jsonl")
    assert last_end(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [b"path,reason\na.jpg,cut\n", b"path,reason,split,label,size_bytes,found\na.jpg,cut,train,a,many,scan\n",
     b"path,reason,split,label,size_bytes,found\na.jpg\n\n", b'path,reason,split,label,size_bytes,found\n"a.jpg\n\n'],
    ids=["columns gone", "no number", "cut line", "open quote"],
)  # fmt: skip
def test_a_damaged_list_of_bad_images_is_one_error(content: bytes, tmp_path: Path) -> None:
    from imgcls_fast.data.quarantine import read_quarantine

    (tmp_path / "quarantine.csv").write_bytes(content)
    with pytest.raises(DataError) as refused:
        read_quarantine(tmp_path / "quarantine.csv")
    assert refused.value.code == "D016" and "quarantine.csv" in refused.value.message
