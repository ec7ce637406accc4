"""`imgcls-fast bench RUN`: real engines of a small run, what is said of the absent ones, and what the figures must agree with."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import imgcls_fast as ic
from imgcls_fast.api import bench as api
from imgcls_fast.cli.app import main
from imgcls_fast.core.bundle import read_bundle
from imgcls_fast.core.errors import ConfigError, ExportError, HardwareError, ModelError
from imgcls_fast.core.exports import list_exports
from imgcls_fast.core.files import read_sealed, write_json, write_sealed
from imgcls_fast.core.overview import details
from imgcls_fast.core.run import Run
from imgcls_fast.core.targets import RUNTIMES
from imgcls_fast.engines.base import Engine
from imgcls_fast.measuring import efficiency, race
from imgcls_fast.measuring.contenders import Contender, contenders_of
from imgcls_fast.measuring.efficiency import counted, examine
from imgcls_fast.measuring.throughput import limit_of

pytest.importorskip("onnxruntime")

OPENVINO = importlib.util.find_spec("openvino") is not None


@pytest.fixture(scope="module")
def run(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Digits after one epoch, with one ONNX export."""
    folder = tmp_path_factory.mktemp("efficiency")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMGCLS_CACHE", str(folder / "cache"))
        patch.setenv("IMGCLS_RUNS", str(folder / "runs"))
        made = Run(Path(shutil.copytree(digits_run, folder / "runs" / "digits")))
        ic.export(made, "onnx")
        yield made


@pytest.fixture(scope="module")
def found(run: Run) -> dict[str, Any]:
    """What the command line says of it as JSON; all processes of the comparison, short timings."""
    out = run.directory.parent / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        said: list[dict[str, Any]] = []
        patch.setattr("imgcls_fast.cli.answer.Session._json", lambda session, value: said.append(value))
        patch.setattr("imgcls_fast.measuring.throughput._DURATION_S", 0.3)
        words = ["bench", str(run.directory), "-b", "1", "-b", "4", "--duration", "0.2s", "-o", str(out), "--json"]
        assert main(words) == 0
    assert json.loads(out.read_text("utf-8")) == {k: v for k, v in said[0].items() if k != "warnings"}
    return said[0]


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    """The same run in a folder of its own, not timed yet."""
    made = Run(Path(shutil.copytree(run.directory, tmp_path / "copy")))
    shutil.rmtree(made.efficiency_path.parent, ignore_errors=True)
    return made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """No processes for the comparison, no timing of files; the names that would have been compared."""
    asked: list[list[str]] = []

    def ratios(contenders: list[Contender], *_: Any) -> tuple[dict[str, dict[str, Any]], str]:
        asked.append([contender.name for contender in contenders])
        return {name: race.summed([[0.0, math.nan]] * 5) for name in asked[-1][1:]}, ""

    monkeypatch.setattr(efficiency, "ratios", ratios)
    monkeypatch.setattr(efficiency, "data_rates", lambda *_: None)
    return asked


def examined(run: Run, export: Path | None = None, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "runtimes": (), "batches": (2,), "duration_s": 0.02, "device": "cpu", "out": None, "say": lambda text: None,
    }  # fmt: skip
    return examine(run, export, **{**options, **changes})


def names(result: dict[str, Any]) -> list[str]:
    return [row["name"] for row in result["engines"]]


# ---------------------------------------------------------------- the whole verb


@pytest.mark.slow
class TestWholeVerb:
    """One call of the command line, looked at from several sides."""

    def test_every_runtime_is_timed_or_named_with_the_reason_and_the_command(self, found: dict[str, Any]) -> None:
        assert names(found) == ["torch", "onnx fp32", *["openvino fp32"] * OPENVINO]
        absent = {entry["name"]: entry for entry in found["absent"]}
        assert {row["runtime"] for row in found["engines"]} | set(absent) == set(RUNTIMES) - {"auto"}
        assert all(entry["reason"] and entry["remedy"] for entry in absent.values())
        assert "--runtime compile" in absent["compile"]["remedy"]
        assert absent["aoti"]["remedy"].endswith("--aoti")

    def test_the_figures_of_each_engine_are_consistent(self, found: dict[str, Any]) -> None:
        for row in found["engines"]:
            took = row["latency"]["end_to_end"]
            assert 0 < took["least_ms"] <= took["p50_ms"] <= took["p90_ms"] <= took["p99_ms"] <= took["greatest_ms"]
            assert row["latency"]["batch"] == 1
            assert [timing["batch"] for timing in row["sweep"]["timings"]] == [1, 4]
            rates = {timing["batch"]: timing["images_per_s"] for timing in row["sweep"]["timings"]}
            assert row["best"]["images_per_s"] == rates[row["best"]["batch"]]
            assert row["precision"] == row["file_precision"] == "fp32"

    def test_each_is_compared_with_torch_in_fresh_processes(self, found: dict[str, Any]) -> None:
        torch_row, *others = found["engines"]
        assert torch_row["ratio"] is None and torch_row["agreement"] is None
        for row in others:
            ratio = row["ratio"]
            assert 0 < ratio["low"] <= ratio["ratio"] <= ratio["high"]
            assert (ratio["processes"], ratio["pairs"], len(ratio["per_process"])) == (5, 15, 5)
            assert ratio["ratio"] == pytest.approx(float(np.median(ratio["per_process"])))
            assert row["not_compared"] is None
            assert row["agreement"]["same_top1"] == row["agreement"]["rows"]
            assert row["agreement"]["max_score_diff"] <= 1e-4

    def test_the_accuracy_of_torch_is_that_of_eval(self, found: dict[str, Any], run: Run) -> None:
        metrics, worth = ic.evaluate(run), found["engines"][0]["accuracy"]
        assert worth["accuracy"] == pytest.approx(metrics.accuracy)
        assert (worth["low"], worth["high"]) == pytest.approx(metrics.accuracy_ci)
        assert (worth["rows"], worth["split"]) == (metrics.n, "test")

    def test_files_say_whether_the_loader_or_the_model_limits(self, found: dict[str, Any]) -> None:
        data = found["data"]
        assert data["decode_images_per_s"] > 0
        assert data["engines"][0]["name"] == "torch"
        for entry in data["engines"]:
            assert entry["images_per_s"] > 0
            rates = (data["decode_images_per_s"], entry["alone_images_per_s"], entry["images_per_s"])
            assert entry["limit"] == limit_of(*rates)
            assert f"with {entry['name']} {entry['images_per_s']:,.0f}" in data["line"]

    def test_the_file_of_the_run_is_strict_json_and_the_same(self, found: dict[str, Any], run: Run) -> None:
        def refuse(name: str) -> Any:
            raise AssertionError(name)

        text = run.efficiency_path.read_text("utf-8")
        assert json.loads(text, parse_constant=refuse) == {k: v for k, v in found.items() if k != "warnings"}
        assert details(run)["efficiency"] == run.efficiency

    def test_people_get_tables_reasons_and_the_path(
        self, found: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(api, "benchmark", lambda *_, **__: found)
        assert main(["bench", str(run.directory)]) == 0
        text = capsys.readouterr().out
        for table in found["tables"]:
            for line in [table["heads"], *table["rows"]]:
                assert "\t".join(line) in text
        assert found["data"]["line"] in text
        assert all(entry["reason"] in text and entry["remedy"] in text for entry in found["absent"])
        assert text.rstrip().endswith(str(run.efficiency_path))
        assert main(["runs", "show", str(run.directory)]) == 0
        assert "time/torch" in capsys.readouterr().out

    def test_the_report_shows_it(self, found: dict[str, Any], run: Run) -> None:
        page = ic.report(run).read_text("utf-8")
        section = page.partition('<section id="efficiency">')[2].partition("</section>")[0]
        for cell in ("onnx fp32", "time/torch", found["machine"]["date"], "imgcls-fast export"):
            assert cell in section
        assert 'href="#efficiency"' in page


def test_a_report_without_it_has_no_such_section(copy: Run) -> None:
    def mentions() -> bool:
        return 'id="efficiency"' in (page := ic.report(copy).read_text("utf-8")) or "#efficiency" in page

    assert not mentions()
    copy.efficiency_path.parent.mkdir()
    write_json(copy.efficiency_path, {"schema": 99})  # of another version
    assert not mentions()


# ---------------------------------------------------------------- what is timed


def test_one_export_is_timed_alone_beside_torch(copy: Run, quick: list[list[str]], tmp_path: Path) -> None:
    for thing in (list_exports(copy.exports)[0].folder, list_exports(copy.exports)[0].path):
        made = ic.benchmark(thing, runtimes=["onnx"], batches=[2], duration_s=0.02, say=lambda text: None)
        assert names(made) == ["torch", "onnx fp32"]
        assert made["absent"] == []
        assert made["engines"][1]["export"] == list_exports(copy.exports)[0].folder.name
    with pytest.raises(ConfigError) as caught:
        examined(copy, list_exports(copy.exports)[0].folder, runtimes=("aoti",))
    assert caught.value.code == "C004"


def test_named_runtimes_only_and_those_that_are_not_there_are_told(copy: Run, quick: list[list[str]]) -> None:
    made = examined(copy, runtimes=("onnx", "aoti"))
    assert names(made) == ["torch", "onnx fp32"]
    assert [entry["name"] for entry in made["absent"]] == ["aoti"]
    assert quick == [["torch", "onnx fp32"]]


def test_an_export_of_another_model_is_told_and_not_timed(copy: Run, quick: list[list[str]]) -> None:
    folder = list_exports(copy.exports)[0].folder
    old = Path(shutil.copytree(folder, folder.with_name("onnx-fp32-00000000")))
    write_sealed(old / "meta.json", {**read_sealed(old / "meta.json"), "bundle": "0" * 64})
    made = examined(copy, runtimes=("onnx",))
    assert names(made) == ["torch", "onnx fp32"]
    assert "another model" in made["absent"][0]["reason"] and old.name in made["absent"][0]["reason"]
    with pytest.raises(ExportError) as caught:
        examined(copy, old)
    assert caught.value.code == "E001"


def test_files_for_other_programs_and_equal_names_are_told_apart(copy: Run) -> None:
    folder, bundle = list_exports(copy.exports)[0].folder, read_bundle(copy.bundle_path)
    shutil.copytree(folder, folder.with_name("onnx-fp32-11111111"))
    for name, changes in {"pt2-fp32-2": {"target": "pt2"}, "onnx-bf16-3": {"precision": "bf16"}}.items():
        other = Path(shutil.copytree(folder, folder.with_name(name)))
        write_sealed(other / "meta.json", {**read_sealed(other / "meta.json"), **changes})
    ready, absent = contenders_of(bundle, copy.exports, run="RUN")
    listed = [contender.name for contender in ready if contender.runtime == "onnx"]
    assert len(listed) == len(set(listed)) == 2 and "onnx fp32 11111111" in listed
    reasons = {entry.name: entry.reason for entry in absent}
    assert "no runtime here reads it" in reasons["pt2 fp32"]
    assert "BF16" in reasons["onnx bf16"]


def test_an_engine_that_answers_otherwise_is_not_compared(
    copy: Run, quick: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Contender.open

    def tilted(self: Contender, *where: Any) -> Engine:
        engine = original(self, *where)
        if self.runtime == "onnx":
            scores = engine.scores
            engine.scores = lambda pixels: scores(pixels) * np.float32(0.999)  # type: ignore[method-assign]
        return engine

    monkeypatch.setattr(Contender, "open", tilted)
    made = examined(copy, runtimes=("onnx",))
    row = made["engines"][1]
    assert quick == [] and row["ratio"] is None
    assert "differ" in row["not_compared"] and row["agreement"]["same_top1"] == row["agreement"]["rows"]
    assert any("onnx fp32 is not compared" in text for text in made["notices"])


def test_images_that_are_gone_leave_accuracy_unknown_and_the_rest_stands(
    copy: Run, quick: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgcls_fast.data.reach.WAITS_S", ())
    gone = replace(copy.manifest, root=copy.directory / "gone")
    monkeypatch.setattr(Run, "manifest", property(lambda self: gone))
    made = examined(copy, runtimes=("onnx",))
    assert [row["accuracy"] for row in made["engines"]] == [None, None]
    assert made["engines"][1]["agreement"]["images"] == "noise"
    assert any("accuracy is unknown" in text for text in made["notices"])


# ---------------------------------------------------------------- sweeps


class Fake:
    """An engine with little memory, whose file may take one batch size only."""

    thread_safe, runtime, precision, max_batch, thresholds = True, "onnx", "fp32", 64, None

    def __init__(self, engine: Engine, memory: int) -> None:
        self.labels, self.pixels, self.memory = engine.labels, engine.pixels, memory

    def scores(self, pixels: np.ndarray) -> np.ndarray:
        if len(pixels) > self.memory:
            raise MemoryError
        return np.zeros((len(pixels), self.labels.size), np.float32)

    def bind(self, batch: int) -> Any:
        raise ValueError(f"this file takes batches of 8, got {batch}")

    def warmup(self, n: int) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("batches", "memory", "timed", "ended"),
    [((), 4, [1, 2, 4], "memory"), ((2, 4, 16, 32), 4, [2, 4], "memory"), ((16,), 4, [1], "memory"), ((8, 2), 64, [8, 2], "done")],
)  # fmt: skip
def test_a_batch_that_memory_does_not_hold_ends_the_sweep(
    run: Run, monkeypatch: pytest.MonkeyPatch, batches: tuple[int, ...], memory: int, timed: list[int], ended: str
) -> None:
    bundle = read_bundle(run.bundle_path)
    fake = Fake(Contender("torch", "torch").open(bundle, "cpu", 1), memory)
    monkeypatch.setattr(efficiency, "_SWEEP", {"duration_s": 0.001, "warmup_s": 0, "min_iterations": 1})
    task = efficiency._Task(run, bundle, "cpu", 1, batches, 0.001)
    one = efficiency.measure(efficiency._EndToEnd(fake), 1, duration_s=0.001)
    found = efficiency._sweep(Contender("onnx fp32", "onnx"), fake, task, one)
    assert [timing["batch"] for timing in found["sweep"]["timings"]] == timed
    assert found["sweep"]["ended"] == ended
    assert found["best"]["batch"] in timed


def test_a_file_of_one_batch_size_is_timed_at_one_image_and_at_its_own(
    copy: Run, quick: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = list_exports(copy.exports)[0].folder
    write_sealed(folder / "meta.json", {**read_sealed(folder / "meta.json"), "batch": 8})
    original = Contender.open
    monkeypatch.setattr(efficiency, "_SWEEP", {"duration_s": 0.001, "warmup_s": 0, "min_iterations": 1})
    monkeypatch.setattr(
        Contender,
        "open",
        lambda self, *where: Fake(original(self, *where), 64) if self.fixed else original(self, *where),
    )
    row = examined(copy, runtimes=("onnx",), batches=())["engines"][1]
    assert [timing["batch"] for timing in row["sweep"]["timings"]] == [1, 8]
    assert row["latency"]["device"] is None


# ---------------------------------------------------------------- comparison and facts


def test_a_race_gives_a_ratio_of_each_but_torch_and_a_failed_process_is_told(run: Run) -> None:
    bundle, threads = read_bundle(run.bundle_path), torch.get_num_threads()
    ready, _ = contenders_of(bundle, run.exports, run="RUN", runtimes=("onnx",))
    task = {"bundle": str(run.bundle_path), "device": "cpu", "threads": threads, "pairs": 3,
            "contenders": [contender.to_task() for contender in ready]}  # fmt: skip
    found = race.race(json.loads(json.dumps(task)))
    assert list(found) == ["onnx fp32"] and math.isfinite(found["onnx fp32"][0])
    nowhere = replace(bundle, directory=run.directory / "nowhere")
    ratios, failed = race.ratios(ready, nowhere, "cpu", threads)
    assert ratios == {} and "nowhere" in failed


def test_the_ratio_of_several_processes_lies_in_its_interval_and_needs_no_cpu_clock() -> None:
    found = race.summed([[math.log(r), math.nan] for r in (0.5, 0.4, 0.6, 0.5, 0.45)])
    assert found["ratio"] == pytest.approx(0.5) and found["low"] < 0.4 and found["high"] > 0.6
    assert found["cpu_ratio"] is None
    assert race.summed([[0.0, math.log(2)]] * 5)["cpu_ratio"] == pytest.approx(2)


def test_multiplications_are_those_that_the_layers_need(bundle_of: Callable[..., Any]) -> None:
    from torch import nn

    from imgcls_fast.engines.torch_runtime import load_model

    bundle = bundle_of("small-cnn", size=48)
    model, counts = load_model(bundle), []

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        each = module.weight[0].numel()  # type: ignore[union-attr,index]
        counts.append(output.numel() * each)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros((1, 48, 48, 3), dtype=torch.uint8))
    assert counted(bundle) == (sum(counts), sum(parameter.numel() for parameter in model.parameters()))


def test_attention_is_counted_too(bundle_of: Callable[..., Any]) -> None:
    depth, width, tokens = 2, 32, 17
    bundle = bundle_of(
        "timm/vit_tiny_patch16_224",
        args={"patch_size": 8, "embed_dim": width, "depth": depth, "num_heads": 2},
        seen="nothing",
    )
    block = tokens * 12 * width * width + 2 * tokens * tokens * width
    assert counted(bundle)[0] == 16 * 3 * 64 * width + depth * block + 3 * width


@pytest.mark.parametrize(
    ("decoded", "alone", "both", "limit"),
    [
        (100, 50, 40, "model"),
        (50, 100, 49, "loader"),
        (100, 95, 50, "both"),
        (95, 100, 90, "both"),
        (100, 100, 20, "contention"),
    ],
)
def test_the_slower_of_loader_and_model_limits_unless_they_fight(
    decoded: float, alone: float, both: float, limit: str
) -> None:
    assert limit_of(decoded, alone, both) == limit


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "changes",
    [{"runtimes": ("onx",)}, {"runtimes": ("auto",)}, {"batches": (0,)}, {"batches": (True,)}, {"duration_s": 0}, {"duration_s": math.nan},
     {"device": "gpu"}],
)  # fmt: skip
def test_impossible_wishes_are_refused_before_anything_is_timed(run: Run, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        examined(run, **changes)
    assert caught.value.code == "C003"


def test_an_unfinished_run_and_a_missing_gpu_are_told(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HardwareError) as no_gpu:
        examined(copy, device="cuda")
    assert no_gpu.value.code == "H001"
    shutil.rmtree(copy.bundle_path)
    with pytest.raises(ModelError) as unfinished:
        examined(copy)
    assert unfinished.value.code == "M005"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["-b", "0"], "U002"), (["-b", "x"], "U002"), (["-b", "1.5"], "U002"), (["--duration", "soon"], "U002"),
        (["--duration", "0"], "U002"), (["--duration", "inf"], "U002"), (["--runtime", "onx"], "U002"),
        (["--device", "tpu"], "U002"), (["no-such-run"], "U003"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line_have_a_code(
    run: Run, capsys: pytest.CaptureFixture[str], words: list[str], code: str
) -> None:
    assert main(["bench", *words]) == 2
    assert f"error[{code}]" in capsys.readouterr().err
