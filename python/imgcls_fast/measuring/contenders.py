"""Lists the engines of a run that this machine can time, and why the others cannot be: for `imgcls-fast bench`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import env
from ..core.bundle import Bundle
from ..core.errors import ExportError, HardwareError, ImgclsError
from ..core.exports import Export, demand_own, demand_trusted, list_exports, read_export
from ..core.targets import READS, RUNTIMES
from ..core.text import command
from ..engines.base import Engine
from ..engines.openvino_runtime import quiet_openvino
from ..engines.runtimes import open_engine, open_export
from ..engines.trt_plan import require_trt

REFERENCE = "torch"
KINDS = tuple(name for name in RUNTIMES if name != "auto")
_PURPOSE = "the runtime {}"


@dataclass(frozen=True)
class Contender:
    """An engine that can be opened.

    Args:
        name: "torch", "compile", or runtime and precision of the file, with the export's key where two have the same.
        runtime: one of `KINDS`.
        export: what it reads; None for torch and compile, which read the bundle.
        trust: whether native code in it may be somebody else's.
    """

    name: str
    runtime: str
    export: Export | None = None
    trust: bool = False

    def open(self, bundle: Bundle, device: str, threads: int) -> Engine:
        """An engine that is ready.

        Args:
            device: "cpu" or "cuda[:n]"; some runtimes answer on the CPU whatever it says.
            threads: CPU threads per batch.

        Raises:
            ExportError: E004, E005; HardwareError: H001, H002, H004.
        """
        if self.export is None:
            return open_engine(bundle, self.runtime, device=device, threads=threads)
        return open_export(bundle, self.export, self.runtime, device=device, threads=threads, trust=self.trust)

    @property
    def fixed(self) -> int | None:
        """The only batch size that the file takes, or None."""
        size = self.export.meta.get("batch") if self.export else None
        return size if isinstance(size, int) else None

    @property
    def file_precision(self) -> str:
        """What the file was exported in; the runtime may compute in something else."""
        return str(self.export.meta.get("precision")) if self.export else "fp32"

    def to_task(self) -> dict[str, Any]:
        """For a process of its own."""
        folder = str(self.export.folder) if self.export else None
        return {"name": self.name, "runtime": self.runtime, "folder": folder, "trust": self.trust}

    @classmethod
    def from_task(cls, task: dict[str, Any]) -> Contender:
        """The same one there."""
        folder = task["folder"]
        return cls(task["name"], task["runtime"], read_export(Path(folder)) if folder else None, task["trust"])


@dataclass(frozen=True)
class Absent:
    """What is not timed.

    Args:
        reason: a sentence without its full stop.
        remedy: the command that helps, or nothing.
    """

    name: str
    reason: str
    remedy: str = ""

    @classmethod
    def of(cls, name: str, error: ImgclsError) -> Absent:
        """With the words of an error."""
        return cls(name, error.message, error.hint)


def contenders_of(
    bundle: Bundle,
    exports: Path,
    *,
    run: str,
    runtimes: tuple[str, ...] = (),
    only: Path | None = None,
    trust: bool = False,
) -> tuple[list[Contender], list[Absent]]:
    """The reference first, then everything that may be timed beside it, unopened; and what cannot be.

    Args:
        exports: folder of the run's exports.
        run: name of the run in commands.
        runtimes: only these; empty: all but compile.
        only: folder of the export that is timed alone.
        trust: native code that this user has not made is opened where `runtimes` or `only` names it.

    Raises:
        ExportError: E001 when `only` is damaged or of another model, E006 when it is somebody else's native code.
    """
    found = list(_listed(bundle, exports, run, runtimes, only, trust))
    ready = [entry for entry in found if isinstance(entry, Contender)]
    return _named_apart([Contender(REFERENCE, REFERENCE), *ready]), [e for e in found if isinstance(e, Absent)]


def _listed(
    bundle: Bundle, exports: Path, run: str, runtimes: tuple[str, ...], only: Path | None, trust: bool
) -> Iterator[Contender | Absent]:
    if "compile" in runtimes:
        yield Contender("compile", "compile")
    elif not runtimes and only is None:
        again = command("bench", run, "--runtime", "compile")
        yield Absent("compile", "it is timed only when it is named: compiling takes seconds to minutes", again)
    there = list_exports(exports) if only is None else [read_export(only)]
    for export in there:
        yield from _of_export(export, bundle, run, runtimes, strict=only is not None, trust=trust)
    targets = {export.meta.get("target") for export in there}
    for runtime, target in READS.items():
        if only is None and target not in targets and (not runtimes or runtime in runtimes):
            yield _unexported(runtime, target, run)


def _of_export(
    export: Export, bundle: Bundle, run: str, runtimes: tuple[str, ...], *, strict: bool, trust: bool
) -> Iterator[Contender | Absent]:
    """One export in each runtime that reads it.

    Args:
        strict: raise what is wrong with it, because nothing else was asked for.
    """
    target, precision = str(export.meta.get("target")), str(export.meta.get("precision"))
    readers = [runtime for runtime, read in READS.items() if read == target]
    if not readers:
        if strict or not runtimes:
            yield Absent(
                f"{target} {precision}", f"{export.folder.name} is for other programs: no runtime here reads it"
            )
        return
    readers = [runtime for runtime in readers if not runtimes or runtime in runtimes]
    again = command("export", run, f"--{target}", "--precision", precision)
    try:
        demand_own(export, bundle, again)
        trust = trust and (strict or target in runtimes)
        if not trust:
            demand_trusted(export)
    except ExportError as error:
        if strict:
            raise
        yield from (Absent.of(f"{runtime} {precision}", error) for runtime in readers)
        return
    for runtime in readers:
        name = f"{runtime} {precision}"
        if precision == "bf16" and target == "onnx":
            yield Absent(name, "no ONNX runtime on a CPU takes BF16: the file is made for TensorRT")
        else:
            yield Contender(name, runtime, export, trust)


def _unexported(runtime: str, target: str, run: str) -> Absent:
    """Why a runtime has nothing to read: its library is missing, or the export."""
    try:
        _require(runtime)
    except HardwareError as error:
        return Absent.of(runtime, error)
    return Absent(runtime, f"there is no {target} export", command("export", run, f"--{target}"))


def _require(runtime: str) -> None:
    """Ask whether a runtime is installed.

    Raises:
        HardwareError: H004, H001.
    """
    if runtime == "onnx":
        env.require("onnxruntime", "onnx", _PURPOSE.format(runtime))
    elif runtime == "openvino":
        quiet_openvino()
    elif runtime == "trt":
        require_trt(_PURPOSE.format(runtime))


def _named_apart(contenders: list[Contender]) -> list[Contender]:
    """The same, each with a name of its own."""
    names = [contender.name for contender in contenders]
    return [
        Contender(f"{c.name} {c.export.folder.name.rpartition('-')[2]}", c.runtime, c.export, c.trust)
        if c.export and names.count(c.name) > 1
        else c
        for c in contenders
    ]
