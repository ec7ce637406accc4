"""The sampler is a pure function: order, crops, padding and quarantine follow from (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.manifest import FLAG_PILLOW, Manifest, PathList
from imgcls_fast.core.pixels import Pixels, evaluation_geometry
from imgcls_fast.loading.augment import (
    NO_COLOR_CHANGE,
    Augment,
    apply_color,
    color_factors,
    random_resized_crops,
)
from imgcls_fast.loading.draws import COLUMNS, DRAW, DRAW_LAYOUT, Draws
from imgcls_fast.loading.sampler import Request, Sampler, random_stream

PIXELS = Pixels(32, 0.875, "bilinear", "rgb", "apply", (0.5,) * 3, (0.5,) * 3)
STRONG = Augment((0.08, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


def listing(n: int, width: int = 60, height: int = 40, **columns: np.ndarray) -> Manifest:
    """A manifest of files that nobody opens."""
    values = {
        "answers": (np.arange(n, dtype=np.int32) % 3,),
        "split": np.zeros(n, np.uint8),
        "group": np.full(n, -1, np.int32),
        "width": np.full(n, width, np.int32),
        "height": np.full(n, height, np.int32),
        "orientation": np.ones(n, np.uint8),
        "digest": np.zeros((n, 16), np.uint8),
        "flags": np.zeros(n, np.uint8),
    }
    paths = PathList.of(f"{i}.jpg" for i in range(n))
    return Manifest(Path("nowhere"), paths, LabelSpace.single(["a", "b", "c"]), **(values | columns))


def training(n: int, batch: int, seed: int = 0, augment: Augment = STRONG) -> Sampler:
    return Sampler(listing(n), np.arange(n), PIXELS, batch, seed=seed, augment=augment)


def columns_of(request: Request) -> dict[str, np.ndarray | None]:
    names = ("rows", "sources", "crop", "resize", "flip", "color", "weight")
    return {name: getattr(request, name) for name in names}


def assert_equal_requests(one: Request, two: Request) -> None:
    assert (one.epoch, one.index) == (two.epoch, two.index)
    for name, value in columns_of(one).items():
        np.testing.assert_array_equal(value, getattr(two, name), err_msg=name)


def epochs_rows(sampler: Sampler, epoch: int) -> np.ndarray:
    return np.concatenate([sampler.request(epoch, i).rows for i in range(sampler.steps)])


# ---------------------------------------------------------------- order


@given(st.integers(1, 300), st.integers(-(2**63), 2**64), st.integers(0, 10_000))
def test_the_order_of_every_epoch_is_a_permutation_of_the_split(n, seed, epoch):
    rows = np.arange(n) * 3 + 1
    sampler = Sampler(listing(3 * n + 1), rows, PIXELS, 1, seed=seed, augment=STRONG)
    np.testing.assert_array_equal(np.sort(sampler.order(epoch)), rows)


def test_requests_depend_on_seed_epoch_and_index_alone_and_not_on_what_was_asked_before():
    places = [(e, i) for e in range(4) for i in range(5)]
    forward, shuffled = training(43, 8), training(43, 8)
    answers = {place: forward.request(*place) for place in places}
    for k in np.random.default_rng(0).permutation(len(places)):
        assert_equal_requests(shuffled.request(*places[k]), answers[places[k]])
        assert_equal_requests(training(43, 8).request(*places[k]), answers[places[k]])


def test_epochs_and_seeds_differ_in_order_and_in_crops():
    orders = {tuple(training(50, 10, seed).order(epoch)) for seed in range(4) for epoch in range(5)}
    assert len(orders) == 20
    crops = {training(50, 10, seed).request(epoch, 0).crop.tobytes() for seed in range(4) for epoch in range(5)}
    assert len(crops) == 20


def test_seeds_that_need_all_64_bits_and_negative_ones_are_told_apart():
    seeds = [-1, -2, -3, 2**63, 2**63 + 1, 2**64 - 4, 2**62 + 1]
    assert len({tuple(training(50, 10, seed).order(0)) for seed in seeds}) == len(seeds)


def test_every_place_in_the_order_is_as_likely_for_every_row():
    first = [int(training(10, 1, seed).order(0)[0]) for seed in range(1000)]
    assert stats.chisquare(np.bincount(first, minlength=10)).pvalue > 1e-3


@given(st.integers(1, 40), st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_the_draws_of_a_batch_are_a_slice_of_the_draws_of_the_epoch(batch, seed, epoch):
    sampler = Sampler(listing(120), np.arange(120), PIXELS, batch, seed=seed, augment=STRONG)
    whole = random_stream(seed, epoch, 1).random((120, COLUMNS))
    for index in {0, 1, sampler.steps - 1} & set(range(sampler.steps)):
        np.testing.assert_array_equal(sampler.draws(epoch, index), whole[index * batch : (index + 1) * batch])


def test_no_two_changes_share_a_column_and_the_columns_fill_whole_blocks_of_the_generator():
    taken = [k for part in DRAW for k in (range(COLUMNS)[part] if isinstance(part, slice) else [part])]
    assert len(taken) == len(set(taken)) and max(taken) < COLUMNS and COLUMNS % 4 == 0
    assert len(range(COLUMNS)[DRAW.area]) == len(range(COLUMNS)[DRAW.ratio]) and len(range(COLUMNS)[DRAW.color]) == 4


def test_the_number_of_a_layout_stands_for_one_table_of_draws():
    tables = {1: (Draws(slice(0, 20, 2), slice(1, 20, 2), 20, 21, 22, slice(23, 27)), 28)}
    assert tables[DRAW_LAYOUT] == (DRAW, COLUMNS)  # a table that changes needs the next number, and a line here


def test_a_position_keeps_its_crop_whatever_the_batch_size():
    one, ten = training(40, 1), training(40, 10)
    small = [one.request(2, i) for i in range(40)]
    big = [ten.request(2, i) for i in range(4)]
    for name in ("rows", "crop", "flip", "color"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(r, name) for r in small]), np.concatenate([getattr(r, name) for r in big])
        )


def test_training_drops_the_tail_and_repeats_nothing():
    sampler = training(43, 8)
    assert sampler.steps == 5
    rows = epochs_rows(sampler, 3)
    assert len(rows) == 40 == len(np.unique(rows))
    np.testing.assert_array_equal(rows, sampler.order(3)[:40])


@settings(deadline=None)
@given(st.integers(1, 200), st.sampled_from([1, 7, 16, 90]), st.sets(st.integers(0, 199), max_size=20))
def test_evaluation_counts_each_row_exactly_once_for_every_batch_size(n, batch, bad):
    rows = np.arange(n)[::-1] * 2
    sampler = Sampler(listing(2 * n), rows, PIXELS, batch)
    bad_rows = {2 * b for b in bad}
    counts: dict[int, float] = {}
    for index in range(sampler.steps):
        request = sampler.request(0, index, bad_rows)
        assert len(request.rows) == len(request.weight) == len(request.sources) == len(request.resize) == batch
        np.testing.assert_array_equal(request.weight, request.rows >= 0)
        for row, weight in zip(request.rows.tolist(), request.weight.tolist(), strict=True):
            counts[row] = counts.get(row, 0) + weight
    counts.pop(-1, None)
    assert counts == {int(row): 1.0 for row in rows if int(row) not in bad_rows}
    assert [r for i in range(sampler.steps) for r in sampler.request(5, i).rows if r >= 0] == rows.tolist()


def test_a_batch_larger_than_the_split_is_refused_in_training_and_padded_in_evaluation():
    with pytest.raises(ValueError, match="batches of 5 from 4 rows"):
        training(4, 5)
    with pytest.raises(ValueError, match="from 0 rows"):
        Sampler(listing(4), np.arange(0), PIXELS, 2)
    assert Sampler(listing(4), np.arange(4), PIXELS, 5).request(0, 0).rows.tolist() == [0, 1, 2, 3, -1]


# ---------------------------------------------------------------- quarantine


def assert_padding_repeats_good_positions(request: Request, clean: Request) -> None:
    good = np.flatnonzero(request.rows >= 0)
    np.testing.assert_array_equal(request.rows[good], clean.rows[good])
    for name in ("sources", "crop", "resize", "flip", "color"):
        value, was = getattr(request, name), getattr(clean, name)
        if value is None:
            continue
        np.testing.assert_array_equal(value[good], was[good], err_msg=name)
        for k in np.flatnonzero(request.rows < 0):
            assert any((value[k] == value[g]).all() and request.sources[k] == request.sources[g] for g in good), name


@pytest.mark.parametrize("augment", [STRONG, None], ids=["training", "evaluation"])
def test_quarantined_rows_keep_their_place_with_weight_0_and_a_good_filler(augment):
    sampler = Sampler(listing(24), np.arange(24), PIXELS, 8, augment=augment)
    clean = sampler.request(1, 1)
    bad = {int(clean.rows[0]), int(clean.rows[5])}
    request = sampler.request(1, 1, bad)
    assert np.flatnonzero(request.rows < 0).tolist() == [0, 5]
    assert request.weight.tolist() == [0, 1, 1, 1, 1, 0, 1, 1]
    assert_padding_repeats_good_positions(request, clean)
    assert_equal_requests(sampler.request(1, 1, frozenset(bad)), request)
    assert_equal_requests(sampler.request(1, 1, dict.fromkeys(bad, "why").keys()), request)


@given(st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)))
def test_rows_found_bad_in_two_steps_leave_the_same_batch_as_known_at_once(first, second):
    sampler = Sampler(listing(8), np.arange(8), PIXELS, 8, augment=STRONG)
    rows = sampler.request(0, 0).rows
    known = {int(rows[k]) for k in first}
    late = np.isin(np.arange(8), list(second))
    together = sampler.request(0, 0, known | {int(rows[k]) for k in second})
    in_steps = sampler.request(0, 0, known).refilled(late)
    np.testing.assert_array_equal(in_steps.rows, together.rows)
    good = together.rows >= 0
    np.testing.assert_array_equal(in_steps.crop[good], together.crop[good])
    np.testing.assert_array_equal(in_steps.sources[good], together.sources[good])


def test_a_batch_without_any_good_row_has_no_source():
    sampler = training(8, 4)
    bad = set(sampler.request(0, 0).rows.tolist())
    request = sampler.request(0, 0, bad)
    assert request.rows.tolist() == request.sources.tolist() == [-1] * 4
    assert request.weight.sum() == 0
    assert (sampler.request(0, 1, bad).rows >= 0).all()


def test_the_evaluation_tail_with_a_bad_row_still_has_a_good_filler():
    request = Sampler(listing(5), np.arange(5), PIXELS, 4).request(0, 1, {4})
    assert request.rows.tolist() == [-1] * 4 == request.sources.tolist()
    request = Sampler(listing(6), np.arange(6), PIXELS, 4).request(0, 1, {4})
    assert request.rows.tolist() == [-1, 5, -1, -1]
    assert request.sources.tolist() == [5] * 4


# ---------------------------------------------------------------- geometry


def test_exif_turned_images_are_cropped_in_turned_coordinates_unless_told_otherwise():
    turned = listing(200, 300, 20, orientation=np.full(200, 6, np.uint8))
    for exif, (wide, high) in {"apply": (20, 300), "ignore": (300, 20)}.items():
        pixels = Pixels(32, 1.0, "bilinear", "rgb", exif, (0.5,) * 3, (0.5,) * 3)
        crop = Sampler(turned, np.arange(200), pixels, 200, augment=STRONG).request(0, 0).crop
        assert (crop[:, 0] + crop[:, 2]).max() <= high and (crop[:, 1] + crop[:, 3]).max() <= wide
        resize = Sampler(turned, np.arange(200), pixels, 200).request(0, 0).resize
        np.testing.assert_array_equal(resize, evaluation_geometry(np.full(200, wide), np.full(200, high), 32, 32))


def test_rows_with_the_flag_or_an_extreme_shape_are_left_to_pillow():
    manifest = listing(
        4, flags=np.array([0, FLAG_PILLOW, 0, 0], np.uint8), width=np.array([60, 60, 481, 480], np.int32)
    )
    sampler = Sampler(manifest, np.arange(4), PIXELS, 4)
    assert sampler.needs_pillow(np.arange(4)).tolist() == [False, True, True, False]


SHAPES = [(500, 375), (224, 224), (1600, 1280), (200, 1000), (1000, 200), (7, 5), (1, 1), (1, 2000), (2000, 3)]
SCALES = [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.35, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.5, 0.6))]


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.floats(0.2, 5),
    st.integers(0, 2**32),
)
def test_crops_are_never_empty_and_always_inside_the_image(width, height, low, span, aspect, seed):
    u = np.random.default_rng(seed).random((64, COLUMNS))
    u[0], u[1] = 0, np.nextafter(1, 0)
    scale, ratio = (low, low + span * (1 - low)), (aspect, aspect * 1.5)
    top, left, high, wide = random_resized_crops(u, np.full(64, width), np.full(64, height), scale, ratio).T
    assert (high >= 1).all() and (wide >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + high <= height).all() and (left + wide <= width).all()


@pytest.mark.parametrize(("scale", "ratio"), SCALES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crops_have_the_distribution_of_torchvisions_random_resized_crop(shape, scale, ratio):
    width, height = shape
    n = 5000
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    try:
        image = torch.empty(1, height, width)
        theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)])
    finally:
        torch.random.set_rng_state(state)
    u = random_stream(1, 0, 1).random((n, COLUMNS))
    ours = random_resized_crops(u, np.full(n, width), np.full(n, height), scale, ratio)
    for name, mine, other in _statistics(ours, theirs):
        assert stats.ks_2samp(mine, other).pvalue > 1e-4, name


def _statistics(ours: np.ndarray, theirs: np.ndarray) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    for k, name in enumerate(("top", "left", "height", "width")):
        yield name, ours[:, k], theirs[:, k]
    yield "area", ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]
    yield "ratio", ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]
    yield "right", ours[:, 1] + ours[:, 3], theirs[:, 1] + theirs[:, 3]


@pytest.mark.parametrize("shape", [(2000, 10), (10, 2000), (30, 20)], ids=str)
def test_after_ten_misses_the_crop_is_torchvisions_largest_legal_one(shape):
    width, height = shape
    never = np.ones((3, COLUMNS)) * 0.999999
    scale, ratio = (3.0, 4.0), (0.75, 4 / 3)  # three times the area of the image never fits
    theirs = RandomResizedCrop.get_params(torch.empty(1, height, width), list(scale), list(ratio))
    ours = random_resized_crops(never, np.full(3, width), np.full(3, height), scale, ratio)
    assert [tuple(row) for row in ours.tolist()] == [tuple(theirs)] * 3


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(8, 512), st.floats(0.5, 1))
def test_evaluation_geometry_is_that_of_torchvisions_resize_and_center_crop(width, height, size, crop_pct):
    from torchvision.transforms.functional import _compute_resized_output_size as resized_size

    pixels = Pixels(size, crop_pct, "bilinear", "rgb", "apply", (0.5,) * 3, (0.5,) * 3)
    high, wide, top, left = evaluation_geometry(np.array([width]), np.array([height]), pixels.resize_to, size)[0]
    assert [high, wide] == resized_size((height, width), [pixels.resize_to])
    assert (top, left) == (int(round((high - size) / 2.0)), int(round((wide - size) / 2.0)))  # noqa: RUF046 (theirs)
    assert 0 <= top <= high - size and 0 <= left <= wide - size


def test_flips_come_with_their_probability():
    for share in (0.0, 0.25, 1.0):
        flip = training(4000, 4000, augment=Augment((0.5, 1.0), flip=share)).request(0, 0).flip
        assert stats.binomtest(int(flip.sum()), 4000, share).pvalue > 1e-3


# ---------------------------------------------------------------- colour


def test_no_colour_strength_means_no_colour_work():
    assert training(8, 4, augment=Augment((0.5, 1.0))).request(0, 0).color is None
    assert not Augment((0.5, 1.0)).has_color and Augment((0.5, 1.0), hue=0.1).has_color


def test_colour_factors_are_uniform_within_their_strength():
    u = random_stream(0, 0, 1).random((5000, COLUMNS))
    factors = color_factors(u, Augment((0.5, 1.0), brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1))
    for k, (middle, reach) in enumerate([(1, 0.4), (1, 0.3), (1, 0.2), (0, 36)]):
        assert stats.kstest(factors[:, k], stats.uniform(middle - reach, 2 * reach).cdf).pvalue > 1e-3


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_neutral_factors_leave_every_pixel_value_unchanged(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, channels), dtype=np.uint8)
    np.testing.assert_array_equal(apply_color(pixels, NO_COLOR_CHANGE), pixels)


def test_alpha_is_not_coloured():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    changed = apply_color(pixels, np.array([0.5, 1.2, 0.1, 40], np.float32))
    np.testing.assert_array_equal(changed[:, :, 3], pixels[:, :, 3])
    np.testing.assert_array_equal(
        changed[:, :, :3], apply_color(pixels[:, :, :3].copy(), np.array([0.5, 1.2, 0.1, 40]))
    )


def test_gray_pixels_stay_gray_whatever_the_hue_and_saturation():
    gray = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    changed = apply_color(gray, np.array([1, 1, 0.3, 77], np.float32)).astype(int)
    assert np.ptp(changed, axis=2).max() <= 1  # YIQ's published coefficients add up to gray within one level
    one = apply_color(gray[:, :, :1].copy(), np.array([0.8, 1.3, 0.3, 77], np.float32))
    expected = np.clip(np.rint(0.8 * (128 + 1.3 * (np.arange(256) - 128.0))), 0, 255)
    np.testing.assert_array_equal(one[0, :, 0], expected)


@pytest.mark.parametrize("channels", [3, 1])
def test_colour_changes_equal_dalis_color_twist(channels):
    """Bit for bit, but for sums in float32 that end next to a half."""
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    u = random_stream(3, 0, 1).random((64, COLUMNS))
    strong = Augment((0.5, 1.0), brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    factors = np.concatenate([color_factors(u, strong), NO_COLOR_CHANGE[None]])
    pixels = np.random.default_rng(1).integers(0, 256, (len(factors), 48, 48, channels), dtype=np.uint8)
    pipeline = Pipeline(batch_size=len(factors), num_threads=1, device_id=None)
    with pipeline:
        images = fn.external_source(source=lambda: list(pixels), dtype=types.UINT8, layout="HWC")
        numbers = [fn.external_source(source=_constant(column), dtype=types.FLOAT) for column in factors.T]
        names = ("brightness", "contrast", "saturation", "hue")[: 4 if channels == 3 else 2]
        operator = fn.color_twist if channels == 3 else fn.brightness_contrast
        pipeline.set_outputs(operator(images, **dict(zip(names, numbers, strict=False))))
    pipeline.build()
    theirs = pipeline.run()[0].as_array()
    ours = np.stack([apply_color(image, four) for image, four in zip(pixels, factors, strict=True)])
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and difference.mean() < 1e-4
    np.testing.assert_array_equal(theirs[-1], pixels[-1])  # neutral factors


def _constant(column: np.ndarray):
    return lambda: list(column.astype(np.float32))
