"""Labels of every kind reach the model as the manifest has them: by each loader, through each way, with and without padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.manifest import Manifest
from imgcls_fast.loading import handover
from imgcls_fast.loading.loader import dali_missing, read_rows

N = 11
needs_dali = pytest.mark.skipif(bool(dali_missing()), reason=str(dali_missing()))
BACKENDS = [("torch", 0), pytest.param(("dali-cpu", 1), marks=needs_dali)]

SINGLE = Task("kind", ("a", "b", "c"))
MARKS = Task("marks", ("x", "y"), "any_of")
CLASSES = np.array([0, 1, 2, -1, 1, 0, 2, 2, -1, 0, 1], np.int32)
BITS = np.array([[0, 1], [1, 1], [-1, 0], [-1, -1], [0, 0], [1, 0], [1, -1], [0, 1], [1, 1], [0, 0], [-1, -1]], np.int8)
SOFT = np.random.default_rng(0).dirichlet((1, 1, 1), N).astype(np.float32)
SOFT[[0, 7]] = np.nan
LABELS = {
    "any_of": ((MARKS,), (BITS,)),
    "two tasks": ((SINGLE, MARKS), (CLASSES, BITS)),
    "soft": ((SINGLE,), (SOFT,)),
    "all": ((SINGLE, replace(MARKS, name="more"), replace(SINGLE, name="soft")), (CLASSES, BITS.astype(np.float32) / 2, SOFT)),
}
LABELS["all"][1][1][BITS < 0] = np.nan


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, photo: Any) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for k in range(N):
        photo(k).save(folder / f"{k:02}.jpg")
    return folder


def labelled(kit: Any, photos: Path, kind: str) -> Manifest:
    tasks, answers = LABELS[kind]
    manifest: Manifest = kit.manifest(photos, sorted(path.name for path in photos.iterdir()))
    return replace(manifest, labels=LabelSpace(tasks), answers=answers)


def assert_targets(manifest: Manifest, batches: list[Any]) -> None:
    """Each good row has its own targets, NaN and all; padding has none that could leak."""
    for batch in batches:
        good = batch.rows >= 0
        assert batch.targets.shape == (len(batch.rows), manifest.labels.size) and batch.targets.dtype == np.float32
        np.testing.assert_array_equal(batch.targets[good], manifest.targets(batch.rows[good]))
        assert not batch.targets[~good].any() and (batch.weight == good).all()


def judged(kit: Any, manifest: Manifest, backend: str, workers: int) -> list[Any]:
    stream = read_rows(manifest, np.arange(N), kit.pixels(), batch_size=4, backend=backend, workers=workers)
    return [kit.copy(batch) for batch in stream]


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_every_loader_delivers_the_targets_of_the_manifest(
    kit: Any, photos: Path, backend: tuple[str, int], kind: str
) -> None:
    manifest = labelled(kit, photos, kind)
    batches = judged(kit, manifest, *backend)
    assert np.concatenate([batch.rows for batch in batches]).tolist() == [*range(N), -1]
    assert_targets(manifest, batches)


@pytest.mark.parametrize("free", [None, 1000], ids=["shared memory", "pipes"])
def test_targets_cross_the_border_of_a_process_as_they_are(
    kit: Any, photos: Path, free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "free_bytes", lambda: free)
    monkeypatch.setattr("imgcls_fast.loading.torch_loader._warn", lambda text: None)
    manifest = labelled(kit, photos, "all")
    kit.assert_same(judged(kit, manifest, "torch", 1), judged(kit, manifest, "torch", 0))


@pytest.mark.parametrize("backend", ["torch", pytest.param("dali-cpu", marks=needs_dali)])
def test_a_bad_image_takes_its_unknown_labels_with_it(kit: Any, photos: Path, photo: Any, tmp_path: Path, backend: str) -> None:
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = labelled(kit, tmp_path, "all")
    (tmp_path / "03.jpg").write_bytes(b"no image")  # nothing is known of row 3; row 0, which stands in, has NaN as well
    batches = kit.run(kit.sampler(manifest, 5, kit.plain), backend, 0 if backend == "torch" else 1, epochs=(0, 1))
    assert_targets(manifest, batches)
    assert any((batch.rows < 0).any() for batch in batches) and not any((batch.rows == 3).any() for batch in batches)


def test_some_rows_are_spread_over_all_answers_of_data_with_several_tasks(kit: Any, photos: Path) -> None:
    manifest = labelled(kit, photos, "two tasks")
    picked = manifest.stratum[manifest.spread(np.arange(N), len(np.unique(manifest.stratum)))]
    assert sorted(picked.tolist()) == np.unique(manifest.stratum).tolist()
