"""Splits: each row in exactly one, groups whole, classes in proportion, test rows locked, the same every time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imgcls_fast.core.errors import DataError
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.manifest import NO_SPLIT, SPLITS, Manifest, PathList
from imgcls_fast.data.duplicates import components, joined, near_units
from imgcls_fast.data.findings import ScanOptions
from imgcls_fast.data.scan import scan
from imgcls_fast.data.split import make_splits, write_split_csv


def manifest_of(label, split=None, group=None, digest=None, paths=None) -> Manifest:
    n = len(label)
    blank = np.zeros((n, 16), np.uint8)
    blank[:, :8] = (np.arange(n, dtype=np.uint64) + 1).view(np.uint8).reshape(n, 8)
    return Manifest(
        root=Path("/data"),
        paths=PathList.of(paths or [f"{i:05d}.png" for i in range(n)]),
        labels=LabelSpace.single([f"c{k}" for k in range(max(label, default=0) + 1)]),
        answers=(np.array(label, np.int32),),
        split=np.full(n, NO_SPLIT, np.uint8) if split is None else np.array(split, np.uint8),
        group=np.full(n, -1, np.int32) if group is None else np.array(group, np.int32),
        width=np.ones(n, np.int32),
        height=np.ones(n, np.int32),
        orientation=np.ones(n, np.uint8),
        digest=blank if digest is None else digest,
        flags=np.zeros(n, np.uint8),
    )


labels = st.lists(st.integers(0, 3), min_size=3, max_size=200)
shares = st.tuples(st.floats(0.2, 1), st.floats(0.02, 0.5), st.floats(0.02, 0.5))


@settings(deadline=None, max_examples=150)
@given(labels, shares, st.integers(0, 5))
def test_without_groups_class_counts_are_exact_by_largest_remainder(label, fractions, seed):
    try:
        m = make_splits(manifest_of(label), fractions=fractions, seed=seed)
    except DataError as error:
        assert error.code == "D008" and np.bincount(label).max() < 3, "three of one class can always be shared out"
        return
    assert set(m.split.tolist()) == {0, 1, 2}
    weights = np.array(fractions) / sum(fractions)
    for k in set(label):
        counts = np.bincount(m.split[m.label == k], minlength=3)
        n = int(counts.sum())
        quota = weights * n
        if n >= 3:
            assert counts.min() >= 1
        if quota.min() >= 1:
            assert (np.abs(counts - quota) < 1).all()
            spare = n - int(np.floor(quota + 1e-9).sum())
            assert set(np.flatnonzero(counts > np.floor(quota + 1e-9))) <= set(
                np.argsort(-(quota % 1), kind="stable")[: max(spare, 1)]
            )


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_groups_and_equal_files_are_never_parted(data):
    n = data.draw(st.integers(6, 120))
    label = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    group = data.draw(st.lists(st.integers(-1, n // 4), min_size=n, max_size=n))
    content = data.draw(st.lists(st.integers(0, n), min_size=n, max_size=n))
    digest = np.zeros((n, 16), np.uint8)
    digest[:, 0], digest[:, 1] = np.array(content) % 256, 1
    m = manifest_of(label, group=group, digest=digest)
    try:
        done = make_splits(m, seed=data.draw(st.integers(0, 3)))
    except DataError as error:
        assert error.code == "D008"
        return
    assert set(done.split.tolist()) == {0, 1, 2}
    unit = joined(np.array(group), np.array(content))
    for u in set(unit.tolist()):
        assert len(set(done.split[unit == u].tolist())) == 1
    for k in set(label):
        assert (done.split[np.array(label) == k] == 0).any(), "every class can be learnt"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_split_depends_on_paths_and_seed_and_not_on_order(data):
    n = data.draw(st.integers(5, 80))
    label = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    group = data.draw(st.none() | st.lists(st.integers(-1, n), min_size=n, max_size=n))
    m = manifest_of(label, group=group)
    order = np.array(data.draw(st.permutations(range(n))))
    try:
        first, second = make_splits(m, seed=3), make_splits(m.take(order), seed=3)
    except DataError as error:
        assert error.code == "D008"
        return
    assert dict(zip(first.paths, first.split.tolist(), strict=True)) == dict(
        zip(second.paths, second.split.tolist(), strict=True)
    )


def test_seeds_differ_and_repeat():
    m = manifest_of([0, 1] * 100)
    assert (make_splits(m, seed=1).split == make_splits(m, seed=1).split).all()
    assert (make_splits(m, seed=1).split != make_splits(m, seed=2).split).any()


def test_new_images_do_not_reshuffle_the_old_ones():
    small, large = make_splits(manifest_of([0] * 200)), make_splits(manifest_of([0] * 220))
    assert (small.split != large.split[:200]).mean() < 0.1


@pytest.mark.parametrize("group", [False, True])
def test_groups_of_many_sizes_still_come_near_the_shares(group):
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 150, 1500)
    label = (rng.integers(0, 3, 150)[owner] + (rng.random(1500) < 0.2)) % 3
    m = make_splits(manifest_of(label.tolist(), group=owner.tolist() if group else None), fractions=(0.7, 0.15, 0.15))
    for k in range(3):
        got = np.bincount(m.split[m.label == k], minlength=3) / (m.label == k).sum()
        assert np.abs(got - [0.7, 0.15, 0.15]).max() < (0.02 if group else 0.003)


def test_given_test_rows_are_locked_and_val_is_carved_from_train():
    split = [0] * 90 + [2] * 30
    m = make_splits(manifest_of([0, 1, 2] * 40, split=split), fractions=(0.8, 0.1, 0.1))
    assert (m.split[90:] == 2).all() and (m.split[:90] != 2).all()
    assert (m.split == 1).sum() == 10 - 1  # 3 classes of 30: 10/90 of each is 3.33
    assert [(m.split[m.label == k] == 1).sum() for k in range(3)] == [3, 3, 3]


def test_given_train_and_val_stay_and_nothing_is_carved():
    split = [0] * 30 + [1] * 10
    assert make_splits(manifest_of([0, 1] * 20, split=split)).split.tolist() == split
    full = split + [2] * 2
    assert make_splits(manifest_of([0, 1] * 21, split=full)).split.tolist() == full


def test_only_train_given_is_split_three_ways():
    m = make_splits(manifest_of([0] * 100, split=[0] * 100))
    assert np.bincount(m.split).tolist() == [80, 10, 10]


def test_rows_without_split_fill_what_is_missing_and_follow_their_group():
    split = [2] * 4 + [NO_SPLIT] * 40
    group = [0, 1, 2, 3, 0, 0, *range(4, 42)]
    m = make_splits(manifest_of([0, 1] * 22, split=split, group=group))
    assert m.split[:6].tolist() == [2] * 6, "the rest of a test group joins it: it may not be learnt from"
    assert set(m.split[6:].tolist()) == {0, 1}


def test_no_val_or_no_test_wanted():
    m = make_splits(manifest_of([0, 1] * 50), fractions=(0.8, 0.2, 0))
    assert np.bincount(m.split, minlength=3).tolist() == [80, 20, 0]
    assert (make_splits(manifest_of([0, 1] * 5), fractions=(1, 0, 0)).split == 0).all()


def test_small_classes_go_to_train_first():
    m = make_splits(manifest_of([0] * 50 + [1] + [2] * 2 + [3] * 3))
    assert m.split[50] == 0 and m.split[51:53].tolist() == [0, 0] and sorted(m.split[53:].tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("label", "group"),
    [([0, 1] * 10, [0] * 20), ([0, 1] * 10, [0, 1] * 10), ([0, 0, 0, 1, 1, 1, 2, 2], [0] * 3 + [1] * 3 + [2] * 2)],
)
def test_too_few_groups_cannot_be_split(label, group):
    with pytest.raises(DataError) as caught:
        make_splits(manifest_of(label, group=group))
    assert caught.value.code == "D008" and "group" in caught.value.message


@pytest.mark.parametrize("fractions", [(0, 0.5, 0.5), (0.5, 0.5), (1, -0.1, 0.1), (float("nan"), 0.1, 0.1)])
def test_impossible_shares_are_refused(fractions):
    with pytest.raises(DataError) as caught:
        make_splits(manifest_of([0] * 10), fractions=fractions)
    assert caught.value.code == "D008"


def test_a_group_in_two_given_splits_is_refused():
    with pytest.raises(DataError) as caught:
        make_splits(manifest_of([0, 0, 0, 0], split=[1, 2, NO_SPLIT, NO_SPLIT], group=[5, 5, 5, 6]))
    assert caught.value.code == "D006"
    with pytest.raises(DataError):
        make_splits(manifest_of([0, 0, 0, 0], split=[1, 2, 0, 0], group=[5, 6, 5, 7]))


def test_equal_files_that_were_kept_in_two_splits_do_not_change_test():
    digest = np.ones((40, 16), np.uint8) * np.arange(40, dtype=np.uint8)[:, None] + 1
    digest[0] = digest[39]
    split = [0] * 30 + [2] * 10
    m = make_splits(manifest_of([0] * 40, split=split, digest=digest))
    assert (m.split[30:] == 2).all() and (m.split[:30] < 2).all() and (m.split == 1).any()


def image_set(root: Path) -> Path:
    names = [
        b"plain.png",
        b"with space.png",
        b"new\nline.png",
        "é\U0001f33c.png".encode(),
        b"latin-\xe9.png",
        b"cr\r,.png",
    ]
    for k, name in enumerate(["cats", "dogs, big"]):
        (root / name).mkdir(parents=True)
        for i in range(8):
            base = names[i] if i < len(names) else f"{i}.png".encode()
            pixels = np.random.default_rng(100 * k + i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            with open(root / name / Path(__import__("os").fsdecode(base)), "wb") as file:
                Image.fromarray(pixels).save(file, "PNG")
    return root


@pytest.mark.parametrize("place", ["beside", "above", "elsewhere"])
def test_the_written_table_gives_the_same_split_again(tmp_path, place):
    """Regression 23: a published split could not be made again from its own files."""
    root = image_set(tmp_path / "data")
    m = make_splits(scan(root, ScanOptions(group_by=r"([^/]*)\.png$")).manifest, seed=1998)
    target = {"beside": root, "above": tmp_path, "elsewhere": tmp_path / "runs"}[place] / "split.csv"
    target.parent.mkdir(exist_ok=True)
    write_split_csv(target, m)
    again = scan(target).manifest
    key = lambda x: [  # noqa: E731
        (str(x.path(i)), x.labels.classes[x.label[i]], SPLITS[x.split[i]], x.group_names[x.group[i]])
        for i in range(len(x))
    ]
    assert sorted(key(m)) == sorted(key(again))
    if place == "beside":
        assert again.fingerprint == m.fingerprint
    assert make_splits(again, seed=7).split.tolist() == again.split.tolist(), "what the table says is kept"


def test_photos_without_their_splits_are_split_in_proportion(shared_data):
    m = scan(shared_data / "photos" / "MANIFEST.csv", ScanOptions(split_col="")).manifest
    done = make_splits(m, seed=1998)
    assert done.counts("val").tolist() == [20] * 5 or done.counts("val").tolist() == [19] * 5
    assert (done.counts("train") + done.counts("val") + done.counts("test")).tolist() == [195] * 5


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_components_are_those_of_a_plain_search(n, pairs):
    pairs = [(a % n, b % n) for a, b in pairs]
    lowest = components(n, np.array([a for a, _ in pairs], np.int64), np.array([b for _, b in pairs], np.int64))
    plain = list(range(n))
    for _ in range(n):
        for a, b in pairs:
            plain[a] = plain[b] = min(plain[a], plain[b])
    assert lowest.tolist() == plain


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 63), max_size=3)), min_size=1, max_size=30))
def test_near_hashes_join_as_in_a_plain_comparison(made):
    base = [0x0123456789ABCDEF, 0xFEDCBA9876543210, 0x00FF00FF00FF00FF, 0]
    hashes = [base[b] for b, _ in made]
    for i, (_, flips) in enumerate(made):
        for bit in flips:
            hashes[i] ^= 1 << bit
    unit = near_units(np.array(hashes, np.uint64))
    told = [h != 0 for h in hashes]
    pairs = [
        (i, j)
        for i in range(len(made))
        for j in range(i)
        if told[i] and told[j] and (hashes[i] ^ hashes[j]).bit_count() <= 4
    ]
    plain = components(len(made), np.array([p[0] for p in pairs], np.int64), np.array([p[1] for p in pairs], np.int64))
    assert (
        len(set(zip(unit.tolist(), plain.tolist(), strict=True))) == len(set(unit.tolist())) == len(set(plain.tolist()))
    )


# SHA-256 of splits made before data could have several labels per image: (images, classes, groups) -> first 16 digits
BEFORE = {
    (30, 2, 0): "5cfbb6f90a6ae71f", (257, 5, 0): "faf4e5048f0cc616", (1000, 12, 0): "8b4648ae2ff09ed5",
    (30, 2, 9): "b80d5a5beab6e01d", (257, 5, 9): "7b50323b900a39a3", (1000, 12, 9): "3658c456b1533af2",
    (30, 2, 40): "af79bad4fee84d6f", (257, 5, 40): "a1799e81df3bb1c3", (1000, 12, 40): "17f07fa4478549fa",
}  # fmt: skip


def test_splits_of_one_label_data_are_what_they_were() -> None:
    rng = np.random.default_rng(5)
    for (n, classes, groups), digest in BEFORE.items():
        label = rng.integers(0, classes, n).tolist()
        group = rng.integers(-1, groups, n).tolist() if groups else None
        split = make_splits(manifest_of(label, group=group), seed=groups + n).split
        assert hashlib.sha256(split.tobytes()).hexdigest()[:16] == digest
