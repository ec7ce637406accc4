"""Every verb and flag of the command line, as data. Standard library only: `--help` must not wait for a schema.

Legal values, ranges and defaults belong to `core/config.py`; a test compares the two. The long name of a flag, with
underscores, is also the keyword of the Python API: `--img-size 224` is `train(img_size=224)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from .errors import ConfigError, near
from .other_names import not_needed, setting_meant, value_meant
from .targets import PRECISIONS, RUNTIMES

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
    group: str = "options"
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
    Verb("train", "train on a folder, CSV, JSONL, zip or tar; without DATA on embedded digits", "[DATA]", 1, "train:train",
         ("train flowers/ -m resnet50 -e 30", "train flowers/ --dry-run", "train --resume")),
    Verb("eval", "judge a run on its test rows, or on other labelled images", "[RUN] [DATA]", 2, "judge:evaluate",
         ("eval", "eval runs/last --split val", "eval runs/last more-photos/ --runtime onnx")),
    Verb("predict", "name the class of images and folders", "[RUN] IMAGES...", None, "judge:predict",
         ("predict photo.jpg", "predict runs/last photos/ --top-k 3 -o answers.csv"), 1),
    Verb("export", "write the model for another runtime, and judge it there", "[RUN]", 1, "export:export",
         ("export --onnx", "export --trt", "export runs/last --trt --precision int8 --max-drop 0.5")),
    Verb("verify", "compare pixels and scores of every loader and runtime", "[RUN]", 1, "export:verify", ("verify runs/last",)),
    Verb("deploy render", "write a Kubernetes or KServe manifest for a Triton export", "kserve|k8s [RUN]", 2, "export:deploy",
         ("deploy render kserve runs/last -o service.yaml",), 1),
    Verb("bench", "time a run's engines on this machine: latency, rate, accuracy", "[RUN|EXPORT]", 1, "bench:bench",
         ("bench", "bench runs/last --runtime onnx -b 1 -b 8", "bench runs/last/exports/onnx-int8-0a1b2c3d")),
    Verb("bench report", "draw the results of `pytest benchmarks`: pictures and one page", "RESULTS...", None, "bench:report",
         ("bench report benchmarks/results/amd-epyc-2core -o bench/",), 1),
    Verb("bench compare", "which ratios became worse between two results of one machine", "BEFORE AFTER", 2, "bench:compare",
         ("bench compare before/ after/",), 2),
    Verb("report", "write report.html of a run again", "[RUN]", 1, "judge:report"),
    Verb("data check", "find damaged, duplicate and misplaced images", "DATA", 1, "data:check", ("data check flowers/",), 1),
    Verb("data split", "write split.csv: train, val and test without leaks", "DATA", 1, "data:split",
         ("data split flowers/ --group-by 'P_(\\d+)' -o split.csv",), 1),
    Verb("data stats", "count classes, sizes and formats", "DATA", 1, "data:stats", ("data stats flowers/",), 1),
    Verb("runs list", "all runs with date, accuracy and state", "", 0, "runs:listing"),
    Verb("runs show", "one run: configuration, data and metrics", "[RUN]", 1, "runs:show"),
    Verb("models list", "image classifiers: parameters, usual size, weights here or where from", "[PATTERN]", 1, "models:listing",
         ("models list resnet18", "models list 'timm/vit_*'")),
    Verb("runs diff", "settings, data and figures in which two runs differ", "RUN RUN", 2, "runs:diff",
         ("runs diff flowers-resnet50-20261123-101500 runs/last",), 2),
    Verb("runs rm", "delete runs, after asking", "RUN...", None, "runs:remove", ("runs rm flowers-small-cnn-20261123-101500 --yes",), 1),
    Verb("demo", "train on handwritten digits in about a minute, offline", "", 0, "train:demo"),
    Verb("doctor", "what this machine and this installation can do", "", 0, "runs:doctor"),
)  # fmt: skip

_ALL = tuple(verb.name for verb in VERBS)
_DATA = ("train", "data check", "data split", "data stats")
_GIVEN = "configuration"
_MODEL = "model"
_ROWS = "data"
_STEPS = "optimisation"
_WORK = "machine"
_SAY = "output"
_TARGET = "target"
_GATE = "INT8 and gate"

FLAGS: tuple[Flag, ...] = (
    Flag(("-m", "--model"), "a torchvision or timm classifier, or small-cnn", "model.arch", metavar="NAME", group=_MODEL),
    Flag(("--init",), "auto | scratch | pretrained (may download) | a weights file, bundle or run", "model.init", group=_MODEL),
    Flag(("--freeze",), "none | backbone | K: the first K of its four stages stay as they are", "model.freeze", group=_MODEL),
    Flag(("--attention",), "insert NAME@PLACE, e.g. cbam@stage4, se(reduction=8)@every-block; may be repeated", "model.attention",
         metavar="NAME@PLACE", kind="many", group=_MODEL),
    Flag(("--kernels",), "our attention kernels: auto | proven (where measured faster) | on (or an error) | off", "model.kernels",
         metavar="MODE", group=_MODEL, choices=("auto", "proven", "on", "off")),
    Flag(("--img-size",), "side of the square input, pixels, or auto", "pixels.size", metavar="N", group=_MODEL),
    Flag(("--channels",), "channels of the input: auto, 1 gray, 3 RGB, 4 RGBA", "pixels.color", metavar="1|3|4", group=_MODEL,
         choices=("auto", "1", "3", "4"), values=(("1", "gray"), ("3", "rgb"), ("4", "rgba"))),
    Flag(("--mean",), "auto | data | per channel in 0..1, e.g. .5,.5,.5", "pixels.mean", kind="numbers", metavar="M", group=_MODEL),
    Flag(("--std",), "auto | data | per channel in 0..1", "pixels.std", kind="numbers", metavar="S", group=_MODEL),
    Flag(("-e", "--epochs"), "passes over the training images, or auto", "train.epochs", metavar="N", group=_STEPS),
    Flag(("-b", "--batch-size"), "images per optimizer step, or auto", "train.batch_size", metavar="N", group=_STEPS,
         aliases=("--effective-batch",)),
    Flag(("--accum",), "split each batch into K forward passes", "train.accum", metavar="K", group=_STEPS, values=(("none", None),)),
    Flag(("--lr",), "peak learning rate, or auto", "optim.lr", metavar="LR", group=_STEPS),
    Flag(("--opt",), "optimizer", "optim.opt", metavar="NAME", group=_STEPS, choices=("auto", "sgd", "adamw")),
    Flag(("--sched",), "learning-rate schedule", "optim.sched", metavar="NAME", group=_STEPS,
         choices=("auto", "cosine", "onecycle", "step", "plateau", "none")),
    Flag(("--warmup",), "warm-up in epochs (onecycle: its rise), or auto", "optim.warmup", metavar="E", group=_STEPS),
    Flag(("--weight-decay",), "weight decay, or auto", "optim.weight_decay", metavar="W", group=_STEPS),
    Flag(("--clip",), "largest norm of the gradient, or none", "optim.clip", metavar="G", group=_STEPS, values=(("none", None),)),
    Flag(("--ema",), "decay per step of averaged weights; 0: off", "optim.ema", metavar="D", group=_STEPS),
    Flag(("--label-smoothing",), "mass spread over all classes, or auto", "loss.label_smoothing", metavar="S", group=_STEPS),
    Flag(("--class-weights",), "none | auto | effective | cat=1,dog=2.5 | one number per class", "loss.class_weights", metavar="W",
         group=_STEPS),
    Flag(("--augment",), "strength of random changes", "augment.policy", metavar="NAME", group=_STEPS,
         choices=("auto", "none", "light", "medium", "heavy")),
    Flag(("--patience",), "stop after K epochs without improvement; none: never", "train.patience", metavar="K", group=_STEPS,
         values=(("none", None),)),
    Flag(("--monitor",), "picks the best checkpoint, and stops early", "train.monitor", metavar="NAME", group=_STEPS,
         choices=("auto", "val/accuracy", "val/macro_f1", "val/balanced_accuracy", "val/loss")),
    Flag(("--split-ratio",), "train, val and test fractions, e.g. .8,.1,.1", "data.split", _DATA, "A,B,C", "numbers", _ROWS),
    Flag(("--group-by",), "regular expression on the path; rows of one group never part", "data.group_by", _DATA, "REGEX", group=_ROWS),
    Flag(("--group-col",), "column that names the group", "data.group_col", _DATA, "NAME", group=_ROWS),
    Flag(("--label-col",), "column with the class", "data.label_col", _DATA, "NAME", group=_ROWS),
    Flag(("--path-col",), "column with the image path", "data.path_col", _DATA, "NAME", group=_ROWS),
    Flag(("--bad-images",), "what to do with undecodable files", "data.bad_images", _DATA, "NAME", group=_ROWS,
         choices=("quarantine", "error")),
    Flag(("--max-bad",), "most bad images: a fraction below 1, else a count", "data.max_bad", _DATA, "X", group=_ROWS),
    Flag(("--near-duplicates",), "also treat near copies as duplicates", "data.near_duplicates", _DATA, kind="bool", group=_ROWS),
    Flag(("--seed",), "seed of initial weights, data order and augmentation", "train.seed", metavar="N", group=_WORK),
    Flag(("--precision",), "precision of the forward and backward pass", "train.precision", metavar="NAME", group=_WORK,
         choices=("auto", "fp32", "bf16", "fp16")),
    Flag(("--compile",), "torch.compile", "train.compile", kind="bool", group=_WORK),
    Flag(("--deterministic",), "refuse operations without a deterministic form", "train.deterministic", kind="bool", group=_WORK),
    Flag(("--device",), "where to train", "train.device", metavar="NAME", group=_WORK, choices=("auto", "cpu", "cuda")),
    Flag(("--loader",), "image loader to use", "train.loader", metavar="NAME", group=_WORK,
         choices=("auto", "torch", "dali-cpu", "dali-gpu")),
    Flag(("--workers",), "loader processes or threads, or auto", "train.workers", metavar="N", group=_WORK),
    Flag(("--save-every",), "time between checkpoints inside an epoch: 90s, 10m, 2h", "train.save_every", metavar="T", group=_WORK),
    Flag(("-c", "--config"), "YAML file with settings", None, _DATA, "FILE", group=_GIVEN),
    Flag(("--preset",), "settings that ship: accurate, fast, medical, small-data", None, _DATA, "NAME", group=_GIVEN),
    Flag(("--set",), "any setting; wins over flags and files; may be repeated", None, _DATA, "SECTION.FIELD=VALUE", "many", _GIVEN),
    Flag(("--dump-config",), "print the merged configuration as YAML and stop", None, kind="switch", group=_GIVEN),
    Flag(("--dry-run",), "print the plan with its memory and time, and stop", None, kind="switch", group=_GIVEN),
    Flag(("--resume",), "continue a run (the one begun last if none is named)", None, kind="switch", group=_GIVEN),
    Flag(("-o", "--out"), "run directory", "out", metavar="DIR", group=_SAY),
    Flag(("-o", "--out"), "run directory", None, ("demo",), "DIR", group=_SAY),
    Flag(("-o", "--out"), "write the answers here: .csv or .jsonl", None, ("predict",), "FILE", group=_SAY),
    Flag(("-o", "--out"), "where to write", None, ("eval", "export", "verify", "deploy render", "data split", "bench",
         "bench report", "bench compare"), "PATH", group=_SAY),
    Flag(("--force",), "replace a file at --out that is not an earlier output of ours; an input never", None, ("eval", "predict",
         "export", "verify", "deploy render", "data split", "bench", "bench report", "bench compare"), kind="switch", group=_SAY),
    Flag(("--force",), "replace a report.html that is not ours", None, ("report",), kind="switch", group=_SAY),
    Flag(("--split",), "rows to judge", None, ("eval",), "NAME", choices=("train", "val", "test")),
    Flag(("--include-train",), "with DATA: judge images that the run was trained on as well; by default they are left out", None,
         ("eval",), kind="switch"),
    Flag(("--runtime",), "what computes the scores", None, ("eval", "predict"), "NAME", choices=RUNTIMES),
    Flag(("--runtime",), "time this runtime only; may be repeated (default: all that are here)", None, ("bench",), "NAME", "many",
         choices=tuple(name for name in RUNTIMES if name != "auto")),
    Flag(("-b", "--batch-size"), "time this batch size; may be repeated (default: growing ones)", None, ("bench",), "N", "many"),
    Flag(("--duration",), "time of each measurement: 3s, 1m", None, ("bench",), "T"),
    Flag(("--device",), "where to compute", None, ("bench",), "NAME", choices=("auto", "cpu", "cuda")),
    Flag(("--engine-precision",), "which of the exports: fp32 | fp16 | bf16 | int8; default: the chosen one", None, ("eval", "predict"),
         "NAME", choices=PRECISIONS),
    Flag(("--trust",), "open native code (aoti, trt) that this user has not exported; its maker must be known", None,
         ("eval", "predict", "verify", "bench"), kind="switch"),
    Flag(("-b", "--batch-size"), "images per forward pass", None, ("eval", "predict"), "N"),
    Flag(("-k", "--top-k"), "answers for each image", None, ("predict",), "K"),
    Flag(("--onnx",), "an ONNX file (the default)", None, ("export",), kind="switch", group=_TARGET),
    Flag(("--trt",), "a TensorRT engine", None, ("export",), kind="switch", group=_TARGET),
    Flag(("--pt2",), "a program of torch.export", None, ("export",), kind="switch", group=_TARGET),
    Flag(("--aoti",), "a package compiled by AOTInductor, for this kind of machine", None, ("export",), kind="switch", group=_TARGET),
    Flag(("--torchscript",), "a TorchScript file; deprecated by PyTorch", None, ("export",), kind="switch", group=_TARGET),
    Flag(("--triton",), "a model repository for Triton Inference Server", None, ("export",), kind="switch", group=_TARGET),
    Flag(("--precision",), "fp32 | fp16 | bf16 | int8; default: fp16 for --trt, else fp32", None, ("export",), "NAME", group=_TARGET,
         choices=PRECISIONS),
    *(Flag((f"--{name}",), f"short for --precision {name}", None, ("export",), kind="switch", group=_TARGET)
      for name in PRECISIONS if name != "fp32"),
    Flag(("--batch",), "fixed batch size, or none: dynamic", "export.batch", ("export",), "N", group=_TARGET, values=(("none", None),)),
    Flag(("--max-batch",), "largest batch of a TensorRT engine", "export.max_batch", ("export",), "N", group=_TARGET),
    Flag(("--opset",), "ONNX operator set, 18 to 25 (from 23: native attention)", "export.opset", ("export",), "N", group=_TARGET),
    Flag(("--calibration-images",), "training images that set the INT8 ranges", "export.calibration_images", ("export",), "N", group=_GATE),
    Flag(("--max-drop",), "largest loss of accuracy, percentage points", "export.max_drop", ("export",), "PP", group=_GATE),
    Flag(("--gate-data",), "more labelled images that judge the engine", "export.gate_data", ("export",), "DATA", group=_GATE),
    Flag(("--search",), "time for finding the layers that INT8 harms: 90s, 10m; 0: no search", "export.search_s", ("export",), "T",
         group=_GATE),
    Flag(("--name",), "name of the service (default: classifier)", None, ("deploy render",), "NAME"),
    Flag(("--image",), "image of Triton, pinned; default: the release that fits the export", None, ("deploy render",), "IMAGE"),
    Flag(("--storage",), "where the model repository was copied to: pvc://claim/path, s3://...", None, ("deploy render",), "URL"),
    Flag(("--set",), "any export setting; may be repeated", None, ("export",), "EXPORT.FIELD=VALUE", "many", _GIVEN),
    Flag(("-y", "--yes"), "do not ask", None, ("runs rm",), kind="switch"),
    Flag(("--json",), "one JSON object on stdout, everything else on stderr", None, _ALL, kind="switch", group=_SAY),
    Flag(("-q", "--quiet"), "only warnings, errors and the result", None, _ALL, kind="switch", group=_SAY),
    Flag(("--debug",), "show the traceback of an error", None, _ALL, kind="switch", group=_SAY),
)  # fmt: skip

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
LATER_FLAGS = (
    "--folds",
    "--gpus",
    "--track",
    "--balance",
    "--mixup",
    "--cutmix",
    "--tta",
)


def flags_of(verb: str) -> tuple[Flag, ...]:
    """The flags of one verb, in the order of the table."""
    return tuple(flag for flag in FLAGS if verb in flag.verbs)


def setting_flags() -> dict[str, Flag]:
    """Keyword (and alias) -> flag, for every flag that writes a setting."""
    found: dict[str, Flag] = {}
    for flag in FLAGS:
        if flag.setting:
            names = [name for name in flag.names + flag.aliases if name.startswith("--")]
            found |= {name[2:].replace("-", "_"): flag for name in names}
    return found


def setting_value(flag: Flag, value: Any, written: str) -> Any:
    """What the setting takes, from what a person wrote.

    Args:
        value: text of the command line, or any value from Python.
        written: how the person wrote it, for the message.

    Raises:
        ConfigError: C003 when the flag has listed choices and `value` is none of them.
    """
    table = dict(flag.values)
    if flag.choices and not isinstance(value, bool) and str(value) not in (*flag.choices, *table.values()):
        guess = value_meant(str(value), flag.choices) or near(str(value), flag.choices) or flag.choices[0]
        legal = ", ".join(repr(choice) for choice in flag.choices)
        raise ConfigError(
            "C003",
            f"{flag.setting or flag.long} must be one of {legal}, got {str(value)!r}",
            where=written,
            try_=f"{flag.long} {guess}",
        )
    if not isinstance(value, bool) and str(value) in table:
        return table[str(value)]
    if flag.kind == "numbers" and isinstance(value, str):
        parts = [part.strip() for part in value.strip("[]() ").split(",")]
        return parts if all(map(_is_number, parts)) else value
    return value


def overrides(given: Mapping[str, Any], flags: Iterable[Flag]) -> dict[str, Any]:
    """{"train.epochs": "3"} from {"epochs": "3"}; options that are no setting are left out.

    Raises:
        ConfigError: C003 for a value outside the listed choices.
    """
    known = {flag.keyword: flag for flag in flags if flag.setting}
    return {
        flag.setting: setting_value(flag, given[keyword], f"{flag.long} {given[keyword]}")
        for keyword, flag in known.items()
        if flag.setting and keyword in given
    }


def python_overrides(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of the Python API to dotted settings: {"img_size": 224} -> {"pixels.size": 224}.

    Raises:
        ConfigError: C001 for an unknown keyword, with the nearest one; C003 for a value outside the listed choices.
    """
    known = setting_flags()
    changes: dict[str, Any] = {}
    for keyword, value in kwargs.items():
        if keyword not in known:
            meant = setting_meant(keyword)
            ours = next((flag.keyword for flag in known.values() if flag.setting == meant), "")
            guess = ours or near(keyword, sorted(known)) if ours or not meant else ""
            named = "leave it out" if not_needed(keyword) else f"overrides={{{meant or 'section.field'!r}: {value!r}}}"
            raise ConfigError(
                "C001",
                f"unknown setting {keyword}",
                where=f"{keyword}={value!r}",
                why=not_needed(keyword),
                try_=f"{guess}={value!r}" if guess else named,
            )
        flag = known[keyword]
        if flag.setting in changes:
            raise ConfigError(
                "C004", f"{flag.setting} is given twice", where=f"{keyword}={value!r}", try_=f"{flag.keyword}=..."
            )
        changes[str(flag.setting)] = setting_value(flag, value, f"{keyword}={value!r}")
    return changes


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
