"""Pictures of benchmarks: every row is in them, losses can be seen, nothing is cut off; and one page has it all."""

from __future__ import annotations

import base64
import io
import math
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from imgcls_fast.core.errors import HardwareError, UsageError
from imgcls_fast.evaluation.scatter import unbeaten
from imgcls_fast.measuring import charts
from imgcls_fast.measuring.results import write_area

MIXED = [
    ("small", "kernel", "formula", 0.5),
    ("small", "kernel", "compiled", 1.02),
    ("small", "kernel", "timm", 1.4),
    ("large", "kernel", "formula", 0.7),
    ("large", "other", "formula", 1.9),
]
MISSING = [
    ("small", "flash", "absent", "flash_attn is not installed"),
    ("large", "flash", "absent", "flash_attn is not installed"),
    ("large", "slow", "not run", "about 140 s, more than the 10 s of a cell (--full)"),
]
LONG = (
    "a kernel whose name tells dtype, layout, shape, heads and window because nobody ever shortens such names $x$ end"
)


def texts(figure) -> list[str]:
    """Every text of a figure, with its line breaks as spaces."""
    return [text.get_text().replace("\n", " ") for text in figure.findobj(Text) if text.get_text()]


def points(axes, gid: str) -> list[tuple[float, float]]:
    """Of one marker, with what is drawn in it."""
    return [
        (float(x), float(y))
        for line in axes.lines
        if line.get_gid() == gid
        for x, y in zip(*line.get_data(), strict=True)
    ]


def demand_all_inside(figure) -> None:
    """Nothing that is drawn is cut off by the figure's edge."""
    figure.draw_without_rendering()
    box, paper = figure.get_tightbbox(), figure.bbox_inches
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= paper.x1 and box.y1 <= paper.y1, f"{box} in {paper}"


def picture(png: bytes) -> np.ndarray:
    """Pixels of a PNG on white paper."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        values = np.asarray(image.convert("RGB"))
    assert (
        (values[0, 0] == 255).all() and (values[-1] == 255).all() and (values[:, -1] == 255).all() and values.std() > 1
    )
    return values


# ---------------------------------------------------------------- ratios


def test_every_row_has_a_point_a_whisker_a_name_and_its_figures(bench_area):
    area = bench_area(MIXED)
    figure = charts.draw_ratios(area)
    (axes,) = figure.axes
    drawn = [x for name in charts.LOOKS for x, _ in points(axes, name)]
    assert sorted(drawn) == sorted(row.ratio for row in area.rows)
    whiskers = [segment[:, 0].tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert sorted(whiskers) == sorted([row.low, row.high] for row in area.rows)
    said = Counter(texts(figure))
    assert all(said[f"{row.contender} / {row.rival}"] for row in area.rows) and said["kernel / formula"] == 2
    assert said["0.50  [0.48, 0.53]"] == 1 and said["small"] == said["large"] == 1
    height = {case: [y for name in charts.LOOKS for x, y in points(axes, name) if x in xs] for case, xs in
              {"small": (0.5, 1.02, 1.4), "large": (0.7, 1.9)}.items()}  # fmt: skip
    assert max(height["small"]) < min(height["large"]), "rows of a case stand together, in the order of the results"


def test_a_loss_has_a_marker_and_a_colour_of_its_own(bench_area):
    figure = charts.draw_ratios(bench_area(MIXED))
    (axes,) = figure.axes
    assert {name: sorted(x for x, _ in points(axes, name)) for name in charts.LOOKS} == {
        "faster": [0.5, 0.7],
        "even": [1.02],
        "slower": [1.4, 1.9],
    }
    looks = {line.get_gid(): (line.get_marker(), to_hex(line.get_color())) for line in axes.lines if line.get_gid()}
    for k in (0, 1):
        assert len({look[k] for look in looks.values()}) == 3
    written = {text.get_text(): to_hex(text.get_color()) for text in figure.texts}
    assert written["1.40  [1.33, 1.47]"] == looks["slower"][1] != written["0.50  [0.48, 0.53]"]
    assert {"faster than its rival", "slower than its rival", "cannot be told apart"} <= set(texts(figure))


def test_the_axis_is_logarithmic_says_who_wins_where_and_names_the_clock(bench_area):
    (axes,) = charts.draw_ratios(bench_area(MIXED, clocks=["cpu"])).axes
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log" and low < 1 < high and 1 in axes.get_xticks()
    assert "CPU time of all threads and child processes" in axes.get_xlabel() and "contender" in axes.get_xlabel()
    hints = {text.get_text(): text.get_ha() for text in axes.texts}
    assert hints == {"◀ contender faster": "right", "contender slower ▶": "left"}


def test_two_clocks_are_named_at_each_row(bench_area):
    figure = charts.draw_ratios(bench_area(MIXED, clocks=["wall", "gpu"]))
    assert "named at the right" in figure.axes[0].get_xlabel()
    assert Counter(text.split()[-1] for text in texts(figure) if "  [" in text) == {"wall": 3, "gpu": 2}


def test_goals_are_ticks_and_a_missed_one_is_said(bench_area):
    figure = charts.draw_ratios(bench_area(MIXED, goals={"other": 1.5}))
    assert [x for x, _ in points(figure.axes[0], "goal")] == [1.5]
    assert "1.90  [1.81, 2.00]  goal ≤ 1.5 missed" in texts(figure) and "goal: at most" in texts(figure)
    assert "goal: at most" not in texts(charts.draw_ratios(bench_area(MIXED)))


def test_what_did_not_run_and_who_has_no_rival_is_listed_beneath(bench_area):
    found = texts(charts.draw_ratios(bench_area(MIXED, missing=MISSING, alone={("large", "lonely"): 12.3})))
    assert "absent: flash (small; large): flash_attn is not installed" in found
    assert "not run: slow (large): about 140 s, more than the 10 s of a cell (--full)" in found
    assert "without a rival: lonely (large): 12.3 ms" in found


def test_the_foot_says_machine_cores_method_date_and_the_file(bench_area):
    foot = " ".join(texts(charts.draw_ratios(bench_area(MIXED, machine="epyc", area="loader"))))
    for part in ("epyc (cpu AMD EPYC 9B14, cpus 2)", "2 threads on cpu", "5 processes x 15 pairs", "2026-07-30 12:34 UTC",
                 "results/epyc/loader.json", "in 95 of 100 repetitions of the run the ratio falls into it"):  # fmt: skip
        assert part in foot


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 5, 60])
def test_the_picture_grows_with_its_rows_and_cuts_nothing_off(count, bench_area):
    draw = random.Random(count)
    ratios = [(f"case {k // 5}", f"kernel {k}", "formula", math.exp(draw.uniform(-1, 0.4))) for k in range(count)]
    area = bench_area(ratios)
    figure = charts.draw_ratios(area)
    demand_all_inside(figure)
    (axes,) = figure.axes
    rows = sorted(y for name in charts.LOOKS for _, y in points(axes, name))
    assert len(rows) == count and all(b - a > 0.2 for a, b in pairwise(rows)), "inches between rows"
    assert 0.25 * count < figure.get_figheight() < 3.2 + 0.4 * count
    if count == 60:
        assert picture(charts.ratio_bars(area)).shape[0] > 2000


@pytest.mark.filterwarnings("error")
def test_long_names_are_wrapped_and_nothing_of_them_is_lost(bench_area):
    ratios = [(LONG, LONG, "a rival", 0.5), (LONG, "x" * 140, "y" * 140, 1.5)]
    area = bench_area(ratios, machine=LONG, missing=[(LONG, "z" * 300, "absent", LONG * 3)], alone={("one", LONG): 3.0})
    figure = charts.draw_ratios(area)
    demand_all_inside(figure)
    assert f"{LONG} / a rival" in texts(figure) and f"without a rival: {LONG} (one): 3.00 ms" in texts(figure)
    shortened = next(text for text in texts(figure) if "…" in text).replace(" ", "")
    assert shortened.startswith("x" * 70) and shortened.endswith("y" * 70)
    boxes = [text.get_window_extent() for text in figure.texts]
    assert not [(a, b) for k, a in enumerate(boxes) for b in boxes[:k] if a.overlaps(b)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ratios", [(1e-4, 1e3), (0.98, 1.01), (0.02, 0.03), (3.0, 900.0), (1.0,)], ids=str)
def test_the_axis_holds_every_ratio_with_a_few_round_ticks(ratios, bench_area):
    area = bench_area([("plain", f"kernel {k}", "formula", ratio) for k, ratio in enumerate(ratios)], spread=0.01)
    figure = charts.draw_ratios(area)
    demand_all_inside(figure)
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert all(low < row.low and row.high < high for row in area.rows) and low < 1 < high
    assert 2 <= len(axes.get_xticks()) <= 10 and all(low <= x <= high for x in axes.get_xticks())


@pytest.mark.filterwarnings("error")
def test_an_enormous_interval_does_not_squeeze_the_ratios_together(bench_area):
    area = bench_area(MIXED, spread=12.0)
    low, high = charts.draw_ratios(area).axes[0].get_xlim()
    assert low > 0.05 and high < 20


# ---------------------------------------------------------------- contenders by themselves


@pytest.mark.filterwarnings("error")
def test_contenders_without_rows_get_bars_of_their_time(bench_area):
    alone = {("import", "ours"): 180.0, ("import", "torch"): 900.0, ("predict", "onnx"): 640.0}
    area = bench_area([], area="startup", alone=alone, missing=MISSING)
    figure = charts.draw_times(area)
    demand_all_inside(figure)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == list(alone.values()) and axes.get_xlim()[0] == 0
    assert {"ours", "torch", "onnx", "import", "predict", "180 ms", "900 ms", "640 ms"} <= set(texts(figure))
    assert "absent: flash (small; large): flash_attn is not installed" in texts(figure)
    assert "(ms)" in axes.get_xlabel() and any("results/two-cores/startup.json" in text for text in texts(figure))
    picture(charts.ratio_bars(area))
    picture(charts.ratio_bars(bench_area([], missing=MISSING)))


# ---------------------------------------------------------------- accuracy against latency


def engines(bench_area, **more):
    """Two models in batches of 1 and 16, four contenders each and one whose accuracy nobody asked for."""
    worth = {"eager": 0.8, "compile": 0.8, "openvino": 0.79, "onnx int8": 0.75}
    precisions = {"eager": "fp32", "compile": "fp32", "openvino": "bf16", "onnx int8": "int8"}
    known = {
        name: {"accuracy": a, "accuracy_low": a - 0.02, "accuracy_high": a + 0.01, "precision": precisions[name]}
        for name, a in worth.items()
    }
    ratios = [
        (f"{model}, batch {batch}", name, "eager", ratio)
        for model in ("resnet50", "vit-t")
        for batch in (1, 16)
        for name, ratio in (("compile", 0.6), ("openvino", 0.4), ("onnx int8", 0.45))
    ]
    return bench_area(ratios, area="engines", more=known, alone={("resnet50, batch 1", "blind"): 5.0}, **more)


@pytest.mark.filterwarnings("error")
def test_each_model_has_a_panel_with_every_contender_its_precision_and_its_interval(bench_area):
    missing = [("vit-t, batch 1", "trt", "absent", "no GPU"), ("vit-t, batch 16", "tpu", "absent", "no TPU")]
    figure = charts.draw_accuracies(engines(bench_area, missing=missing))
    demand_all_inside(figure)
    assert [axes.get_title(loc="left").split(":")[0] for axes in figure.axes] == ["resnet50", "vit-t"]
    for axes in figure.axes:
        assert sorted(points(axes, "unbeaten")) == [(4.0, 79.0), (6.0, 80.0)]
        assert sorted(points(axes, "beaten")) == [(4.5, 75.0), (10.0, 80.0)]
        assert sorted(points(axes, "frontier")) == [(4.0, 79.0), (6.0, 80.0)]
        names = sorted(text.get_text() for text in axes.texts)
        assert names == ["compile (fp32)", "eager (fp32)", "onnx int8", "openvino (bf16)"]
        segments = [segment for lines in axes.collections for segment in lines.get_segments()]
        assert sorted(tuple(np.round(s.ravel(), 6)) for s in segments) == sorted(
            [(10.0, 78.0, 10.0, 81.0), (6.0, 78.0, 6.0, 81.0), (4.0, 77.0, 4.0, 80.0), (4.5, 73.0, 4.5, 76.0)]
        )
        assert "(ms)" in axes.get_xlabel() and "(%)" in axes.get_ylabel()
    said = texts(figure)
    assert "accuracy not measured: blind (resnet50, batch 1)" in said and "absent: trt (vit-t, batch 1): no GPU" in said
    assert not [text for text in said if "tpu" in text] and any(
        "results/two-cores/engines.json" in text for text in said
    )


def test_names_in_a_crowd_do_not_cover_each_other(bench_area):
    crowd = {f"engine number {k}": {"accuracy": 0.8, "precision": "fp32"} for k in range(8)}
    ratios = [("resnet50, batch 1", name, "eager", 0.6 + k / 100) for k, name in enumerate(crowd)]
    figure = charts.draw_accuracies(bench_area(ratios, more=crowd))
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 8
    assert not [(a, b) for k, a in enumerate(boxes) for b in boxes[:k] if a.overlaps(b)]
    demand_all_inside(figure)


def test_without_accuracies_of_single_images_there_is_no_such_picture(bench_area):
    assert charts.accuracy_latency(bench_area(MIXED)) is None
    many = bench_area([("resnet50, batch 16", "ours", "eager", 0.5)], more={"ours": {"accuracy": 0.8}})
    assert charts.accuracy_latency(many) is None
    picture(charts.accuracy_latency(engines(bench_area)))


def test_the_frontier_is_what_no_other_beats_in_both():
    draw = random.Random(0)
    for _ in range(50):
        points_ = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(0, 12))]
        expected = {(x, y) for x, y in points_ if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points_)}
        found = [points_[k] for k in unbeaten(points_)]
        assert found == sorted(expected)


# ---------------------------------------------------------------- the page


def stored(folder, *areas):
    """A folder with the results of one machine."""
    folder.mkdir(parents=True)
    for area in areas:
        write_area(folder, area)
    return folder


def test_the_page_has_two_machines_with_every_row_and_reason_and_needs_nothing_else(tmp_path, bench_area):
    first = bench_area(MIXED, missing=MISSING, goals={"other": 1.5}, limits={"copy_gb_per_s": 12.5})
    second, third = engines(bench_area), bench_area(MIXED[:1], machine="other-box", clocks=["gpu"])
    done = charts.write_bench_report(
        [stored(tmp_path / "first", first, second), stored(tmp_path / "other", third)], tmp_path / "out" / "deep"
    )
    names = ["two-cores-ops", "two-cores-engines", "two-cores-pareto", "other-box-ops"]
    out = tmp_path / "out" / "deep"
    assert done["page"] == str(out / "bench.html") and done["pictures"] == [str(out / f"{name}.png") for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(["bench.html", *(f"{name}.png" for name in names)])
    assert [text.split(":")[0] for text in done["tables"]] == ["ops", "engines", "ops"]
    html = (out / "bench.html").read_text("utf-8")
    embedded = {base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]+)"', html)}
    assert embedded == {(out / f"{name}.png").read_bytes() for name in names}
    plain = re.sub(r"data:image/png;base64,[^\"]+", "", html)
    plain = re.sub(r' data-label="[^"]*"', "", plain)  # the name of the column, for narrow screens
    assert "<script" not in plain and "http" not in plain.replace("http-equiv", "") and "url(" not in plain
    assert plain.index("<h2>two-cores</h2>") < plain.index("<h2>other-box</h2>")
    for area in (first, second, third):
        for row in area.rows:
            line = f'<td>{row.contender}</td><td>{row.rival}</td><td class="n">{row.ratio:.3f}</td>'
            assert line in plain and f"{row.low:.3f} to {row.high:.3f}" in plain
        for c in area.contenders:
            assert f"<td>{c.name}</td>" in plain and f">{c.case}</th>" in plain
    for _, name, kind, why in MISSING:
        assert f"<b>{name}</b>" in plain and f"{kind}: {why}" in plain
    for part in ("AMD EPYC 9B14", "torch 2.14.1", "tensorrt", "0.12", "2026-07-30 12:34 UTC", "5 processes x 15 pairs", "≤ 1.5 MISSED",
                 "in 95 of 100 repetitions of the run the ratio falls into it", "results/two-cores/ops.json", "copy_gb_per_s 12.5",
                 "Of 5 rows, the contender is faster in 2, slower in 2, and cannot be told apart in 1. 0 of 1 goals hold.",
                 "80.00 [78.00, 81.00]", "max_diff 4.5e-06", "one call of an operator"):  # fmt: skip
        assert part in plain, part
    assert len(re.findall(r'<tr class="slower">', plain)) == 2 and plain.count(">SLOWER<") == 2


def test_names_from_a_file_are_escaped_and_stay_in_the_folder(tmp_path, bench_area):
    evil = "<script>alert(1)</script>"
    area = bench_area(
        [(evil, evil, f'"{evil}', 0.5)],
        machine="../../up <b>",
        missing=[(evil, evil, "absent", f"because {evil} & more")],
    )
    done = charts.write_bench_report([stored(tmp_path / "results", area)], tmp_path / "out")
    html = (tmp_path / "out" / "bench.html").read_text("utf-8")
    assert "<script" not in html and "<b>absent" not in html and "up <b>" not in html
    assert "because &lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in html and "../../up &lt;b&gt;" in html
    assert done["pictures"] == [str(tmp_path / "out" / "up-b-ops.png")]
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["up-b-ops.png"]


def test_two_results_of_one_machine_keep_their_pictures_apart(tmp_path, bench_area):
    folders = [stored(tmp_path / "before", bench_area(MIXED)), stored(tmp_path / "after", bench_area(MIXED[:2]))]
    done = charts.write_bench_report(folders, tmp_path / "out")
    assert [path.rpartition("/")[2] for path in done["pictures"]] == ["two-cores-ops.png", "two-cores-ops-2.png"]
    sizes = [Image.open(path).height for path in done["pictures"]]
    assert sizes[0] > sizes[1]


def test_a_folder_without_results_is_refused_before_anything_is_written(tmp_path, bench_area):
    good = stored(tmp_path / "good", bench_area())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as caught:
        charts.write_bench_report([good, tmp_path / "empty"], tmp_path / "out")
    assert caught.value.code == "U004" and not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_said(tmp_path, bench_area):
    (tmp_path / "out").write_text("a file", "utf-8")
    with pytest.raises(HardwareError) as caught:
        charts.write_bench_report([stored(tmp_path / "results", bench_area())], tmp_path / "out")
    assert caught.value.code == "H003"
