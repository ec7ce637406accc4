"""The manifest: saved without pickle, never half read, and fingerprinted by content."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls_fast.core.errors import DataError
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.manifest import NO_SPLIT, Manifest, PathList

COLUMNS = ("label", "split", "group", "width", "height", "orientation", "digest", "flags")
ODD_NAMES = [
    "plain.jpg",
    "",
    "žluť/花 .png",
    os.fsdecode(b"caf\xe9/\xff\xfe.jpg"),
    "a\nb\t'\"\\.jpg",
    "/abs/x.png",
    "z" * 4000,
]


def example(n: int = 7, paths: list[str] | None = None) -> Manifest:
    rng = np.random.default_rng(n)
    return Manifest(
        root=Path("/some/where"),
        paths=PathList.of(paths or ODD_NAMES[:n]),
        labels=LabelSpace.single(["cat", "dog", "käse"]),
        answers=(rng.integers(-1, 3, n).astype(np.int32),),
        split=rng.choice([0, 1, 2, NO_SPLIT], n).astype(np.uint8),
        group=rng.integers(-1, 3, n).astype(np.int32),
        width=rng.integers(1, 4000, n).astype(np.int32),
        height=rng.integers(1, 4000, n).astype(np.int32),
        orientation=rng.integers(1, 9, n).astype(np.uint8),
        digest=rng.integers(0, 256, (n, 16)).astype(np.uint8),
        flags=rng.integers(0, 4, n).astype(np.uint8),
        source="photos/ž",
        group_names=("one", "two", os.fsdecode(b"\xe9")),
    )


def assert_equal(one: Manifest, two: Manifest) -> None:
    assert (one.root, one.labels, one.source, one.group_names) == (two.root, two.labels, two.source, two.group_names)
    assert list(one.paths) == list(two.paths)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
        assert getattr(one, name).dtype == getattr(two, name).dtype
    assert one.fingerprint == two.fingerprint


# ---------------------------------------------------------------- paths


@given(st.lists(st.binary(max_size=20)))
def test_any_bytes_can_be_a_path_and_come_back_unchanged(names):
    strings = [os.fsdecode(name) for name in names]
    paths = PathList.of(strings)
    assert len(paths) == len(names) and list(paths) == strings
    assert [os.fsencode(path) for path in paths] == names


def test_a_path_list_is_indexed_like_a_list():
    paths = PathList.of(ODD_NAMES)
    assert paths[0] == ODD_NAMES[0] and paths[-1] == ODD_NAMES[-1] and paths[np.int64(2)] == ODD_NAMES[2]
    assert paths[1:5:2] == ODD_NAMES[1:5:2] and paths[::-1] == ODD_NAMES[::-1]
    assert paths[np.array([3, 0])] == [ODD_NAMES[3], ODD_NAMES[0]] and paths[[1]] == [ODD_NAMES[1]]
    for wrong in (len(ODD_NAMES), -len(ODD_NAMES) - 1):
        with pytest.raises(IndexError):
            paths[wrong]
    assert list(PathList.of([])) == []


# ---------------------------------------------------------------- save and load


@pytest.mark.parametrize("n", [1, 3, 7])
def test_what_is_saved_is_loaded_with_odd_names_and_all(tmp_path, n):
    manifest = example(n)
    manifest.save(tmp_path / "manifest.npz")
    assert_equal(Manifest.load(tmp_path / "manifest.npz"), manifest)
    assert os.listdir(tmp_path) == ["manifest.npz"]


def test_an_empty_manifest_can_be_saved(tmp_path):
    empty = example(3).take(np.arange(0))
    empty.save(tmp_path / "m.npz")
    assert_equal(Manifest.load(tmp_path / "m.npz"), empty)


def test_nothing_in_the_file_is_pickled_and_a_pickle_is_refused(tmp_path):
    path = tmp_path / "m.npz"
    example().save(path)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert content.startswith(b"\x93NUMPY") and b"'|O'" not in content[:128]
        members = {name: archive.read(name) for name in archive.namelist()}
    trap = io.BytesIO()
    np.save(trap, np.array([Trap()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, trap.getvalue() if name == "label.npy" else content)
    with pytest.raises(DataError) as caught:
        Manifest.load(path)
    assert caught.value.code == "D009"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError):
        Manifest.load(path)


class Trap:
    """Unpickling it would raise something that nobody catches."""

    def __reduce__(self):
        return (_spring, ())


def _spring() -> None:
    raise KeyboardInterrupt("unpickled")


def test_every_damaged_byte_and_every_cut_gives_d009_or_the_same_manifest(tmp_path):
    path = tmp_path / "m.npz"
    manifest = example(3)
    manifest.save(path)
    whole = path.read_bytes()
    refused = 0
    damaged = [whole[:n] for n in range(0, len(whole), 37)]
    for at in range(0, len(whole), 7):
        for flip in (0x01, 0xFF):
            damaged.append(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        try:
            loaded = Manifest.load(path)
        except DataError as error:
            assert error.code == "D009" and str(path) in error.message and error.try_
            refused += 1
        else:
            assert_equal(loaded, manifest)
    assert refused > len(damaged) / 2


def test_a_missing_file_and_a_folder_give_d009(tmp_path):
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(DataError) as caught:
            Manifest.load(path)
        assert caught.value.code == "D009"


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match="column width has 2 rows, expected 3"):
        replace(example(3), width=np.zeros(2, np.int32))


# ---------------------------------------------------------------- content


def test_the_fingerprint_changes_with_every_part_of_the_content():
    manifest = example(5)
    changed = [
        replace(manifest, labels=LabelSpace.single(["cat", "dog", "cheese"])),
        replace(manifest, labels=LabelSpace((Task("label", manifest.labels.classes, "any_of"),))),
        replace(manifest, paths=PathList.of([*list(manifest.paths)[:4], "other"])),
        replace(manifest, paths=PathList.of(["plain.jpgž", "", *list(manifest.paths)[2:]])),
        manifest.take(np.array([0, 1, 2, 4, 3])),
        manifest.take(np.arange(4)),
    ]
    for name in ("label", "split", "digest"):
        for row in range(5):
            column = getattr(manifest, name).copy()
            column[row] ^= 1
            changed.append(replace(manifest, **({"answers": (column,)} if name == "label" else {name: column})))
    prints = {m.fingerprint for m in changed}
    assert len(prints) == len(changed) and manifest.fingerprint not in prints


def test_the_fingerprint_holds_groups_and_is_what_it_was_without_them():
    alone = replace(example(), group=np.full(7, -1, np.int32), group_names=())
    together = replace(alone, group=np.array([0, 0, 1, -1, -1, -1, -1], np.int32))
    apart = replace(alone, group=np.array([0, 1, 1, -1, -1, -1, -1], np.int32))
    assert len({m.fingerprint for m in (alone, together, apart, replace(apart, group_names=("a", "b")))}) == 4
    assert replace(alone, group_names=("unused",)).fingerprint == alone.fingerprint


def test_moving_letters_between_neighbouring_paths_changes_the_fingerprint():
    assert example(2, ["ab", "c"]).fingerprint != example(2, ["a", "bc"]).fingerprint


def test_the_fingerprint_does_not_depend_on_the_place_of_the_data():
    manifest = example(5)
    moved = replace(manifest, root=Path("/elsewhere"), source="other")
    assert moved.fingerprint == manifest.fingerprint and len(manifest.fingerprint) == 64


def test_a_copy_with_other_splits_has_its_own_fingerprint_and_leaves_the_original():
    manifest = example(5)
    before, split = manifest.fingerprint, manifest.split.copy()
    other = manifest.with_splits((manifest.split + 1) % 3)
    assert other.fingerprint != before == manifest.fingerprint
    np.testing.assert_array_equal(manifest.split, split)


def test_turned_size_swaps_width_and_height_for_orientations_5_to_8():
    manifest = replace(
        example(7).take(np.zeros(8, np.int64)),
        orientation=np.arange(1, 9, dtype=np.uint8),
        width=np.full(8, 30, np.int32),
        height=np.full(8, 20, np.int32),
    )
    width, height = manifest.turned_size()
    assert width.tolist() == [30] * 4 + [20] * 4 and height.tolist() == [20] * 4 + [30] * 4
    assert width.dtype == height.dtype == np.int64


def test_rows_counts_and_targets_follow_labels_and_splits():
    manifest = replace(
        example(6),
        answers=(np.array([0, 2, -1, 2, 1, 0], np.int32),),
        split=np.array([0, 0, 1, 2, NO_SPLIT, 2], np.uint8),
    )
    assert [manifest.rows(s).tolist() for s in ("train", "val", "test")] == [[0, 1], [2], [3, 5]]
    assert manifest.counts().tolist() == [2, 1, 2] and manifest.counts("test").tolist() == [1, 0, 1]
    expected = np.array([[1, 0, 0], [np.nan] * 3, [0, 0, 1]], np.float32)
    np.testing.assert_array_equal(manifest.targets(np.array([0, 2, 3])), expected)


def test_rows_are_renumbered_by_take_and_paths_are_joined_to_the_root():
    manifest = example(7).take(np.array([5, 0, 3]))
    assert list(manifest.paths) == [ODD_NAMES[5], ODD_NAMES[0], ODD_NAMES[3]]
    assert manifest.path(0) == Path("/abs/x.png") and manifest.path(1) == Path("/some/where/plain.jpg")
    assert os.fsencode(manifest.path(2)) == b"/some/where/caf\xe9/\xff\xfe.jpg"


def test_labels_survive_json_and_number_the_columns_of_all_tasks():
    labels = LabelSpace((Task("kind", ("a", "b")), Task("marks", ("x", "y", "z"), "any_of")))
    assert labels.classes == ("kind: a", "kind: b", "marks: x", "marks: y", "marks: z") and labels.size == 5
    assert LabelSpace.from_dict(labels.to_dict()) == labels


# ---------------------------------------------------------------- rows that stand for all


@given(st.lists(st.integers(-1, 4), max_size=60), st.integers(-1, 70), st.integers(0, 2**64))
def test_a_spread_of_rows_is_sorted_leaves_no_class_out_and_keeps_the_shares(
    labels: list[int], n: int, seed: int
) -> None:
    manifest = example(3).take(np.zeros(len(labels) + 2, np.int64))
    manifest = replace(manifest, answers=(np.array([0, 0, *labels], np.int32),))
    rows = np.arange(2, len(labels) + 2)
    got = manifest.spread(rows, n)
    assert len(got) == min(max(n, 0), len(rows)) and (np.diff(got) > 0).all() and set(got) <= set(rows)
    np.testing.assert_array_equal(got, manifest.spread(rows, n))
    sizes = {c: labels.count(c) for c in set(labels)}
    for c, size in sizes.items():
        taken, share = int((manifest.label[got] == c).sum()), len(got) * size / max(1, len(labels))
        assert taken >= 1 or n < len(sizes)
        assert abs(taken - share) <= len(sizes)
    assert sorted(manifest.fair_order(rows, seed)) == rows.tolist()


def test_a_spread_of_sorted_rows_is_not_their_beginning() -> None:
    manifest = replace(example(1).take(np.zeros(1000, np.int64)), answers=(np.repeat(np.arange(4), 250).astype(np.int32),))
    got = manifest.spread(np.arange(1000), 200)
    assert np.bincount(manifest.label[got]).tolist() == [50] * 4
    assert got.max() > 900 and np.diff(got).max() < 60, "within a class as well"
