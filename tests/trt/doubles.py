"""Doubles of TensorRT and of CUDA for a machine that has neither, strict where the real ones are.

TensorRT's are subclasses of what typings/tensorrt/__init__.pyi declares, run as a module, and stubtest compares that file with
NVIDIA's bindings. A double can have no method or argument that the file does not declare; each call is checked against the
declared types, and what is not declared can neither be read nor set. As on a GPU, nothing is computed before a stream is waited
for, work that is being captured is not done, and a graph replays what was captured with the memory that it was captured with.
"""

from __future__ import annotations
import __future__

import base64
import ctypes
import inspect
import json
import threading
import time
import types
import typing
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imgcls_fast.engines.trt_plan import CudaDevice

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "typings" / "tensorrt" / "__init__.pyi"
NUMBERS = {
    "ERROR": 1,
    "FAILED_ALLOCATION": 5,
    "UNSPECIFIED_ERROR": 1,
}  # where the number matters; the others count from 0


@dataclass
class World:
    """What the doubles shall do, and what was done to them."""

    version: str = "10.16.1.11"
    gpus: int = 1
    gpu: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    starts: bool = True  # else the factories of Builder and Runtime give nothing
    parser_errors: list[tuple[int, str, str, str]] = field(default_factory=list)  # node, name, operator, description
    build_errors: list[tuple[str, str]] = field(default_factory=list)  # code, text: the build gives None
    refuse: set[str] = field(default_factory=set)  # calls that give False or None
    scratch: int = 4096  # bytes
    inspector: str = ""  # empty: one convolution in float16
    during: Callable[[], None] = lambda: None  # called while a build is under way, which then lasts until it is stopped
    endless: bool = False
    phases: tuple[tuple[str, str | None, int], ...] = (("Building", None, 2), ("Tactics", "Building", 4))

    calls: list[str] = field(default_factory=list)  # in order
    config: dict[str, Any] = field(default_factory=dict)  # what was set on the last builder config
    network_flags: int = 0
    profile: tuple[Any, ...] = ()
    streams: dict[int, FakeStream] = field(default_factory=dict)
    graphs: int = 0
    plain: int = 0  # enqueues outside of captures
    freed: list[str] = field(default_factory=list)  # "graph", "context", "engine": in order
    logger: Any = None
    first_logger: Any = None

    def call(self, name: str) -> bool:
        """Note a call; False when it shall be refused."""
        self.calls.append(name)
        return name not in self.refuse

    def report(self, severity: int, text: str) -> None:
        """A message of TensorRT: like the real one, to the first logger that the process gave it."""
        kind = type(self.first_logger).__mro__[1].Severity
        self.first_logger.log(_member(kind, "", severity), text)


class FakeStream:
    """Work in order; nothing is done before somebody waits."""

    def __init__(self, world: World) -> None:
        self.world, self.work = world, list[Callable[[], None]]()
        self.capturing: FakeGraph | None = None
        self.cuda_stream = 0x1000 + len(world.streams)
        world.streams[self.cuda_stream] = self

    def synchronize(self) -> None:
        assert self.capturing is None, "a stream that is being captured cannot be waited for"
        work, self.work = self.work, []
        for do in work:
            do()


class FakeGraph:
    def __init__(self, world: World) -> None:
        self.work: list[Callable[[], None]] = []
        world.graphs += 1
        weakref.finalize(self, world.freed.append, "graph")


def fake_device(world: World) -> type[CudaDevice]:
    """CudaDevice with tensors in host memory; has exactly its methods."""

    class FakeDevice(CudaDevice):
        @staticmethod
        def count() -> int:
            return world.gpus

        def facts(self) -> dict[str, Any]:
            return {
                "gpu": world.gpu, "compute_capability": list(world.capability), "driver": "580.65.06", "cuda": "13.0",
            }  # fmt: skip

        def active(self) -> Any:
            return nullcontext()

        def stream(self) -> Any:
            return FakeStream(world)

        def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, stream: Any) -> torch.Tensor:
            if "memory" in world.refuse:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return torch.zeros(shape, dtype=dtype)

        def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.full(shape, 77, dtype=dtype)  # never what a test expects

        def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
            stream.work.append(lambda: target.copy_(source))

        def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
            if not world.call("capture"):
                raise RuntimeError("operation not permitted when stream is capturing")
            stream.capturing = graph = FakeGraph(world)
            try:
                enqueue()
            finally:
                stream.capturing = None
            return graph

        def replay(self, graph: Any, stream: Any) -> None:
            world.call("replay")
            stream.work.extend(graph.work)

        def follow(self, stream: Any) -> None:
            world.call("follow")

        def wait(self, stream: Any) -> None:
            stream.synchronize()

    return FakeDevice


# ---------------------------------------------------------------- the declared API as a module


def declared() -> types.ModuleType:
    """The .pyi run as a module: its enumerations have their members, its functions do nothing."""
    module = types.ModuleType("tensorrt")
    code = compile(STUB.read_text("utf-8"), str(STUB), "exec", flags=__future__.annotations.compiler_flag)
    exec(code, module.__dict__)
    for kind in classes(module):
        for name, hint in vars(kind).get("__annotations__", {}).items():
            if hint == f"ClassVar[{kind.__qualname__}]":
                members = [n for n in vars(kind) if isinstance(vars(kind)[n], kind)]
                setattr(kind, name, _member(kind, name, NUMBERS.get(name, len(members))))
        if "__int__" in vars(kind):
            kind.__int__ = lambda self: self._number  # type: ignore[attr-defined]
            kind.__repr__ = lambda self: f"{type(self).__name__}.{self._name}"  # type: ignore[method-assign]
    return module


def classes(module: types.ModuleType) -> Iterator[type]:
    """Every class that the file declares, also inside another."""
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == "tensorrt":
            yield value
            yield from (inner for inner in vars(value).values() if isinstance(inner, type))


def _member(kind: type, name: str, number: int) -> Any:
    member = object.__new__(kind)
    member._name, member._number = name, number
    return member


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a declared type, strictly: a path is no str, a float no int."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (hint is type(None) and value is None):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is not None:
        return isinstance(value, origin) and all(fits(part, args[0]) for part in value)
    return isinstance(hint, type) and isinstance(value, hint)


def _checked(
    function: Callable[..., Any], declaration: Callable[..., Any], namespace: dict[str, Any]
) -> Callable[..., Any]:
    signature = inspect.signature(declaration)
    own = inspect.signature(function)
    assert list(own.parameters) == list(signature.parameters), f"{function.__qualname__}{own} is not as declared"
    hints = typing.get_type_hints(declaration, namespace)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)  # TypeError: too many arguments, or too few
        for name, value in list(bound.arguments.items())[1:]:
            if not fits(value, hints[name]):
                raise TypeError(f"{function.__qualname__}(): {name} must be {hints[name]}, got {value!r}")
        found = function(self, *args, **kwargs)
        assert function.__name__ == "__init__" or fits(found, hints["return"]), (
            f"{function.__qualname__} gives {found!r}"
        )
        return found

    return call


def faithful(namespace: dict[str, Any]) -> Callable[[type], type]:
    """Make a double strict, and refuse it when it has something that is not declared."""

    def decorate(double: type) -> type:
        base = double.__mro__[1]
        names = {n for n in (*vars(base), *vars(base).get("__annotations__", {})) if not n.startswith("__")}
        extra = {n for n in vars(double) if not n.startswith("_")} - names
        assert not extra, f"{double.__name__} has {extra}, which are not declared"
        lacking = {n for n in names if callable(getattr(base, n, None)) and n not in vars(double)}
        assert not lacking, f"{double.__name__} lacks {lacking}"
        for name, value in list(vars(double).items()):
            if inspect.isfunction(value) and (name == "__init__" or not name.startswith("_")):
                setattr(double, name, _checked(value, getattr(base, name), namespace))
        settable = {n: h for n, h in typing.get_type_hints(base, namespace).items() if n in base.__annotations__} if (
            "__annotations__" in vars(base)
        ) else {}  # fmt: skip

        def assign(self: Any, name: str, value: Any) -> None:
            if name.startswith("_") or isinstance(getattr(double, name, None), property):
                return object.__setattr__(self, name, value)
            if name not in settable:
                raise AttributeError(f"{base.__name__} has no attribute {name!r} to set")
            if not fits(value, settable[name]):
                raise TypeError(f"{base.__name__}.{name} must be {settable[name]}, got {value!r}")
            return object.__setattr__(self, name, value)

        double.__setattr__ = assign  # type: ignore[method-assign,assignment]
        return double

    return decorate


# ---------------------------------------------------------------- TensorRT


def fake_tensorrt(world: World) -> types.ModuleType:
    """A module `tensorrt` that builds and runs any network that ONNX Runtime can compute, as `world` says."""
    trt = declared()
    trt.__version__ = world.version
    major = int(world.version.split(".")[0])
    trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED._number = 1 if major == 10 else 0
    names = dict(vars(trt))  # the declared classes, of which the doubles are subclasses
    _listeners(trt)
    _building(trt, world, names)
    _running(trt, world, names)
    _refitting(trt, world, names)
    return trt


def _listeners(trt: types.ModuleType) -> None:
    """The classes that our code derives from: pybind11 refuses an object whose base was not initialised."""
    for kind in (trt.ILogger, trt.IErrorRecorder, trt.IProgressMonitor):
        kind.__init__ = lambda self: self.__dict__.update(_made=True)


def _take_logger(world: World, logger: Any) -> None:
    assert logger._made, "TypeError: ILogger.__init__() must be called when overriding __init__"
    world.logger, world.first_logger = logger, world.first_logger or logger
    if not world.starts:
        world.report(0, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")


def _dims(trt: types.ModuleType, values: Any) -> Any:
    class FakeDims(trt.Dims):  # type: ignore[name-defined,misc]
        def __len__(self) -> int:
            return len(values)

        def __getitem__(self, arg0: int) -> int:
            return int(values[arg0])

    return FakeDims()


def _memory(trt: types.ModuleType, data: bytes) -> Any:
    class FakeMemory(trt.IHostMemory):  # type: ignore[name-defined,misc]
        def __bytes__(self) -> bytes:  # stands for the buffer protocol, which Python 3.11 classes cannot have
            return data

    return FakeMemory()


def _parser_error(trt: types.ModuleType, namespace: dict[str, Any], facts: tuple[int, str, str, str]) -> Any:
    @faithful(namespace)
    class FakeError(trt.ParserError):  # type: ignore[name-defined,misc]
        def node(self) -> int:
            return facts[0]

        def node_name(self) -> str:
            return facts[1]

        def node_operator(self) -> str:
            return facts[2]

        def desc(self) -> str:
            return facts[3]

    return FakeError()


def _building(trt: types.ModuleType, world: World, names: dict[str, Any]) -> None:
    strict = faithful(names)

    @strict
    class Tensor(trt.ITensor):  # type: ignore[name-defined,misc]
        pass

    def tensor(name: str, shape: list[int]) -> Any:
        made = Tensor()
        made.name, made.shape = name, _dims(trt, shape)
        return made

    @strict
    class Network(trt.INetworkDefinition):  # type: ignore[name-defined,misc]
        _graph: dict[str, Any] | None = None

        @property
        def num_inputs(self) -> int:
            return len(self._graph["inputs"]) if self._graph else 0

        @property
        def num_outputs(self) -> int:
            return len(self._graph["outputs"]) if self._graph else 0

        def get_input(self, index: int) -> Any:
            return tensor(*self._graph["inputs"][index])

        def get_output(self, index: int) -> Any:
            return tensor(*self._graph["outputs"][index])

    @strict
    class Profile(trt.IOptimizationProfile):  # type: ignore[name-defined,misc]
        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._shapes = (input, tuple(min), tuple(opt), tuple(max))

    @strict
    class Cache(trt.ITimingCache):  # type: ignore[name-defined,misc]
        def serialize(self) -> Any:
            return _memory(trt, b"TIMINGS:1")

    @strict
    class Config(trt.IBuilderConfig):  # type: ignore[name-defined,misc]
        _flags, _profiles, _cache = frozenset[str](("TF32",)), (), None

        def set_flag(self, flag: Any) -> None:
            self._flags |= {flag._name}

        def clear_flag(self, flag: Any) -> None:
            self._flags -= {flag._name}

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._workspace = pool_size

        def add_optimization_profile(self, profile: Any) -> int:
            if not world.call("add_optimization_profile"):
                return -1
            self._profiles += (profile._shapes,)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
            known = bytes(serialized_timing_cache)
            if known and not known.startswith(b"TIMINGS:"):
                world.report(1, "Deserialization of the timing cache failed")
                return None
            made = Cache()
            made._foreign = known.endswith(b"foreign")
            return made

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            if cache._foreign and not ignore_mismatch:
                return False
            self._cache = cache
            return world.call("set_timing_cache")

        def get_timing_cache(self) -> Any:
            return self._cache

    def build(network: Any, config: Any, recorder: Any) -> Any:
        monitor = config.progress_monitor
        for code, text in world.build_errors:
            recorder.report_error(getattr(trt.ErrorCodeTRT, code), text)
            world.report(1, f"IBuilder::buildSerializedNetwork: Error Code 10: Internal Error ({text})")
        for name, parent, steps in world.phases:
            monitor.phase_start(name, parent, steps)
        stopped = False
        world.during()
        while world.endless and not stopped:
            time.sleep(0.01)
            stopped = not _asked(monitor, world.phases[-1][0], 0)
        for name, _, steps in reversed(world.phases):
            for step in range(steps):
                if stopped or not _asked(monitor, name, step):
                    stopped = True
                    break
            monitor.phase_finish(name)
        assert recorder.get_num_errors() == len(world.build_errors), "the bindings ask for get_num_errors"
        if stopped or world.build_errors or not world.call("build_serialized_network"):
            return None
        graph, shapes = network._graph, config._profiles[0] if config._profiles else None
        assert shapes or graph["inputs"][0][1][0] > 0, "dynamic shapes without a profile"
        fixed = tuple(graph["inputs"][0][1])
        plan = {
            "ends": shapes[1:] if shapes else (fixed,) * 3, "classes": graph["outputs"][0][1][1],
            "onnx": graph["onnx"], "refit": "REFIT" in config._flags, "dtype": graph["dtype"],
        }  # fmt: skip
        return _memory(trt, b"PLAN" + json.dumps(plan).encode())

    @strict
    class Builder(trt.Builder):  # type: ignore[name-defined,misc]
        def __init__(self, logger: Any) -> None:
            _take_logger(world, logger)

        def create_network(self, flags: int = 0) -> Any:
            world.network_flags = flags
            return Network()

        def create_builder_config(self) -> Any:
            return Config()

        def create_optimization_profile(self) -> Any:
            return Profile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            world.config = dict(vars(config))
            world.profile = config._profiles
            return build(network, config, self.error_recorder)

    @strict
    class Parser(trt.OnnxParser):  # type: ignore[name-defined,misc]
        def __init__(self, network: Any, logger: Any) -> None:
            self._network = network
            _take_logger(world, logger)

        @property
        def num_errors(self) -> int:
            return len(world.parser_errors)

        def set_flag(self, flag: Any) -> None:
            world.calls.append(f"parser.{flag._name}")

        def parse_from_file(self, model: str) -> bool:
            if world.parser_errors or not world.call("parse_from_file"):
                return False
            self._network._graph = read_graph(Path(model))
            return True

        def get_error(self, index: int) -> Any:
            return _parser_error(trt, names, world.parser_errors[index])

    trt.Builder, trt.OnnxParser = Builder, Parser


def _asked(monitor: Any, name: str, step: int) -> bool:
    """As the bindings do it: an exception cannot pass through C++, and stops the build."""
    try:
        return bool(monitor.step_complete(name, step))
    except BaseException:  # noqa: BLE001
        return False


def _running(trt: types.ModuleType, world: World, names: dict[str, Any]) -> None:
    strict = faithful(names)

    @strict
    class Context(trt.IExecutionContext):  # type: ignore[name-defined,misc]
        _shape: tuple[int, ...] | None = None
        _memory: tuple[int, int] | None = None
        _enqueued = False

        def set_device_memory(self, memory: int, size: int) -> None:
            assert size >= world.scratch
            assert memory
            self._memory = (memory, size)

        def set_input_shape(self, name: str, shape: Any) -> bool:
            lowest, _, highest = self._plan["ends"]
            inside = all(a <= b <= c for a, b, c in zip(lowest, shape, highest, strict=True))
            if name != "pixels" or not inside or not world.call("set_input_shape"):
                world.report(1, f"IExecutionContext::setInputShape: {shape} is outside the profile")
                return False
            self._shape, self._enqueued = tuple(shape), False
            return True

        def get_tensor_shape(self, name: str) -> Any:
            rows = self._shape[0] if world.call("get_tensor_shape") else 1 + self._shape[0]
            return _dims(trt, (rows, self._plan["classes"]))

        def infer_shapes(self) -> list[str]:
            return [] if self._shape and world.call("infer_shapes") else ["pixels"]

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return world.call("set_tensor_address")

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert stream_handle, "the default stream"
            assert self._shape and set(self._addresses) == {"pixels", "scores"}, "shapes or addresses are missing"
            assert self._memory or not world.scratch, "no device memory"
            assert self._busy.acquire(blocking=False), "two threads use one context"
            try:
                stream = world.streams[stream_handle]
                capturing = stream.capturing is not None
                if not world.call("execute_async_v3") or (capturing and not self._enqueued):
                    world.report(
                        1, "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (an illegal memory access)"
                    )
                    return False
                world.plain += not capturing
                self._enqueued = True
                (stream.capturing or stream).work.append(_work(self._plan, self._shape, dict(self._addresses)))
                return True
            finally:
                self._busy.release()

    @strict
    class Inspector(trt.EngineInspector):  # type: ignore[name-defined,misc]
        def get_engine_information(self, format: Any) -> str:
            assert format._name == "JSON"
            known = self.execution_context._shape is not None
            tensor = {"Name": "x", "Format/Datatype": "Row major FP16 format" if known else "N/A due to dynamic shapes"}
            layer = {"Name": "/conv", "LayerType": "CaskConvolution", "Inputs": [tensor], "Outputs": [tensor]}
            return world.inspector or json.dumps({"Layers": [layer], "Bindings": ["pixels", "scores"]})

    @strict
    class Engine(trt.ICudaEngine):  # type: ignore[name-defined,misc]
        @property
        def num_io_tensors(self) -> int:
            return 2

        @property
        def refittable(self) -> bool:
            return bool(self._plan["refit"])

        @property
        def device_memory_size_v2(self) -> int:
            return world.scratch

        def get_tensor_name(self, index: int) -> str:
            return ("pixels", "scores")[index]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name == "pixels" else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType.UINT8 if name == "pixels" and self._plan["dtype"] == "uint8" else trt.DataType.FLOAT

        def get_tensor_shape(self, name: str) -> Any:
            lowest, _, highest = self._plan["ends"]
            rows = lowest[0] if lowest == highest else -1
            return _dims(trt, (rows, *lowest[1:]) if name == "pixels" else (rows, self._plan["classes"]))

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
            assert (name, profile_index) == ("pixels", 0)
            return [_dims(trt, shape) for shape in self._plan["ends"]]

        def create_execution_context(self, strategy: Any = ...) -> Any:
            assert strategy._name == "USER_MANAGED"
            if not world.call("create_execution_context"):
                return None
            made = Context()
            made._plan, made._addresses, made._busy, made._engine = self._plan, {}, threading.Lock(), self
            weakref.finalize(made, world.freed.append, "context")
            return made

        def create_engine_inspector(self) -> Any:
            return Inspector() if world.call("create_engine_inspector") else None

        def serialize(self) -> Any:
            return _memory(trt, b"PLAN" + json.dumps(self._plan).encode()) if world.call("serialize") else None

    @strict
    class Runtime(trt.Runtime):  # type: ignore[name-defined,misc]
        def __init__(self, logger: Any) -> None:
            _take_logger(world, logger)

        def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
            world.config["host_code"] = getattr(self, "engine_host_code_allowed", False)
            try:
                if not world.call("deserialize_cuda_engine"):
                    raise ValueError
                plan = json.loads(bytes(serialized_engine).removeprefix(b"PLAN"))
            except ValueError:
                world.report(1, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magicTag mismatch)")
                return None
            made = Engine()
            made._plan = {**plan, "ends": [tuple(shape) for shape in plan["ends"]]}
            weakref.finalize(made, world.freed.append, "engine")
            return made

    trt.Runtime = Runtime


def _work(plan: dict[str, Any], shape: tuple[int, ...], addresses: dict[str, int]) -> Callable[[], None]:
    """What the network does to the memory at these addresses, when its turn comes; ONNX Runtime does it here."""
    session = _session(plan["onnx"])

    def do() -> None:
        pixels = _view(addresses["pixels"], shape, np.uint8)
        scores = _view(addresses["scores"], (shape[0], plan["classes"]), np.float32)
        scores[:] = session.run(["scores"], {"pixels": pixels})[0]

    return do


@cache
def _session(onnx: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(base64.b64decode(onnx), options, providers=["CPUExecutionProvider"])


def _view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def _refitting(trt: types.ModuleType, world: World, names: dict[str, Any]) -> None:
    strict = faithful(names)

    @strict
    class Refitter(trt.Refitter):  # type: ignore[name-defined,misc]
        def __init__(self, engine: Any, logger: Any) -> None:
            self._engine, self._new = engine, None

        def get_missing_weights(self) -> list[str]:
            return [] if world.call("get_missing_weights") else ["/conv/weight"]

        def refit_cuda_engine(self) -> bool:
            self._engine._plan["onnx"] = self._new
            return world.call("refit_cuda_engine")

    @strict
    class ParserRefitter(trt.OnnxParserRefitter):  # type: ignore[name-defined,misc]
        def __init__(self, refitter: Any, logger: Any) -> None:
            self._refitter = refitter

        @property
        def num_errors(self) -> int:
            return len(world.parser_errors)

        def get_error(self, index: int) -> Any:
            return _parser_error(trt, names, world.parser_errors[index])

        def refit_from_file(self, model: str) -> bool:
            self._refitter._new = read_graph(Path(model))["onnx"]
            return not world.parser_errors

    trt.Refitter, trt.OnnxParserRefitter = Refitter, ParserRefitter


# ---------------------------------------------------------------- a network small enough to be computed twice


def tiny_onnx(
    path: Path, *, classes: int = 3, side: int = 4, batch: int | str = "batch", seed: int = 0, dtype: str = "uint8"
) -> Path:
    """pixels uint8 (batch, S, S, 3) -> mean over the image -> times W -> softmax -> scores: a true ONNX file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(seed).normal(0, 3, (1, classes)).astype(np.float32)
    kind = TensorProto.UINT8 if dtype == "uint8" else TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["pixels"], ["real"], name="/cast", to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["real", "axes"], ["mean"], name="/mean", keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["unit"], name="/scale"),
        helper.make_node("Reshape", ["unit", "column"], ["rows"], name="/rows"),
        helper.make_node("MatMul", ["rows", "W"], ["logits"], name="/head"),
        helper.make_node("Softmax", ["logits"], ["scores"], name="/softmax", axis=1),
    ]
    constants = {
        "axes": np.array([1, 2, 3]), "scale": np.float32(1 / 255), "column": np.array([-1, 1]), "W": weights,
    }  # fmt: skip
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info("pixels", kind, [batch, side, side, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def read_graph(path: Path) -> dict[str, Any]:
    """What the doubles need to know of an ONNX file, and the file."""
    import onnx

    graph = onnx.load(str(path)).graph

    def shape(value: Any) -> list[int]:
        return [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]

    return {
        "inputs": [(value.name, shape(value)) for value in graph.input],
        "outputs": [(value.name, shape(value)) for value in graph.output],
        "dtype": "uint8" if graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8 else "float32",
        "onnx": base64.b64encode(path.read_bytes()).decode(),
    }


def weights_of(path: Path) -> np.ndarray:
    """(1, K) float32: W of a file of `tiny_onnx`."""
    import onnx
    from onnx import numpy_helper

    return next(numpy_helper.to_array(entry) for entry in onnx.load(str(path)).graph.initializer if entry.name == "W")


def tiny_scores(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The network's formula in NumPy: (N, K) float32."""
    logits = pixels.reshape(len(pixels), -1).astype(np.float64).mean(1, keepdims=True) / 255 * weights
    grown = np.exp(logits - logits.max(1, keepdims=True))
    return (grown / grown.sum(1, keepdims=True)).astype(np.float32)


@contextmanager
def installed(world: World, monkeypatch: Any) -> Iterator[types.ModuleType]:
    """The doubles in place of TensorRT and of the GPU."""
    import sys

    from imgcls_fast.engines import trt_plan, trt_runtime
    from imgcls_fast.exporting import trt_engine, trt_export

    module = fake_tensorrt(world)
    device = fake_device(world)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    for place in (trt_plan, trt_runtime, trt_engine, trt_export):
        monkeypatch.setattr(place, "CudaDevice", device)
    trt_plan.logger.cache_clear()
    try:
        yield module
    finally:
        trt_plan.logger.cache_clear()
