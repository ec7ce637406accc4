"""One more choice is one entry of one table: schema, --help, documentation and errors know it without another edit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tried(entry: str, more: str) -> dict[str, Any]:
    """What a process that begins with the line `entry`, before any schema is built, prints as JSON."""
    program = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
from imgcls_fast.core import choices
{entry}
import make_docs
from imgcls_fast.core.config import flag_rows
from imgcls_fast.core.errors import ConfigError
from imgcls_fast.core.settings import build_config
def refused(settings):
    try:
        build_config(settings)
    except ConfigError as error:
        return str(error)
found = {{
    "help": {{row["setting"]: row.get("choices", ()) for row in flag_rows()}},
    "docs": make_docs.configuration_page(),
    "rows": make_docs.setting_flags_module(),
}}
{more}
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def extended() -> dict[str, Any]:
    """A process with one optimizer, one schedule, one loss, one policy of augmentation and one tracker more."""
    return tried(
        """
choices.OPTIMIZERS["adagrad"] = choices.Optimizer("torch.optim:Adagrad", ("fused",))
choices.SCHEDULES["flat"] = "imgcls_fast.training.schedule:NONE"
choices.TRACKERS["mine"] = choices.Tracker("mine:Tracker")
choices.LOSSES["brier"] = choices.Loss("brier:one_of", "brier:any_of")
choices.POLICIES["autumn"] = choices.Policy(hue=0.25)
""",
        """
import types
import torch
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.training.objectives import Objective
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.training.defaults import RECIPES, Notes
from imgcls_fast.training.optim import build_optimizer
from imgcls_fast.training.plan_numbers import choose_augment
from imgcls_fast.training.schedule import Schedule
from imgcls_fast.tracking.trackers import trackers
sys.modules["mine"] = types.SimpleNamespace(Tracker=lambda run: f"tracks {run}")
sys.modules["brier"] = types.SimpleNamespace(
    one_of=lambda logits, soft: (logits.softmax(1) - soft).square().sum(1),
    any_of=lambda logits, soft: (logits.sigmoid() - soft).square(),
)
losses = build_config({"loss.name": "brier", "loss.label_smoothing": 0}).loss
labels = LabelSpace((Task("a", ("x", "y")), Task("b", ("z",), "any_of")))
objective, targets = Objective(labels, losses, None, torch.device("cpu")), torch.tensor([[1.0, 0, 1]])
loss = objective.mean(objective.sums(torch.zeros(1, 3), targets, torch.ones(1)), objective.totals(targets, torch.ones(1)))
asked = {"optim.opt": "adagrad", "optim.sched": "flat", "optim.lr": 0.5, "optim.weight_decay": 0, "optim.warmup": 0}
config = build_config(asked).optim
optimizer = build_optimizer(torch.nn.Linear(2, 2), config, torch.device("cpu"))
notes = Notes(build_config({"augment.policy": "autumn", "data.source": "x"}))
changes = choose_augment(notes, RECIPES["scratch"], Pixels(32, 1.0, "bilinear", "rgb", "apply", (0.5,) * 3, (0.5,) * 3))
found |= {
    "changes": [changes.hue, changes.flip],
    "error": {name: refused({name: "nothing"}) for name in ("optim.opt", "optim.sched", "loss.name", "augment.policy", "train.track")},
    "loss": float(loss),
    "tracked": trackers(build_config({"train.track": ["mine"]}).train.track, "a run"),
    "made": [type(optimizer).__name__, optimizer.param_groups[0]["lr"]],
    "rates": [Schedule(config, 2, 3).lr(step) for step in range(6)],
}
""",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("optim.opt", "adagrad"),
        ("optim.sched", "flat"),
        ("loss.name", "brier"),
        ("augment.policy", "autumn"),
        ("train.track", "mine"),
    ],
)
def test_one_more_choice_is_in_schema_help_docs_and_errors(setting: str, name: str, extended: dict[str, Any]) -> None:
    assert name in extended["help"][setting]
    assert f"`{name}`" in next(line for line in extended["docs"].splitlines() if f"`{setting}`" in line)
    assert f'"{name}"' in extended["rows"]
    assert f"'{name}'" in extended["error"][setting]


@pytest.mark.slow
def test_one_more_optimizer_schedule_loss_policy_and_tracker_are_used(extended: dict[str, Any]) -> None:
    assert extended["loss"] == 0.5 + 0.25
    assert extended["changes"] == [0.25, 0.0]
    assert extended["made"] == ["Adagrad", 0.5]
    assert extended["rates"] == [0.5] * 6
    assert extended["tracked"] == ["tracks a run"]


# A target in a process of its own: the tables are read when their readers are imported. Its maker is the one new file.
_TARGET = """
import contextlib, io, sys, types
sys.path.insert(0, "scripts")
from imgcls_fast.core import targets

targets.TARGETS["coreml"] = targets.Target("a Core ML package", "coreml:export", {"fp16": targets.Way()}, "fp16", (".mlpackage",))
maker = types.ModuleType("imgcls_fast.exporting.coreml")
maker.export = lambda materials, way: (way.target, way.precision)
sys.modules["imgcls_fast.exporting.coreml"] = maker

from imgcls_fast.cli.app import main
import make_docs
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(shown):
    main(["export", "--help"])
    main(["export", "--coreml", "--onnx"])
    main(["export", "coreml"])
assert shown.getvalue().count("a Core ML package") == 1, shown.getvalue()
assert "fp16 for --trt and --coreml" in shown.getvalue()
assert "--onnx and --coreml exclude each other" in shown.getvalue()
assert "coreml is no run" in shown.getvalue()
assert "| `--coreml` |" in make_docs.cli_page()

from imgcls_fast.core import exports, hints, outputs
from imgcls_fast.core.errors import ConfigError
hint = hints.in_python("imgcls-fast export runs/a --coreml")
assert hint == "ic.export('runs/a', target='coreml')", hint
assert outputs.exported_model(None, "coreml").endings == (".mlpackage",)
assert exports._UNFINISHED.fullmatch(".coreml-fp16-0a1b2c3d.89abcdef")
for words, code, said in (("tensorrt", None), "C003", "'coreml'"), (("coreml", "int8"), "C004", "--coreml has no int8, only fp16"):
    try:
        exports.way_of(*words)
    except ConfigError as error:
        assert (error.code, said in error.message) == (code, True), error.message

from imgcls_fast.exporting.session import export_bundle
print(export_bundle(None, "coreml"))
"""


@pytest.mark.slow
def test_a_new_export_target_is_one_entry() -> None:
    done = subprocess.run([sys.executable, "-c", _TARGET], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "('coreml', 'fp16')"


# A figure whose entry is a line of the table, which is read when `core.figures` is imported.
_FIGURE = """
from pathlib import Path
from imgcls_fast.core import figures
line = '    Figure("kappa", "Cohen kappa", "kappa", lambda m: kappa(m.confusion), kinds=("one_of",)),\\n'
text = Path(figures.__file__).read_text("utf-8")
exec(compile(text.replace(")\\nMONITORS", line + ")\\nMONITORS", 1), figures.__file__, "exec"), figures.__dict__)

def kappa(c):
    chance = float(c.sum(0) @ c.sum(1)) / c.sum() ** 2
    return (c.trace() / c.sum() - chance) / (1 - chance)

figures.kappa = kappa
"""
_FIGURE_USED = """
import tempfile
import numpy as np
from sklearn.metrics import cohen_kappa_score
from imgcls_fast.core.figures import usual_figures
from imgcls_fast.core.labels import LabelSpace, Task
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.evaluation import plots
from imgcls_fast.evaluation.report import ReportFacts, write_report
from imgcls_fast.evaluation.tasks import judge_all
from imgcls_fast.tracking.events import EpochDone, event_of
from imgcls_fast.tracking.lines import epoch_line
plots.judgement_plots = lambda predictions, metrics: {}
draw, pages = np.random.default_rng(0), []
truth = draw.integers(0, 3, 40)
scores = draw.dirichlet([1, 1, 1], 40).astype(np.float32)
targets = np.eye(3, dtype=np.float32)[truth]
single = LabelSpace.single("abc")
several = LabelSpace((Task("a", ("x", "y", "z")), Task("b", ("v",), "any_of")))
for labels in (single, several):
    more = [np.ones((40, 1), np.float32)] * (labels is several)
    said = Predictions(np.arange(40), *(np.hstack([part, *more]) for part in (scores, targets)), labels, ("",) * 40)
    metrics = judge_all(said, bootstrap=0)
    page = write_report(Path(tempfile.mkdtemp()) / "r.html", ReportFacts("x", {"test": (said, metrics)}, lambda name: b"")).read_text()
    pages.append(["Cohen kappa" in page, metrics.to_dict()["kappa"]])
epoch = dict.fromkeys(EpochDone.__required_keys__, 1) | {"event": "epoch", "val_kappa": 0.25, "monitor": "val/kappa"}
found |= {
    "pages": pages,
    "true": cohen_kappa_score(truth, scores.argmax(1)),
    "recorded": [figure.column for figure in usual_figures(single=True)],
    "line": epoch_line(event_of(EpochDone, epoch)),
    "error": refused({"train.monitor": "val/nothing"}),
}
"""


@pytest.mark.slow
def test_a_new_figure_is_one_entry_and_can_be_monitored_and_read_everywhere() -> None:
    found = tried(_FIGURE, _FIGURE_USED)
    assert "val/kappa" in found["help"]["train.monitor"] and "`val/kappa`" in found["docs"] and "'val/kappa'" in found["error"]
    assert '"val/kappa"' in found["rows"] and "val_kappa" in found["recorded"] and "kappa .250" in found["line"]
    assert found["pages"] == [[True, pytest.approx(found["true"])]] * 2


def test_one_more_source_format_is_in_help_docs_and_errors_and_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.odd").write_text("odd")
    found = tried(
        """
import types
choices.FORMATS["INI"] = "mine:INI"
""",
        f"""
import contextlib, io, os
from pathlib import Path
from imgcls_fast.cli.app import main
from imgcls_fast.core.errors import DataError
from imgcls_fast.data.findings import ScanOptions
from imgcls_fast.data.sources import Format, list_source
ini = Format("an INI file", lambda source: source.suffix == ".ini", lambda source, options: f"the rows of {{source.name}}")
sys.modules["mine"] = types.SimpleNamespace(INI=ini)
with contextlib.redirect_stdout(io.StringIO()) as shown:
    main(["train", "--help"])
try:
    list_source(Path({str(tmp_path)!r}, "x.odd"), ScanOptions())
except DataError as error:
    said = str(error)
found |= {{"shown": shown.getvalue(), "said": said, "rows": list_source(Path("a.ini"), ScanOptions()), "cli": make_docs.cli_page()}}
""",
    )
    words = "folder, CSV, JSONL, zip, tar or INI"
    assert words in found["shown"]
    assert words in found["docs"]
    assert words in found["cli"]
    assert "nor an INI file" in found["said"]
    assert found["rows"] == "the rows of a.ini"
