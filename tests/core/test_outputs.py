"""What a user names as output: only an earlier output of the same kind is replaced, and never an input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imgcls_fast as ic
from imgcls_fast.cli.app import main
from imgcls_fast.core import outputs
from imgcls_fast.core.errors import HardwareError, UsageError
from imgcls_fast.core.options import flags_of
from imgcls_fast.core.outputs import claim_file, claim_folder
from imgcls_fast.core.places import others_files
from imgcls_fast.core.verbs import VERBS

FOREIGN = "id,name\n1,mine\n"
EARLIER = [  # kind, name, content of an earlier output, content that only looks like one
    (outputs.SPLIT, "s.csv", "path,label,group,split\na.jpg,a,,train\n", "path,label,split\na.jpg,a,train\n"),
    (outputs.ANSWERS, "a.csv", "path,label,confidence,label_2,confidence_2,error\n", "path,label\n"),
    (outputs.ANSWERS, "a.jsonl", '{"path": "a", "label": "b", "confidence": 1, "top": []}\n', '{"path": "a", "label": "b"}\n'),
    (outputs.ANSWERS, "b.jsonl", '{"path": "a", "error": "empty"}\n', "[" * 100_000),
    (outputs.COMPARED, "v.json", '{"images": 1, "pixels": {}, "scores": {}, "failures": []}', '{"images": 1}'),
    (outputs.TIMES, "t.json", '{"schema": 1, "engines": [], "machine": {}, "method": {}}', "{"),
    (outputs.CHANGES, "c.json", '{"rows": [], "flagged": 0, "only_before": [], "only_after": []}', "[]"),
    (outputs.SERVICE, "s.yaml", "# k8s manifest for x (fp16), written by imgcls-fast.\nkind: a\n", "# mine\nkind: a\n"),
    (outputs.REPORT, "r.html", "<html><title>run \u00b7 imgcls-fast report</title>", "<html><title>mine</title>"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def labels() -> Path:
    """A label table of twelve images of two classes, under three names: its own, a hard link and a symbolic link."""
    draw = np.random.default_rng(0)
    lines = ["path,label"]
    for k in range(12):
        Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).save(f"{k}.png")
        lines.append(f"{k}.png,{'ab'[k % 2]}")
    path = Path("labels.csv")
    path.write_text("\n".join(lines) + "\n")
    os.link(path, "hard.csv")
    os.symlink(path, "soft.csv")
    return path


@pytest.mark.parametrize("out", ["labels.csv", "hard.csv", "soft.csv", "./x/../labels.csv"])
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "force"])
def test_the_label_table_that_is_split_is_never_replaced_by_whatever_name(
    out: str, force: list[str], labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("x").mkdir()
    before = labels.read_bytes()
    assert main(["data", "split", "labels.csv", "-o", out, *force]) == 2
    assert "an input is never replaced" in capsys.readouterr().err
    assert labels.read_bytes() == before and Path("soft.csv").is_symlink()


def test_a_split_replaces_an_earlier_one_and_other_files_only_by_force(labels: Path) -> None:
    for _ in range(2):
        assert main(["data", "split", "labels.csv", "-o", "split.csv", "-q"]) == 0
    Path("mine.csv").write_text(FOREIGN)
    assert main(["data", "split", "labels.csv", "-o", "mine.csv", "-q"]) == 2
    assert Path("mine.csv").read_text() == FOREIGN
    with pytest.raises(UsageError, match="no --out names it"):
        ic.split_data(labels)
    ic.split_data(labels, out="mine.csv", force=True)
    assert Path("mine.csv").read_text() == Path("split.csv").read_text()


def test_a_split_that_was_corrected_by_hand_or_is_another_is_replaced_only_by_force(
    labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "split", "labels.csv", "-o", "split.csv", "-q"]
    assert main(words) == 0
    written = Path("split.csv").read_text()
    corrected = written.replace(",a,", ",b,", 1)
    Path("split.csv").write_text(corrected)
    assert main(words) == 2
    assert "changed by hand" in capsys.readouterr().err and Path("split.csv").read_text() == corrected
    with pytest.raises(UsageError, match="changed by hand"):
        ic.split_data(labels, out="split.csv")
    assert main([*words, "--force"]) == 0 and Path("split.csv").read_text() == written
    assert main([*words, "--split-ratio", "0.5,0.25,0.25"]) == 2
    assert Path("split.csv").read_text() == written


@pytest.mark.parametrize("out", ["before.json", "after/grad.json"])
def test_a_comparison_of_benchmarks_never_replaces_what_it_compares(
    out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("imgcls_fast.api.bench.bench_compare", lambda *_: {"rows": [], "table": []})
    Path("after").mkdir()
    for name in ("before.json", "after/grad.json"):
        Path(name).write_text(FOREIGN)
    assert main(["bench", "compare", "before.json", "after", "-o", out, "--force"]) == 2
    assert "an input is never replaced" in capsys.readouterr().err and Path(out).read_text() == FOREIGN


def test_an_empty_lock_beside_other_files_does_not_give_them_away() -> None:
    folder = Path("mine")
    folder.mkdir()
    (folder / ".lock").write_text("")
    assert others_files(folder) == []  # killed at birth
    (folder / "report.html").write_text("mine")
    assert others_files(folder) == [".lock", "report.html"]
    (folder / ".lock").write_text("pid 1\n")
    assert others_files(folder) == []


@pytest.mark.parametrize("out", ["x.parquet", "x", "x.tsv", "."])
def test_a_split_is_not_written_under_an_ending_that_lies(
    out: str, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir())
    assert main(["data", "split", "labels.csv", "-o", out]) == 2
    assert ".csv" in capsys.readouterr().err
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(("kind", "name", "earlier", "foreign"), EARLIER, ids=[row[1] for row in EARLIER])
def test_an_earlier_output_is_known_by_its_content(kind: outputs.Kind, name: str, earlier: str, foreign: str) -> None:
    path = Path(name)
    for content in (earlier, ""):
        path.write_text(content)
        assert claim_file(path, kind) == path
    for content in (foreign, FOREIGN, "\0" * 99):
        path.write_text(content)
        with pytest.raises(UsageError, match="has written"):
            claim_file(path, kind)
        claim_file(path, kind, force=True)


VERBS_WITH_FILES = {
    "predict": ["run", "0.png"], "export": ["run"], "verify": ["run"], "deploy render": ["k8s", "run"], "bench": ["run"],
    "data split": ["labels.csv"], "bench compare": ["before", "after"], "eval": ["run"],
}  # fmt: skip


def test_the_list_of_verbs_with_outputs_is_whole() -> None:
    named = {verb.name for verb in VERBS if any(flag.keyword == "out" for flag in flags_of(verb.name))}
    assert named - {"train", "demo", "bench report"} == VERBS_WITH_FILES.keys()  # those make runs; a page is tested with its room
    forced = {verb.name for verb in VERBS if any(flag.keyword == "force" for flag in flags_of(verb.name))}
    assert forced == named - {"train", "demo"} | {"report"}


@pytest.mark.parametrize("verb", VERBS_WITH_FILES)
def test_every_verb_keeps_somebody_elses_file_and_refuses_before_it_works(
    verb: str, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "manifest.npz"):
        (Path("runs/run") / name).parent.mkdir(parents=True, exist_ok=True)
        (Path("runs/run") / name).write_text("")  # a run whose files cannot even be read
    ending = {"predict": ".csv", "export": ".onnx", "deploy render": ".yaml", "data split": ".csv", "eval": ""}.get(verb, ".json")
    kept = Path(f"mine{ending}") if ending else Path("mine/metrics.json")
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(FOREIGN)
    assert main([*verb.split(), *VERBS_WITH_FILES[verb], "-o", f"mine{ending}"]) == 2
    err = capsys.readouterr().err
    assert "error[U002]" in err and "--force" in err
    assert kept.read_text() == FOREIGN


def test_a_folder_of_results_is_taken_again_only_where_we_made_it() -> None:
    folder = Path("judged")
    assert claim_folder(folder, outputs.JUDGED_NAMES, outputs.JUDGED) == folder
    folder.mkdir()
    (folder / "predictions.json").write_text("[]")  # of another tool
    with pytest.raises(UsageError, match=r"predictions\.json"):
        claim_folder(folder, outputs.JUDGED_NAMES, outputs.JUDGED)
    (folder / "predictions.json").write_text(json.dumps({"labels": 1, "fingerprint": "", "has_targets": True}))
    (folder / "predictions.csv").write_text("path,label\n")
    claim_folder(folder, outputs.JUDGED_NAMES, outputs.JUDGED)
    with pytest.raises(UsageError, match="input"):
        claim_folder(folder, outputs.JUDGED_NAMES, outputs.JUDGED, force=True, inputs=[folder / "predictions.csv"])
    page = Path("page")
    page.mkdir()
    (page / "bench.html").write_text("<html>mine")
    with pytest.raises(UsageError, match=r"bench\.html"):
        claim_folder(page, ["bench.html"], outputs.BENCH_PAGE)
    for wrong in ("judged.json", "figures.html"):
        with pytest.raises(UsageError, match="names a folder"):
            claim_folder(Path(wrong), outputs.JUDGED_NAMES, outputs.JUDGED)


def test_files_of_a_run_are_never_an_output_even_by_force() -> None:
    run = Path("runs/mine")
    (run / "eval" / "test").mkdir(parents=True)
    for name in ("config.yaml", "manifest.npz", "plan.json", "eval/test/metrics.json"):
        (run / name).write_text("{}")
    with pytest.raises(UsageError, match="belongs to the run"):
        claim_file(run / "plan.json", outputs.TIMES, force=True)
    with pytest.raises(UsageError, match="belongs to the run"):
        claim_folder(run / "eval" / "test", outputs.JUDGED_NAMES, outputs.JUDGED, force=True)
    claim_folder(run / "eval" / "other", outputs.JUDGED_NAMES, outputs.JUDGED)
    claim_file(run / "times.json", outputs.TIMES)


def test_a_device_a_folder_and_a_closed_place_are_refused_before_the_work() -> None:
    os.mkfifo("pipe.json")
    os.symlink("/dev/null", "null.json")
    os.symlink("nowhere", "gone.json")
    for name in ("pipe.json", "null.json"):
        with pytest.raises(UsageError, match="device or a pipe"):
            claim_file(Path(name), outputs.TIMES, force=True)
    with pytest.raises(UsageError, match="has written"):
        claim_file(Path("gone.json"), outputs.TIMES)
    with pytest.raises(UsageError, match="is a folder"):
        claim_file(Path("runs/..").resolve(), outputs.TIMES)
    with pytest.raises(HardwareError, match="No such file"):
        claim_file(Path("nowhere/times.json"), outputs.TIMES)


def test_an_output_in_a_folder_that_cannot_be_entered_is_h003(tmp_path: Path, close: Callable[[Path], Path]) -> None:
    (tmp_path / "closed").mkdir()
    for place in (close(tmp_path / "closed") / "x.csv", tmp_path / "closed" / "inner" / "x.csv"):
        with pytest.raises(HardwareError, match="Permission denied"):
            claim_file(place, outputs.ANSWERS)


def test_a_copy_of_an_export_is_known_by_its_producer_or_its_digest(tmp_path: Path) -> None:
    exports, copy = tmp_path / "exports", Path("model.plan")
    (exports / "trt-fp16-00000000").mkdir(parents=True)
    copy.write_bytes(b"engine")
    kind = outputs.exported_model(exports, "trt")
    with pytest.raises(UsageError, match="an export for trt"):
        claim_file(copy, kind)
    from imgcls_fast.core.files import sha256_file

    (exports / "trt-fp16-00000000" / "meta.json").write_text(json.dumps({"sha256": sha256_file(copy)}))
    claim_file(copy, kind)
    Path("m.onnx").write_bytes(b"\x08\x0a\x12\x0bimgcls-fast\x1a")
    claim_file(Path("m.onnx"), outputs.exported_model(exports, "onnx"))
    with pytest.raises(UsageError, match=r"\.onnx"):
        claim_file(Path("m.plan"), outputs.exported_model(exports, "onnx"))


def test_an_evaluation_is_not_written_into_the_images_that_it_judges(tmp_path: Path) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    for place in ("data", "data/new", "data/cat/x/../deep"):
        with pytest.raises(UsageError, match="would become data"):
            claim_folder(Path(place), outputs.JUDGED_NAMES, outputs.JUDGED, force=True, inputs=[Path("data")])
    claim_folder(Path("data2"), outputs.JUDGED_NAMES, outputs.JUDGED, inputs=[Path("data")])
    for name in ("config.yaml", "manifest.npz"):
        (tmp_path / "data" / "run").mkdir(exist_ok=True)
        (tmp_path / "data" / "run" / name).write_text("")
    claim_folder(Path("data/run/eval/other"), outputs.JUDGED_NAMES, outputs.JUDGED, inputs=[Path("data")])
