"""Every option of the command line: those of settings, which the schema declares, and those of the verbs themselves.

Standard library only: `--help` must not wait for a schema. The long name of an option, with underscores, is also the keyword of
the Python API: `--img-size 224` is `train(img_size=224)`.
"""

from __future__ import annotations

from typing import get_args

from .setting_flags import ROWS
from .targets import PRECISIONS, RUNTIMES, TARGETS
from .verbs import VERBS, Flag, Group, Kind

_ALL = tuple(verb.name for verb in VERBS)
_DATA = ("train", "data check", "data split", "data stats")
_WRITERS = ("eval", "export", "verify", "deploy render", "data split", "bench", "bench report", "bench compare")
_IN_FP16 = " and ".join(f"--{name}" for name, made in TARGETS.items() if made.usual == "fp16")


def _own(
    names: tuple[str, ...],
    help: str,
    verbs: tuple[str, ...],
    metavar: str = "VALUE",
    *,
    kind: Kind = "value",
    group: Group = "options",
    choices: tuple[str, ...] = (),
) -> Flag:
    return Flag(names, help, None, verbs, metavar, kind, group, choices)


OWN: tuple[Flag, ...] = (
    _own(("-c", "--config"), "YAML file with settings", _DATA, "FILE", group="configuration"),
    _own(
        ("--preset",), "settings that ship: accurate, fast, medical, small-data", _DATA, "NAME", group="configuration"
    ),
    _own(
        ("--set",),
        "any setting; wins over flags and files; may be repeated",
        _DATA,
        "SECTION.FIELD=VALUE",
        kind="many",
        group="configuration",
    ),
    _own(
        ("--dump-config",),
        "print the merged configuration as YAML and stop",
        ("train",),
        kind="switch",
        group="configuration",
    ),
    _own(
        ("--dry-run",),
        "print the plan with its memory and time, and stop",
        ("train",),
        kind="switch",
        group="configuration",
    ),
    _own(
        ("--resume",),
        "continue a run (the one begun last if none is named)",
        ("train",),
        kind="switch",
        group="configuration",
    ),
    _own(("-o", "--out"), "run directory", ("demo",), "DIR", group="output"),
    _own(("-o", "--out"), "write the answers here: .csv or .jsonl", ("predict",), "FILE", group="output"),
    _own(("-o", "--out"), "where to write", _WRITERS, "PATH", group="output"),
    _own(
        ("--force",),
        "replace a file at --out that is no earlier output of ours; inputs are never replaced",
        ("predict", *_WRITERS),
        kind="switch",
        group="output",
    ),
    _own(("--force",), "replace a report.html that is not ours", ("report",), kind="switch", group="output"),
    _own(("--split",), "rows to judge", ("eval",), "NAME", choices=("train", "val", "test")),
    _own(
        ("--include-train",),
        "with DATA: also judge images that the run was trained on; by default they are left out",
        ("eval",),
        kind="switch",
    ),
    _own(("--runtime",), "runtime that computes the scores", ("eval", "predict"), "NAME", choices=RUNTIMES),
    _own(
        ("--runtime",),
        "time this runtime only; may be repeated (default: all that are here)",
        ("bench",),
        "NAME",
        kind="many",
        choices=tuple(name for name in RUNTIMES if name != "auto"),
    ),
    _own(
        ("-b", "--batch-size"),
        "time this batch size; may be repeated (default: growing ones)",
        ("bench",),
        "N",
        kind="many",
    ),
    _own(("--duration",), "time of each measurement: 3s, 1m", ("bench",), "T"),
    _own(("--device",), "where to compute", ("bench",), "NAME", choices=("auto", "cpu", "cuda")),
    _own(
        ("--engine-precision",),
        "precision of the export to use (default: the chosen one)",
        ("eval", "predict"),
        "NAME",
        choices=PRECISIONS,
    ),
    _own(
        ("--trust",),
        "open native code (aoti, trt) that this user has not exported; only for files whose maker you trust",
        ("eval", "predict", "verify", "bench"),
        kind="switch",
    ),
    _own(("-b", "--batch-size"), "images per forward pass", ("eval", "predict"), "N"),
    _own(("-k", "--top-k"), "answers per image", ("predict",), "K"),
    *(_own((f"--{name}",), made.help, ("export",), kind="switch", group="target") for name, made in TARGETS.items()),
    _own(
        ("--precision",),
        f"precision of the exported model (default: fp16 for {_IN_FP16}, else fp32)",
        ("export",),
        "NAME",
        group="target",
        choices=PRECISIONS,
    ),
    *(
        _own((f"--{name}",), f"short for --precision {name}", ("export",), kind="switch", group="target")
        for name in PRECISIONS
        if name != "fp32"
    ),
    _own(("--name",), "name of the service (default: classifier)", ("deploy render",), "NAME"),
    _own(
        ("--image",), "image of Triton, pinned; default: the release that fits the export", ("deploy render",), "IMAGE"
    ),
    _own(
        ("--storage",),
        "address of the copied model repository: pvc://claim/path, s3://...",
        ("deploy render",),
        "URL",
    ),
    _own(
        ("--set",),
        "any export setting; may be repeated",
        ("export",),
        "EXPORT.FIELD=VALUE",
        kind="many",
        group="configuration",
    ),
    _own(("-y", "--yes"), "do not ask", ("runs rm",), kind="switch"),
    _own(("--json",), "one JSON object on stdout, everything else on stderr", _ALL, kind="switch", group="output"),
    _own(("-q", "--quiet"), "only warnings, errors and the result", _ALL, kind="switch", group="output"),
    _own(("--debug",), "show the traceback of an error", _ALL, kind="switch", group="output"),
)


def _rank(flag: Flag) -> tuple[int, bool]:
    return get_args(Group).index(flag.group), len(flag.names) == 1  # those with a short name first


FLAGS = tuple(sorted((*OWN, *(Flag(**row) for row in ROWS)), key=_rank))
LATER_FLAGS = (
    "--folds",
    "--gpus",
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
