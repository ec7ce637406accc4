"""Splits of rows with several labels or tasks: each label in its share, groups whole, the same whatever the order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcls_fast.core.errors import DataError
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.manifest import NO_SPLIT, Manifest, PathList
from imgcls_fast.data.balance import columns_of, share_out
from imgcls_fast.data.split import make_splits


def manifest_of(labels: LabelSpace, answers: list[np.ndarray], group: np.ndarray | None = None) -> Manifest:
    n = len(answers[0])
    digest = np.zeros((n, 16), np.uint8)
    digest[:, :8] = (np.arange(n, dtype=np.uint64) + 1).view(np.uint8).reshape(n, 8)
    return Manifest(
        root=Path("/data"),
        paths=PathList.of(f"{i:05d}.png" for i in range(n)),
        labels=labels,
        answers=tuple(answers),
        split=np.full(n, NO_SPLIT, np.uint8),
        group=np.full(n, -1, np.int32) if group is None else group.astype(np.int32),
        width=np.ones(n, np.int32),
        height=np.ones(n, np.int32),
        orientation=np.ones(n, np.uint8),
        digest=digest,
        flags=np.zeros(n, np.uint8),
    )


def tags(n: int, shares: list[float], missing: float = 0.0, seed: int = 0) -> tuple[LabelSpace, np.ndarray]:
    rng = np.random.default_rng(seed)
    held = (rng.random((n, len(shares))) < shares).astype(np.int8)
    held[rng.random(held.shape) < missing] = -1
    return LabelSpace((Task("label", tuple(f"t{k}" for k in range(len(shares))), "any_of"),)), held


def deviation(manifest: Manifest) -> np.ndarray:
    """(3, K) images of each label in each split, less its exact share."""
    shares = np.array([0.8, 0.1, 0.1])[:, None]
    counts = np.stack([manifest.counts(split) for split in ("train", "val", "test")])
    return counts - shares * manifest.counts()


def test_labels_are_in_their_share_in_each_of_five_parts() -> None:
    labels, held = tags(1000, np.linspace(0.02, 0.98, 20).tolist())
    columns, rarer = columns_of(held.astype(np.float32), labels.any_of)
    keys = np.random.default_rng(1).permutation(1000).astype(np.uint64)
    place = share_out(columns, rarer, np.arange(1000), keys, np.full(5, 0.2))
    counts = np.stack([held[place == part].sum(0) for part in range(5)])
    assert np.abs(counts - held.sum(0) / 5).mean() < 0.6 and np.abs(np.bincount(place) - 200).max() <= 2


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_each_label_keeps_its_share_also_where_some_are_unknown(missing: float) -> None:
    labels, held = tags(400, [0.5, 0.03, 0.97, 0.2], missing)
    done = make_splits(manifest_of(labels, [held]))
    assert np.abs(deviation(done)).max() <= 1.5
    without = manifest_of(labels, [np.where(held < 0, -1, 1 - held).astype(np.int8)]).with_splits(done.split)
    assert np.abs(deviation(without)).max() <= 1.5, "nor are the images without a label all in one split"


def test_several_tasks_are_shared_out_together() -> None:
    rng = np.random.default_rng(2)
    color, (_, held) = rng.choice(4, 300, p=[0.6, 0.25, 0.1, 0.05]).astype(np.int32), tags(300, [0.4, 0.1])
    color[rng.random(300) < 0.2] = -1
    labels = LabelSpace((Task("color", ("a", "b", "c", "d")), Task("tags", ("x", "y"), "any_of")))
    done = make_splits(manifest_of(labels, [color, held]))
    assert np.abs(deviation(done)).max() <= 1.7
    assert [len(done.rows(split)) for split in ("train", "val", "test")] == pytest.approx([240, 30, 30], abs=1)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_groups_stay_whole_each_label_is_learnt_and_the_order_does_not_matter(data: st.DataObject) -> None:
    n = data.draw(st.integers(6, 60))
    seed = data.draw(st.integers(0, 99))
    labels, held = tags(n, [0.5, 0.1, 0.9], seed=seed)
    group = np.random.default_rng(seed).integers(-1, n // 3, n) if data.draw(st.booleans()) else None
    manifest = manifest_of(labels, [held], group)
    order = np.random.default_rng(seed + 1).permutation(n)
    try:
        first, second = make_splits(manifest, seed=3), make_splits(manifest.take(order), seed=3)
    except DataError as error:
        assert error.code == "D008"
        return
    assert (first.split[order] == second.split).all() and set(first.split.tolist()) == {0, 1, 2}
    assert (first.counts("train")[first.counts() > 0] > 0).all()
    for one in set(first.group[first.group >= 0].tolist()):
        assert len(set(first.split[first.group == one].tolist())) == 1


def test_a_rare_label_is_in_every_split_when_there_are_enough() -> None:
    labels, held = tags(200, [0.5, 0.0])
    held[[3, 70, 150], 1] = 1
    assert make_splits(manifest_of(labels, [held])).counts("val")[1] == 1


def test_fewer_groups_than_splits_are_refused() -> None:
    labels, held = tags(10, [0.5, 0.5])
    with pytest.raises(DataError, match="2 groups cannot be shared out") as caught:
        make_splits(manifest_of(labels, [held], np.arange(10) % 2))
    assert caught.value.code == "D008"
