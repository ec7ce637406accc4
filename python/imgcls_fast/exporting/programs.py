"""A bundle as a program of PyTorch: torch.export, AOTInductor or TorchScript; each compared with torch when it is written.

Each takes `pixels` (batch, S, S, C) uint8, gives `scores` (batch, K) float32, and needs no code of ours. AOTInductor's
package is native code for this kind of processor or GPU.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import env
from ..core.bundle import Bundle
from ..core.config_verbs import ExportConfig
from ..core.errors import ConfigError, ExportError, near
from ..core.exports import Export, choose, export_key, find_key, finish, new_export
from ..core.phases import phase
from ..core.text import command
from ..engines.agreement import clear_margin, compare_engines, judge_comparison
from ..engines.aoti_runtime import AotiEngine, aoti_host
from ..engines.base import Engine, dominant
from ..engines.hush import hushed
from ..engines.torch_runtime import (
    DTYPES,
    FunctionEngine,
    Scorer,
    TorchEngine,
    first_line,
    last_line,
    load_model,
    operators_of,
    scorer_of,
)

FILES = {"pt2": "model.pt2", "aoti": "model.pt2", "torchscript": "model.ts"}
RUNTIMES = {"pt2": "the torch.export program", "aoti": "the AOTInductor package", "torchscript": "the TorchScript file"}
TORCHSCRIPT_NOTE = "TorchScript is deprecated by PyTorch and gets no new features; prefer --pt2, --aoti or --onnx"
HALF_ON_CPU_NOTE = "few processors multiply {} natively: on a CPU it is smaller, not necessarily faster"

_LARGEST_BATCH = 65536
_ALLOWED = ("aten", "prims", "prim", "_operator", "math")  # where operators of a portable program come from


def write_pt2(
    bundle: Bundle,
    exports: Path,
    batches: Iterable[np.ndarray],
    *,
    precision: str = "fp32",
    settings: ExportConfig | None = None,
    name_it: bool = True,
) -> Export:
    """A program of torch.export, with nothing in it that is unpickled freely. See `export_program`."""
    return export_program(bundle, exports, batches, "pt2", precision=precision, settings=settings, name_it=name_it)


def write_aoti(
    bundle: Bundle,
    exports: Path,
    batches: Iterable[np.ndarray],
    *,
    precision: str = "fp32",
    device: str = "cpu",
    settings: ExportConfig | None = None,
    name_it: bool = True,
) -> Export:
    """A package of AOTInductor: compiled with this machine's C++ compiler (or Triton), for `device`. See `export_program`.

    On a CPU the weights are frozen into it, laid out as the kernels want them (ViT-T at batch 1, one thread: 0.51 of the
    eager time, 0.88 without), and the number of threads stays open until it runs: by default the code would be written
    for as many as torch had when it was compiled.
    """
    return export_program(
        bundle, exports, batches, "aoti", precision=precision, device=device, settings=settings, name_it=name_it
    )


def write_torchscript(
    bundle: Bundle,
    exports: Path,
    batches: Iterable[np.ndarray],
    *,
    precision: str = "fp32",
    settings: ExportConfig | None = None,
    name_it: bool = True,
) -> Export:
    """A frozen trace. See `export_program`; one that takes only the batch size of its example is E001: fix it with `--batch`."""
    return export_program(
        bundle, exports, batches, "torchscript", precision=precision, settings=settings, name_it=name_it
    )


WRITERS: dict[str, Callable[..., Export]] = {"pt2": write_pt2, "aoti": write_aoti, "torchscript": write_torchscript}


@phase("exporting the program and comparing it")
def export_program(
    bundle: Bundle,
    exports: Path,
    batches: Iterable[np.ndarray],
    target: str,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    settings: ExportConfig | None = None,
    name_it: bool = True,
) -> Export:
    """Write exports/<target>-<precision>-<key8>/, compare it with torch, and only then name it in exports/index.json.

    An export with the same key that is there and whole is taken as it is.

    Args:
        batches: (n, H, W, C) uint8 real images for the comparison; not empty.
        target: pt2, aoti or torchscript.
        precision: fp32, fp16 or bf16; with the latter two the network is of that type between normalisation and softmax.
        device: that an AOTInductor package is compiled for; the others run anywhere.
        name_it: whether index.json shall name it.

    Raises:
        ConfigError: C003, C004 for another target or precision.
        ExportError: E001 when the program cannot be made, or needs operators that are not PyTorch's.
        GateFailed: E901 when the scores differ; nothing is kept.
        HardwareError: H004 for an AOTInductor package where there is no compiler.
    """
    _check_request(target, precision)
    settings = settings or ExportConfig()  # type: ignore[call-arg]
    place = device if target == "aoti" else "cpu"
    facts: dict[str, Any] = {"versions": env.versions(("torch",)), "batch": settings.batch}
    if target == "aoti":
        facts["host"] = aoti_host(place)
    key = export_key(bundle, **facts)
    export = find_key(exports, bundle, target, precision, key)
    if export is None:
        if target == "aoti":
            demand_compiler(place)
        with new_export(exports, target, precision, key) as temporary:
            path = temporary / FILES[target]
            scorer = scorer_of(bundle, precision).to(place)
            operators = operators_of(scorer, torch.device(place))
            facts |= {"effective_precision": dominant(operators), "operators": dict(operators)}
            _SAVERS[target](scorer, bundle, path, settings.batch, place)
            facts |= _edges(bundle, settings.batch) | {"note": _note(target, precision, place)}
            facts["comparison"] = _verify(path, target, bundle, facts, batches, precision, place, settings)
            export = finish(temporary, bundle, target, precision, FILES[target], facts)
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
        warnings.simplefilter("ignore")  # of weights that share memory it says which it writes
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
        warnings.simplefilter("ignore")  # that it is deprecated is said in meta.json
        traced = _explained("TorchScript", bundle, write)
    _refuse_foreign(bundle, {node.kind().replace("::", ".") for node in traced.inlined_graph.nodes()})


_Saver = Callable[[Scorer, Bundle, Path, int | None, str], None]
_SAVERS: dict[str, _Saver] = {"pt2": _save_pt2, "aoti": _save_aoti, "torchscript": _save_torchscript}


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
    target: str,
    bundle: Bundle,
    facts: dict[str, Any],
    batches: Iterable[np.ndarray],
    precision: str,
    device: str,
    settings: ExportConfig,
) -> dict[str, Any]:
    """Score real images, and one alone, with the file that was just written and with torch."""
    reference = TorchEngine(load_model(bundle), bundle.labels, bundle.pixels, temperature=bundle.temperatures)
    engine = _load(path, target, bundle, facts, device)
    listed = list(batches)
    listed += [listed[0][:1]] if listed and settings.batch is None else []  # a trace may have swallowed the batch size
    try:
        result = compare_engines(reference, engine, listed, margin=clear_margin(precision))
    except RuntimeError as error:
        raise ExportError(
            "E001",
            f"{RUNTIMES[target]} of {bundle.arch.get('arch')} does not run with {sorted({len(x) for x in listed})} images: "
            f"{last_line(error)}",
            try_=command("export", f"--{target}", "--batch", 1),
        ) from error
    engine.close()
    judge_comparison(result, precision, settings.max_score_diff, RUNTIMES[target])
    return result.to_dict()


def _load(path: Path, target: str, bundle: Bundle, facts: dict[str, Any], device: str) -> Engine:
    """Open what was just written. Nothing else is ever opened so: both loaders trust the file."""
    if target == "aoti":
        return AotiEngine(path, facts, bundle.labels, bundle.pixels, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: Any = torch.export.load(path).module() if target == "pt2" else torch.jit.load(str(path))
    batch = facts["batch"]
    size = {} if batch is None else {"max_batch": batch, "fixed": True}
    return FunctionEngine(
        module, bundle.labels, bundle.pixels, runtime=target, precision=facts["effective_precision"], **size
    )


def _edges(bundle: Bundle, batch: int | None) -> dict[str, Any]:
    side, channels, rows = bundle.pixels.size, bundle.pixels.channels, batch or "batch"
    return {
        "input": {"name": "pixels", "dtype": "uint8", "shape": [rows, side, side, channels]},
        "output": {"name": "scores", "dtype": "float32", "shape": [rows, bundle.labels.size]},
    }


def _note(target: str, precision: str, device: str) -> str:
    notes = [TORCHSCRIPT_NOTE] if target == "torchscript" else []
    if precision != "fp32" and torch.device(device).type == "cpu":
        notes.append(HALF_ON_CPU_NOTE.format(precision))
    return "; ".join(notes)


def _check_request(target: str, precision: str) -> None:
    for name, known, given in (("target", tuple(FILES), target), ("precision", tuple(DTYPES), precision)):
        if given not in known:
            code = "C004" if given == "int8" else "C003"
            legal = ", ".join(repr(word) for word in known)
            raise ConfigError(
                code,
                f"{name} of a program must be one of {legal}, got {given!r}",
                try_="imgcls-fast export --onnx --precision int8" if given == "int8" else f"--{near(given, known) or known[0]}",
            )  # fmt: skip
