"""Writes a bundle as a program of torch.export, AOTInductor or TorchScript, and compares it with torch.

Each takes `pixels` (batch, S, S, C) uint8, gives `scores` (batch, K) float32, and needs no code of ours. AOTInductor's
package is native code for this kind of processor or GPU.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import env
from ..core.bundle import Bundle
from ..core.config_verbs import ExportConfig
from ..core.errors import ExportError
from ..core.exports import Export, choose, export_key, find_key, finish, list_exports, new_export
from ..core.phases import phase
from ..core.targets import Way
from ..core.text import command
from ..engines.agreement import clear_margin, compare_engines, judge_comparison
from ..engines.aoti_runtime import AotiEngine, aoti_host
from ..engines.base import Engine, dominant
from ..engines.hush import hushed
from ..engines.torch_runtime import (
    FunctionEngine,
    Scorer,
    TorchEngine,
    first_line,
    last_line,
    load_model,
    operators_of,
    scorer_of,
)
from .materials import Materials

TORCHSCRIPT_NOTE = "TorchScript is deprecated by PyTorch and gets no new features; prefer --pt2, --aoti or --onnx"
HALF_ON_CPU_NOTE = "few processors multiply {} natively: on a CPU it is smaller, not necessarily faster"

_LARGEST_BATCH = 65536
_ALLOWED = ("aten", "prims", "prim", "_operator", "math")  # where operators of a portable program come from


def export(materials: Materials, way: Way) -> Export:
    """The program of a bundle as torch.export, AOTInductor or TorchScript writes it, compared with torch on real images.

    Raises:
        ExportError: E001; GateFailed: E901; HardwareError: H003, H004.
    """
    made_before = any(export.meta.get("target") == way.target for export in list_exports(materials.exports))
    if PROGRAMS[way.target].compiled and not made_before:
        demand_compiler("cpu")  # before images are decoded
    return write_program(materials.bundle, materials.exports, materials.comparison, way, settings=materials.settings)


@phase("exporting the program and comparing it")
def write_program(
    bundle: Bundle,
    exports: Path,
    batches: Iterable[np.ndarray],
    way: Way,
    *,
    device: str = "cpu",
    settings: ExportConfig | None = None,
    name_it: bool = True,
) -> Export:
    """Write exports/<target>-<precision>-<key8>/, compare it with torch, and only then name it in exports/index.json.

    An export with the same key that is there and whole is taken as it is.

    Args:
        batches: (n, H, W, C) uint8 real images for the comparison; not empty.
        way: target and precision; in a reduced one the network is of that type between normalisation and scores.
        device: device that an AOTInductor package is compiled for; the others run anywhere.
        name_it: whether index.json shall name it.

    Raises:
        ExportError: E001 when the program cannot be made, or needs operators that are not PyTorch's.
        GateFailed: E901 when the scores differ; nothing is kept.
        HardwareError: H004 for an AOTInductor package where there is no compiler.
    """
    kind, target, precision = PROGRAMS[way.target], way.target, way.precision
    settings = settings or ExportConfig()  # type: ignore[call-arg]
    place = device if kind.compiled else "cpu"
    facts: dict[str, Any] = {"versions": env.versions(("torch",)), "batch": settings.batch}
    if kind.compiled:
        facts["host"] = aoti_host(place)
    key = export_key(bundle, **facts)
    export = find_key(exports, bundle, target, precision, key)
    if export is None:
        if kind.compiled:
            demand_compiler(place)
        with new_export(exports, target, precision, key) as temporary:
            path = temporary / kind.file
            scorer = scorer_of(bundle, precision).to(place)
            operators = operators_of(scorer, torch.device(place))
            facts |= {"effective_precision": dominant(operators), "operators": dict(operators)}
            kind.save(scorer, bundle, path, settings.batch, place)
            facts |= _edges(bundle, settings.batch) | {"note": _note(way, place)}
            facts["comparison"] = _verify(path, way, bundle, facts, batches, place, settings)
            export = finish(temporary, bundle, target, precision, kind.file, facts)
    if name_it:
        choose(export)
    return export


def demand_compiler(device: str) -> None:
    """Refuse an AOTInductor package where nothing can compile it.

    Raises:
        HardwareError: H004.
    """
    env.require_compiler(device, "export --aoti", "--onnx or --pt2, which compile nothing", package=True)


def _save_pt2(scorer: Scorer, bundle: Bundle, path: Path, batch: int | None, device: str) -> None:
    program = program_of(scorer, bundle, batch, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights share memory
        torch.export.save(program, path)
    pickled = pickled_payloads(path)
    if pickled:
        raise ExportError("E001", f"{path.name} would hold pickled tensors: {', '.join(pickled)}")


@phase("compiling with AOTInductor")
def _save_aoti(scorer: Scorer, bundle: Bundle, path: Path, batch: int | None, device: str) -> None:
    program = program_of(scorer, bundle, batch, device)
    options: dict[str, Any] = {}
    if torch.device(device).type == "cpu":
        options = {"freezing": True, "cpp.dynamic_threads": True, "cpp.threads": env.usable_cpus()}
    with warnings.catch_warnings(), hushed(), torch.no_grad():
        warnings.simplefilter("ignore")
        _explained(
            "AOTInductor",
            bundle,
            lambda: torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options),
        )


def _save_torchscript(scorer: Scorer, bundle: Bundle, path: Path, batch: int | None, device: str) -> None:
    # of the network itself: a trace of the torch.export program takes the batch size of the example for a constant
    def write() -> Any:
        traced = torch.jit.freeze(torch.jit.trace(scorer, (_example(bundle, batch, device),), check_trace=False))
        traced.save(str(path))
        return traced

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # meta.json has the note that it is deprecated
        traced = _explained("TorchScript", bundle, write)
    _refuse_foreign(bundle, {node.kind().replace("::", ".") for node in traced.inlined_graph.nodes()})


def program_of(scorer: Scorer, bundle: Bundle, batch: int | None, device: str = "cpu") -> Any:
    """The graph of torch.export, uint8 pixels to scores, of PyTorch's own operators.

    Raises:
        ExportError: E001 when the network cannot be exported, or only with operators from elsewhere.
    """
    dynamic = None if batch else {"pixels": {0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = _explained(
            "torch.export",
            bundle,
            lambda: torch.export.export(scorer, (_example(bundle, batch, device),), dynamic_shapes=dynamic),
        )
    _refuse_foreign(bundle, set(_operators(program)))
    return program


def _refuse_foreign(bundle: Bundle, operators: set[str]) -> None:
    foreign = sorted(name for name in operators if name.split(".")[0] not in _ALLOWED)
    if foreign:
        raise ExportError(
            "E001",
            f"{bundle.arch.get('arch')} needs operators that are not PyTorch's own: {', '.join(foreign)}",
            try_="imgcls-fast export --onnx",
        )


def pickled_payloads(path: Path) -> list[str]:
    """Tensors of a .pt2 archive that loading would unpickle without restriction."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(("weights_config.json", "constants_config.json")):
                config = json.loads(archive.read(name))["config"]
                found += [tensor for tensor, payload in config.items() if payload.get("use_pickle")]
    return found


def _operators(program: Any) -> Iterable[str]:
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            if node.op == "call_function":
                target = node.target
                yield str(target) if hasattr(target, "namespace") else f"{target.__module__}.{target.__name__}"


def _example(bundle: Bundle, batch: int | None, device: str) -> Tensor:
    side, channels = bundle.pixels.size, bundle.pixels.channels
    return torch.zeros((batch or 2, side, side, channels), dtype=torch.uint8, device=device)


def _explained(what: str, bundle: Bundle, make: Callable[[], Any]) -> Any:
    """Turn what torch raises about a network or a compiler into one error."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        return make()
    except (TorchDynamoException, RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise ExportError(
            "E001",
            f"{bundle.arch.get('arch')} cannot be exported by {what}: {first_line(error)}",
            try_="imgcls-fast export --onnx",
        ) from error


def _verify(
    path: Path,
    way: Way,
    bundle: Bundle,
    facts: dict[str, Any],
    batches: Iterable[np.ndarray],
    device: str,
    settings: ExportConfig,
) -> dict[str, Any]:
    """Score real images, and one alone, with the file that was just written and with torch."""
    kind = PROGRAMS[way.target]
    reference = TorchEngine(
        load_model(bundle), bundle.labels, bundle.pixels, temperature=bundle.temperatures, thresholds=bundle.thresholds
    )
    engine = kind.open(path, way, bundle, facts, device)
    listed = list(batches)
    listed += [listed[0][:1]] if listed and settings.batch is None else []  # a trace may have swallowed the batch size
    try:
        result = compare_engines(reference, engine, listed, margin=clear_margin(way.precision))
    except RuntimeError as error:
        raise ExportError(
            "E001",
            f"{kind.words} of {bundle.arch.get('arch')} does not run with {sorted({len(x) for x in listed})} images: "
            f"{last_line(error)}",
            try_=command("export", f"--{way.target}", "--batch", 1),
        ) from error
    engine.close()
    judge_comparison(result, way.precision, settings.max_score_diff, kind.words)
    return result.to_dict()


# What was just written is opened so, and nothing else ever is: the loaders of torch trust the file.


def _open_pt2(path: Path, way: Way, bundle: Bundle, facts: dict[str, Any], device: str) -> Engine:
    return _engine(lambda: torch.export.load(path).module(), way, bundle, facts)


def _open_torchscript(path: Path, way: Way, bundle: Bundle, facts: dict[str, Any], device: str) -> Engine:
    return _engine(lambda: torch.jit.load(str(path)), way, bundle, facts)


def _open_aoti(path: Path, way: Way, bundle: Bundle, facts: dict[str, Any], device: str) -> Engine:
    return AotiEngine(path, facts, bundle.labels, bundle.pixels, device=device)


def _engine(load: Callable[[], Any], way: Way, bundle: Bundle, facts: dict[str, Any]) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = load()
    batch, precision = facts["batch"], facts["effective_precision"]
    more: dict[str, Any] = {} if batch is None else {"max_batch": batch, "fixed": True}
    more["thresholds"] = bundle.thresholds
    return FunctionEngine(module, bundle.labels, bundle.pixels, runtime=way.target, precision=precision, **more)


def _edges(bundle: Bundle, batch: int | None) -> dict[str, Any]:
    side, channels, rows = bundle.pixels.size, bundle.pixels.channels, batch or "batch"
    return {
        "input": {"name": "pixels", "dtype": "uint8", "shape": [rows, side, side, channels]},
        "output": {"name": "scores", "dtype": "float32", "shape": [rows, bundle.labels.size]},
    }


def _note(way: Way, device: str) -> str:
    notes = [note] if (note := PROGRAMS[way.target].note) else []
    if way.reduced and torch.device(device).type == "cpu":
        notes.append(HALF_ON_CPU_NOTE.format(way.precision))
    return "; ".join(notes)


@dataclass(frozen=True)
class Program:
    """One kind of program.

    Args:
        file: name of the file in its folder.
        words: its name in messages.
        save: writes the file.
        open: opens what `save` wrote, as an engine.
        compiled: it is compiled for one kind of machine, and needs a compiler.
        note: remark for meta.json.
    """

    file: str
    words: str
    save: Callable[[Scorer, Bundle, Path, int | None, str], None]
    open: Callable[[Path, Way, Bundle, dict[str, Any], str], Engine]
    compiled: bool = False
    note: str = ""


PROGRAMS = {
    "pt2": Program("model.pt2", "the torch.export program", _save_pt2, _open_pt2),
    "aoti": Program("model.pt2", "the AOTInductor package", _save_aoti, _open_aoti, compiled=True),
    "torchscript": Program(
        "model.ts", "the TorchScript file", _save_torchscript, _open_torchscript, note=TORCHSCRIPT_NOTE
    ),
}
