"""An ONNX file as a TensorRT plan, by the one path that TensorRT 10.13 to 11 share.

The network is strongly typed: types come from the graph (casts, Q/DQ), never from builder flags or calibrators, both of which
ended with 11.0. The engine therefore computes exactly what is in the file: TF32 is off as well.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..core import env
from ..core.config_verbs import ExportConfig
from ..core.errors import ConfigError, ExportError, HardwareError
from ..core.files import sha256_file, write_whole
from ..core.onnx_bytes import check_onnx as check_bytes
from ..core.phases import phase
from ..engines.trt_plan import (
    CudaDevice,
    Messages,
    listening,
    logger,
    machine,
    require_trt,
    start_runtime,
    trt_missing,
    version_of,
)
from ..engines.trt_runtime import INPUT, OUTPUT, dims_of, shapes_of
from .trt_reports import Progress, error_recorder, failed, interruptible, progress_monitor, summarise, unreadable

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = [
    "TrtOptions",
    "build_plan",
    "refit_plan",
    "require_builder",
    "timing_cache_path",
    "trt_missing",
    "trtexec_line",
]

Hardware = Literal["this", "same-cc", "ampere+"]
_TRTEXEC_HARDWARE = {"same-cc": "sameComputeCapability", "ampere+": "ampere+"}
_MEBI = 1024**2


@dataclass(frozen=True)
class TrtOptions:
    """How a plan is built; all but `timing_cache` change what comes out.

    Args:
        level: TensorRT's optimisation level, 0 to 5.
        workspace_gb: GPU memory that its tactics may use, GiB.
        hardware: "this" model of GPU only; "same-cc": every GPU of its compute capability; "ampere+": Ampere and later.
        version_compatible: also for later TensorRT versions (of 10 and 11; the lean runtime travels in the plan).
        refit: weights can be replaced by `refit_plan`.
        batches: smallest, tuned for, largest; a graph with a fixed batch has only that one.
        timing_cache: file that remembers timings of tactics between builds.

    Raises:
        ConfigError: C004 when the batches are not in order, or for a refittable engine for several versions.
    """

    level: int = 3
    workspace_gb: float = 4.0
    hardware: Hardware = "this"
    version_compatible: bool = False
    refit: bool = False
    batches: tuple[int, int, int] = (1, 64, 64)
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.batches[0] <= self.batches[1] <= self.batches[2]:
            raise ConfigError(
                "C004",
                f"the batches of a TensorRT engine must grow from 1 on, got {self.batches}",
                where="export.best_batch, export.max_batch",
                try_=f"--max-batch {max(self.batches)}",
            )
        if self.version_compatible and self.refit:  # the lean runtime that runs such a plan cannot refit
            raise ConfigError(
                "C004",
                "an engine for several TensorRT versions cannot be refitted",
                where="export.trt_version_compatible, export.trt_refit",
                try_="--set export.trt_refit=false",
            )
        if self.hardware not in get_args(Hardware):
            legal = ", ".join(map(repr, get_args(Hardware)))
            raise ConfigError("C003", f"export.trt_hardware must be one of {legal}, got {self.hardware!r}")

    @classmethod
    def of(cls, settings: ExportConfig, timing_cache: Path | None = None) -> TrtOptions:
        """The options that the settings of the section `export` ask for."""
        highest = settings.batch or settings.max_batch
        best = settings.batch or settings.best_batch or highest
        return cls(
            settings.trt_level,
            settings.trt_workspace_gb,
            settings.trt_hardware,
            settings.trt_version_compatible,
            settings.trt_refit,
            (settings.batch or 1, best, highest),
            timing_cache,
        )

    def shaping(self) -> dict[str, Any]:
        """What changes the plan, for the key of an export."""
        return {name: value for name, value in asdict(self).items() if name != "timing_cache"}


def timing_cache_path() -> Path:
    """Where timings are kept between builds; one file for each TensorRT version and GPU, since they are of no use elsewhere."""
    here = machine(CudaDevice())
    slug = re.sub(r"[^a-z0-9]+", "-", f"{here['gpu']} {here['tensorrt']}".lower())
    return env.cache_dir() / "tensorrt" / f"{slug}.timings"


def require_builder(onnx: Path, plan: Path, options: TrtOptions) -> None:
    """Raise where no plan can be built; the message names the ONNX file that was left, and how to build the same plan elsewhere.

    Raises:
        HardwareError: H004 without TensorRT 10.13 or later, H001 without a GPU.
    """
    if trt_missing():
        require_trt(
            "`export --trt`",
            where=f"the ONNX file was left at {onnx}",
            why=f"where both are, the same engine is built by: {trtexec_line(onnx, plan, options)}",
        )


@phase("building the TensorRT engine")
def build_plan(
    onnx: Path,
    plan: Path,
    options: TrtOptions,
    *,
    progress: Callable[[str, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    device: int = 0,
) -> dict[str, Any]:
    """Build the plan of an ONNX file; the file appears whole.

    Args:
        progress: called with (phase, fraction done of everything, 0..1), from threads of TensorRT; what it raises stops the build.
        should_stop: asked after each step.

    Returns:
        Facts for meta.json: versions, GPU, driver, options, profile, layers by type and precision, effective_precision, digests.

    Raises:
        HardwareError: H004, H001: TensorRT or a GPU is missing; H002: its memory does not suffice; H003: the disk refuses.
        ExportError: E004, with node or layer named.
        Interrupted: `should_stop` asked for it.
    """
    require_builder(onnx, plan, options)
    check_onnx(onnx)
    gpu, started = CudaDevice(device), time.perf_counter()
    here = machine(gpu)
    _check_hardware(options, here)
    monitor = Progress(progress, should_stop)

    def work() -> tuple[bytes, dict[str, Any]]:
        with gpu.active(), listening() as heard:
            data, facts = _build(onnx, options, monitor, heard)
            return data, facts | _inspected(data, heard, onnx, host_code=options.version_compatible)

    data, facts = interruptible(work, monitor)
    write_whole(plan, lambda file: file.write(data))
    return {
        **here,
        **facts,
        **options.shaping(),
        "tf32": False,
        "build_seconds": round(time.perf_counter() - started, 2),
        "onnx_sha256": sha256_file(onnx),
        "sha256": sha256(data).hexdigest(),
        "bytes": len(data),
    }


def _build(onnx: Path, options: TrtOptions, monitor: Progress, heard: Messages) -> tuple[bytes, dict[str, Any]]:
    import tensorrt as trt

    try:
        builder = trt.Builder(logger())
    except TypeError as error:  # what pybind11 makes of a factory that gave nothing
        raise HardwareError(
            "H001", f"TensorRT {trt.__version__} cannot start: {heard.summary() or error}", try_="imgcls-fast doctor"
        ) from error
    recorder = error_recorder(heard)
    builder.error_recorder = recorder
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))  # 11.x numbers it anew
    parser = trt.OnnxParser(network, logger())
    parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)  # a plugin would tie the plan to this version and GPU
    if not parser.parse_from_file(str(onnx)):
        raise unreadable(onnx, (parser.get_error(i) for i in range(parser.num_errors)), heard)
    config = _configured(builder, options)
    profile = _profiled(builder, network, config, options, onnx)
    cache = _with_timings(config, options.timing_cache)
    recorder.clear()  # a cache that could not be read is no error of the build
    heard.texts.clear()
    listener = progress_monitor(monitor)
    config.progress_monitor = listener
    serialized = builder.build_serialized_network(network, config)
    monitor.demand_done()
    if serialized is None:
        raise failed(onnx, heard, workspace_gb=options.workspace_gb, largest=options.batches[2])
    return bytes(serialized), {"profile": profile, "timing_cache": _keep_timings(config, options.timing_cache, cache)}


def _configured(builder: trt.Builder, options: TrtOptions) -> trt.IBuilderConfig:
    import tensorrt as trt

    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, round(options.workspace_gb * 1024 * _MEBI))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector knows no types
    config.hardware_compatibility_level = {
        "this": trt.HardwareCompatibilityLevel.NONE,
        "same-cc": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }[options.hardware]
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; float32 would have 10 bits of mantissa
    if options.version_compatible:  # the lean runtime goes along: a plan must not need a file that is somewhere else
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    return config


def _profiled(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, options: TrtOptions, onnx: Path
) -> dict[str, Any]:
    """Tell the builder the batch sizes; returns the shapes of the input: min, opt and max."""
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    if names != [INPUT] or outputs != [OUTPUT]:
        raise ExportError("E004", f"{onnx} must turn {INPUT!r} into {OUTPUT!r}, and turns {names} into {outputs}")
    batch, *image = dims_of(network.get_input(0).shape)
    if batch != -1:
        return {end: [batch, *image] for end in ("min", "opt", "max")}
    shapes = [(rows, *image) for rows in options.batches]
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise ExportError("E004", f"TensorRT refused the batches {options.batches} for {onnx}")
    return dict(zip(("min", "opt", "max"), map(list, shapes), strict=True))


def _check_hardware(options: TrtOptions, here: dict[str, Any]) -> None:
    if options.hardware == "ampere+" and tuple(here["compute_capability"]) < (8, 0):
        raise ExportError(
            "E004",
            f"an engine for Ampere and later cannot be built on {here['gpu']}",
            try_="imgcls-fast export --trt --set export.trt_hardware=same-cc",
        )


# ---------------------------------------------------------------- the graph, before TensorRT sees it


def check_onnx(path: Path) -> None:
    """Refuse a file that is no ONNX, or that would make TensorRT read files outside its folder.

    Raises:
        ExportError: E004.
    """
    model = _read_onnx(path)
    folder = path.parent.resolve()
    for location in sorted({location for tensor in _tensors(model) for location in _outside(tensor)}):
        target = (folder / location).resolve()
        if not target.is_relative_to(folder):
            raise ExportError("E004", f"{path} keeps weights in {location!r}, outside its folder; it was not opened")
        if not target.is_file():
            raise ExportError("E004", f"{path} keeps weights in {location!r}, which is not there")


def _read_onnx(path: Path) -> Any:
    onnx = env.require("onnx", "onnx", "`export --trt`")
    undecodable = env.require("google.protobuf.message", "onnx", "`export --trt`").DecodeError
    try:
        check_bytes(path)
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, ValueError, undecodable) as error:
        raise ExportError(
            "E004", f"{path} cannot be read as ONNX: {error}", try_="imgcls-fast export --onnx"
        ) from error
    if not model.graph.node:
        raise ExportError("E004", f"{path} holds no graph", try_="imgcls-fast export --onnx")
    return model


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto in a protobuf message, wherever it hides: initializers, attributes, subgraphs, functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if _repeated(value) else (value,):
                yield from _tensors(part)


def _repeated(value: Any) -> bool:
    return not hasattr(value, "DESCRIPTOR")


def _outside(tensor: Any) -> list[str]:
    return [entry.value for entry in tensor.external_data if entry.key == "location"]


# ---------------------------------------------------------------- timings between builds


def _with_timings(config: trt.IBuilderConfig, path: Path | None) -> str:
    """Give the builder the timings of earlier builds; a file that is damaged or of another device only costs time.

    Returns:
        what became of the file: "unused", "new", "read" or "damaged".
    """
    if path is None:
        return "unused"
    try:
        known = path.read_bytes()
    except OSError:
        known = b""
    for data, outcome in ((known, "read"), (b"", "damaged" if known else "new")):
        cache = config.create_timing_cache(data) if data or outcome != "read" else None
        if cache is not None and config.set_timing_cache(cache, False):
            return outcome
    return "unused"


def _keep_timings(config: trt.IBuilderConfig, path: Path | None, outcome: str) -> str:
    """Write the timings for the next build. The plan is there: no fault of this file may lose it."""
    cache = config.get_timing_cache() if path is not None and outcome != "unused" else None
    if path is None or cache is None:
        return outcome
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = bytes(cache.serialize())
        write_whole(path, lambda file: file.write(data))
    except (OSError, HardwareError) as error:
        return f"{outcome}, not written: {error}"
    return outcome


# ---------------------------------------------------------------- the plan, after TensorRT made it


def _inspected(data: bytes, heard: Messages, source: Path, *, host_code: bool) -> dict[str, Any]:
    """Load a new plan as its users will, and ask what its layers became.

    Raises:
        ExportError: E004 when it cannot be loaded, or takes or gives something else than our graphs do.
    """
    engine = _loaded(data, heard, source, host_code=host_code)
    try:
        shapes = shapes_of(engine)
    except ValueError as error:
        raise ExportError("E004", f"the engine of {source} is not what an exported graph becomes: {error}") from error
    facts = {
        "refittable": engine.refittable,
        "input": {"name": INPUT, "dtype": "uint8", "shape": [_rows(shapes.lowest, shapes.highest), *shapes.image]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": [_rows(shapes.lowest, shapes.highest), shapes.columns]},
    }
    return {**facts, **summarise(_layers(engine, (shapes.highest, *shapes.image)))}


def _rows(lowest: int, highest: int) -> int | str:
    return highest if lowest == highest else "batch"


def _loaded(data: bytes, heard: Messages, source: Path, *, host_code: bool) -> trt.ICudaEngine:
    runtime = start_runtime(heard)
    runtime.engine_host_code_allowed = host_code
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise ExportError("E004", f"TensorRT cannot load the engine of {source}", why=heard.summary())
    return engine


def _layers(engine: trt.ICudaEngine, shape: tuple[int, ...]) -> str:
    """The inspector's JSON; with dynamic shapes it knows types only of a context whose shape is set."""
    import tensorrt as trt

    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    inspector = engine.create_engine_inspector()
    if context is None or inspector is None or not context.set_input_shape(INPUT, shape):
        return ""
    inspector.execution_context = context
    return inspector.get_engine_information(trt.LayerInformationFormat.JSON)


def refit_plan(plan_in: Path, onnx: Path, plan_out: Path, *, device: int = 0) -> dict[str, Any]:
    """Put the weights of another ONNX file of the same architecture into a plan that was built with `refit`; seconds, not minutes.

    The caller has checked `plan_in` against its sidecar. The new plan is as tied to GPU and version as the old one.

    Returns:
        what changes in meta.json: digests, bytes, refit_seconds, refitted_from.

    Raises:
        HardwareError: H004, H001, H003. ExportError: E004 when the plan cannot be refitted, or the graph is another one.
    """
    require_trt("refitting an engine")
    check_onnx(onnx)
    started, old = time.perf_counter(), plan_in.read_bytes()
    with CudaDevice(device).active(), listening() as heard:
        data = _refitted(_loaded(old, heard, plan_in, host_code=False), plan_in, onnx, heard)
    write_whole(plan_out, lambda file: file.write(data))
    return {
        "refitted_from": sha256(old).hexdigest(),
        "onnx_sha256": sha256_file(onnx),
        "sha256": sha256(data).hexdigest(),
        "bytes": len(data),
        "refit_seconds": round(time.perf_counter() - started, 2),
    }


def _refitted(engine: trt.ICudaEngine, plan: Path, onnx: Path, heard: Messages) -> bytes:
    import tensorrt as trt

    again = "imgcls-fast export --trt --set export.trt_refit=true"
    if not engine.refittable:
        raise ExportError("E004", f"the weights of {plan} cannot be replaced: it was built without refit", try_=again)
    refitter = trt.Refitter(engine, logger())
    parser = trt.OnnxParserRefitter(refitter, logger())
    if not parser.refit_from_file(str(onnx)):
        raise unreadable(onnx, (parser.get_error(i) for i in range(parser.num_errors)), heard)
    missing = refitter.get_missing_weights()
    if missing or not refitter.refit_cuda_engine():
        lacking = f"{len(missing)} weights are not in it, first {missing[0]}" if missing else heard.summary()
        raise ExportError(
            "E004", f"{plan} cannot take the weights of {onnx}: {lacking or 'no reason given'}", try_=again
        )
    data = engine.serialize()
    if data is None:
        raise ExportError(
            "E004", f"TensorRT cannot write the refitted engine of {plan}", why=heard.summary(), try_=again
        )
    return bytes(data)


# ---------------------------------------------------------------- elsewhere


def trtexec_line(onnx: Path, plan: Path, options: TrtOptions, version: str | None = None) -> str:
    """The command of NVIDIA's trtexec that builds the same engine where TensorRT is.

    Args:
        version: version of that TensorRT; None: a line for 10.13 to 11 (11.x ignores --stronglyTyped, with a warning).

    Raises:
        ExportError: E004 when the file is no ONNX.
    """
    words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={plan}"]
    if version is None or version_of(version)[0] < 11:
        words.append("--stronglyTyped")
    words += [
        "--noTF32",
        f"--builderOptimizationLevel={options.level}",
        f"--memPoolSize=workspace:{options.workspace_gb * 1024:g}",
    ]
    words += [
        f"--{name}Shapes={shape}" for name, shape in zip(("min", "opt", "max"), _shapes(onnx, options), strict=False)
    ]
    if options.hardware != "this":
        words.append(f"--hardwareCompatibilityLevel={_TRTEXEC_HARDWARE[options.hardware]}")
    words += ["--versionCompatible"] * options.version_compatible + ["--refit"] * options.refit
    if options.timing_cache:
        words.append(f"--timingCacheFile={options.timing_cache.name}")
    return " ".join(map(shlex.quote, [*words, "--profilingVerbosity=detailed", "--skipInference"]))


def _shapes(onnx: Path, options: TrtOptions) -> list[str]:
    """ "pixels:1x224x224x3" for each of the batches; none for a graph with a fixed batch."""
    dims = [d.dim_value for d in _read_onnx(onnx).graph.input[0].type.tensor_type.shape.dim]
    return [] if dims[0] else [f"{INPUT}:{'x'.join(map(str, (rows, *dims[1:])))}" for rows in options.batches]
