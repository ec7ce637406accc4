"""The verbs of the command line as a table, and the shape of an option. Standard library only: `--help` must not wait for a schema.

The options themselves are in `core/options.py`, those of settings in `core/config.py`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from .choices import formats_in_words

# The headings of `--help`, in their order.
Group = Literal[
    "model", "optimisation", "data", "machine", "target", "INT8 and gate", "configuration", "output", "options"
]
Kind = Literal["value", "numbers", "bool", "switch", "many"]


class Flag(NamedTuple):
    """One option.

    Attributes:
        names: visible names, e.g. ("-m", "--model"); the first long one is the keyword.
        help: one line.
        setting: "section.field" of the schema, or None for an option of the verb itself.
        verbs: the verbs that know it.
        metavar: what the help shows for its value.
        kind: value: one text; numbers: "0.8,0.1,0.1"; bool: --x and --no-x; switch: --x; many: may be repeated.
        group: heading in the help.
        choices: all legal texts, where they can be listed.
        values: pairs (text, value of the setting) where the two differ.
        aliases: further names, not shown.
    """

    names: tuple[str, ...]
    help: str
    setting: str | None = None
    verbs: tuple[str, ...] = ("train",)
    metavar: str = "VALUE"
    kind: Kind = "value"
    group: Group = "options"
    choices: tuple[str, ...] = ()
    values: tuple[tuple[str, Any], ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def long(self) -> str:
        """The name to show in messages."""
        return next(name for name in self.names if name.startswith("--"))

    @property
    def keyword(self) -> str:
        """The name in Python."""
        return self.long[2:].replace("-", "_")

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every spelling that the command line accepts."""
        off = (f"--no-{self.long[2:]}",) if self.kind == "bool" else ()
        return self.names + self.aliases + off


class Verb(NamedTuple):
    """One verb: `things` are its positional words, at most `most` of them (None: any number)."""

    name: str
    help: str
    things: str
    most: int | None
    handler: str  # module:function inside imgcls_fast.cli
    examples: tuple[str, ...] = ()
    least: int = 0


VERBS: tuple[Verb, ...] = (
    Verb(
        "train",
        f"train on a {formats_in_words()}; without DATA on embedded digits",
        "[DATA]",
        1,
        "train:train",
        ("train flowers/ -m resnet50 -e 30", "train flowers/ --dry-run", "train --resume"),
    ),
    Verb(
        "eval",
        "judge a run on its test rows, or on other labelled images",
        "[RUN] [DATA]",
        2,
        "judge:evaluate",
        ("eval", "eval runs/last --split val", "eval runs/last more-photos/ --runtime onnx"),
    ),
    Verb(
        "predict",
        "name the class of images and folders",
        "[RUN] IMAGES...",
        None,
        "judge:predict",
        ("predict photo.jpg", "predict runs/last photos/ --top-k 3 -o answers.csv"),
        1,
    ),
    Verb(
        "export",
        "write the model for another runtime, and judge it there",
        "[RUN]",
        1,
        "export:export",
        ("export --onnx", "export --trt", "export runs/last --trt --precision int8 --max-drop 0.5"),
    ),
    Verb(
        "verify",
        "compare pixels and scores of every loader and runtime",
        "[RUN]",
        1,
        "export:verify",
        ("verify runs/last",),
    ),
    Verb(
        "deploy render",
        "write a Kubernetes or KServe manifest for a Triton export",
        "kserve|k8s [RUN]",
        2,
        "export:deploy",
        ("deploy render kserve runs/last -o service.yaml",),
        1,
    ),
    Verb(
        "bench",
        "time a run's engines on this machine: latency, rate, accuracy",
        "[RUN|EXPORT]",
        1,
        "bench:bench",
        ("bench", "bench runs/last --runtime onnx -b 1 -b 8", "bench runs/last/exports/onnx-int8-0a1b2c3d"),
    ),
    Verb(
        "bench report",
        "draw the results of `pytest benchmarks`: pictures and one page",
        "RESULTS...",
        None,
        "bench:report",
        ("bench report benchmarks/results/amd-epyc-2core -o bench/",),
        1,
    ),
    Verb(
        "bench compare",
        "which ratios became worse between two results of one machine",
        "BEFORE AFTER",
        2,
        "bench:compare",
        ("bench compare before/ after/",),
        2,
    ),
    Verb("report", "write report.html of a run again", "[RUN]", 1, "judge:report"),
    Verb(
        "data check",
        "find damaged, duplicate and misplaced images",
        "DATA",
        1,
        "data:check",
        ("data check flowers/",),
        1,
    ),
    Verb(
        "data split",
        "write split.csv: train, val and test without leaks",
        "DATA",
        1,
        "data:split",
        ("data split flowers/ --group-by 'P_(\\d+)' -o split.csv",),
        1,
    ),
    Verb("data stats", "count classes, sizes and formats", "DATA", 1, "data:stats", ("data stats flowers/",), 1),
    Verb("runs list", "all runs with date, accuracy and state", "", 0, "runs:listing"),
    Verb("runs show", "one run: configuration, data and metrics", "[RUN]", 1, "runs:show"),
    Verb(
        "models list",
        "image classifiers: parameters, usual size, weights here or where from",
        "[PATTERN]",
        1,
        "models:listing",
        ("models list resnet18", "models list 'timm/vit_*'"),
    ),
    Verb(
        "runs diff",
        "settings, data and figures in which two runs differ",
        "RUN RUN",
        2,
        "runs:diff",
        ("runs diff flowers-resnet50-20261123-101500 runs/last",),
        2,
    ),
    Verb(
        "runs rm",
        "delete runs, after asking",
        "RUN...",
        None,
        "runs:remove",
        ("runs rm flowers-small-cnn-20261123-101500 --yes",),
        1,
    ),
    Verb("demo", "train on handwritten digits in about a minute, offline", "", 0, "train:demo"),
    Verb("doctor", "what this machine and this installation can do", "", 0, "runs:doctor"),
)

# Words that people look for and that this version answers with a clear "not yet".
LATER_VERBS = (
    "serve",
    "tune",
    "auto",
    "leaderboard",
    "compare",
    "explain",
    "ensemble",
    "extend",
    "drift",
)
