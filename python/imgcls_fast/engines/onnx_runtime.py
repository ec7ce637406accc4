"""ONNX files as Engines: ONNX Runtime on a CPU or a GPU; and what every runtime of ONNX files asks of them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core import env
from ..core.errors import ExportError, HardwareError
from ..core.labels import LabelSpace
from ..core.onnx_bytes import HostileOnnx, OnnxFacts, check_onnx
from ..core.pixels import Pixels
from .base import blank, closed, dominant, least_scores, score_in_parts

MAX_BATCH = 1024
# Operators that do the multiplying, of standard ONNX and of ONNX Runtime's optimised graphs.
_HEAVY = frozenset(
    {
        "Conv",
        "FusedConv",
        "NhwcFusedConv",
        "NhwcConv",
        "ConvTranspose",
        "Gemm",
        "FusedGemm",
        "MatMul",
        "FusedMatMul",
        "TransposeMatMul",
        "Attention",
        "MultiHeadAttention",
        "PackedAttention",
    }
)
_HEAVY_INT8 = frozenset(
    {
        "QLinearConv",
        "ConvInteger",
        "QLinearMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QGemm",
        "QAttention",
    }
)
# What runtimes call the types
PRECISION_NAMES = {
    "f32": "fp32",
    "f16": "fp16",
    "i8": "int8",
    "u8": "int8",
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}


@dataclass(frozen=True)
class GraphFacts:
    """What must be known of a file before a runtime sees it.

    Args:
        fp16_quantized: it holds Q/DQ with FP16 scales, whose fusion ONNX Runtime gets wrong on the CPU.
    """

    fp16_quantized: bool


class GraphEngine:
    """What the runtimes of ONNX files share: any number of images through a graph whose batch may be fixed."""

    labels: LabelSpace
    pixels: Pixels
    thresholds: np.ndarray | None
    max_batch: int
    _fixed: int | None  # batch size of the file; None: dynamic

    def scores(self, pixels: Any) -> np.ndarray:
        """(N, K) float32 probabilities."""
        return score_in_parts(
            self._score, np.asarray(pixels), self.max_batch, self.labels.size, fixed=bool(self._fixed)
        )

    def warmup(self, n: int) -> None:
        self.scores(blank(self.pixels, n))

    def _score(self, part: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _check_batch(self, batch: int) -> None:
        if self._fixed and batch != self._fixed:
            raise ValueError(f"this file takes batches of {self._fixed}, got {batch}")


class OnnxEngine(GraphEngine):
    """An exported graph in ONNX Runtime. See `base.Engine`.

    Args:
        path: a graph `pixels` (batch, S, S, C) uint8 -> `scores` (batch, K) float32; softmax or sigmoid and temperatures are inside.
        device: "cpu", or "cuda[:n]" with onnxruntime-gpu.
        threads: CPU threads per batch; 0 uses every core.
        thresholds: least score per column, see `base.Engine`.

    Raises:
        HardwareError: H004 without ONNX Runtime, or without its CUDA part.
        ExportError: E005 when the file is damaged, keeps weights elsewhere, or is not of this model.
    """

    thread_safe = True
    runtime = "onnx"

    def __init__(
        self,
        path: Path,
        labels: LabelSpace,
        pixels: Pixels,
        *,
        device: str = "cpu",
        threads: int = 0,
        max_batch: int = MAX_BATCH,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        onnxruntime = env.require("onnxruntime", "onnx", "the runtime onnx")
        graph, threads = read_graph(path), threads or env.usable_cpus()  # by itself it counts cores that are not ours
        self.labels, self.pixels, self.device = labels, pixels, device
        self.thresholds = least_scores(labels, thresholds)
        self._gpu = _Gpu(onnxruntime, device) if device != "cpu" else None
        with tempfile.TemporaryDirectory(prefix="imgcls-fast-") as folder:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            # threads that wait for the next call would take the cores from decoding, and from other engines
            options.add_session_config_entry("session.force_spinning_stop", "1")
            if graph.fp16_quantized:
                options.add_session_config_entry("session.disable_quant_qdq", "1")
            options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
            providers = [self._gpu.provider] if self._gpu else []
            with explained(path, _errors()):
                self.session: Any = onnxruntime.InferenceSession(
                    str(path), options, providers=[*providers, "CPUExecutionProvider"]
                )
            self._fixed = self._check_edges(path)
            self.max_batch = self._fixed or max_batch
            self._check_provider()
            with explained(path, _errors()):
                self.scores(blank(pixels, 1))
            ran = _profiled(Path(self.session.end_profiling()))
        counts, self._providers = _ort_counts(ran)
        self.precision = dominant(counts)
        self._facts = {"onnxruntime": onnxruntime.__version__, "operators": dict(counts), "providers": self._providers,
                       "threads": threads, "disable_quant_qdq": graph.fp16_quantized}  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Version, multiplying operators by the type that they ran in, nodes by provider, options."""
        return dict(self._facts)

    def bind(self, batch: int) -> OnnxBound:
        """Buffers in the device's memory.

        Raises:
            ValueError: another batch size than the file's fixed one.
        """
        if self.session is None:
            raise closed("onnx")
        self._check_batch(batch)
        return OnnxBound(self.session, blank(self.pixels, batch), self.labels.size, self._gpu)

    def close(self) -> None:
        self.session = None

    def _score(self, part: np.ndarray) -> np.ndarray:
        if self.session is None:
            raise closed("onnx")
        if self._gpu is None:
            return np.asarray(self.session.run(["scores"], {"pixels": part})[0])
        bound = OnnxBound(self.session, part, self.labels.size, self._gpu)
        bound.replay()
        bound.wait()
        return np.asarray(bound.output.cpu().numpy())

    def _check_edges(self, path: Path) -> int | None:
        """The fixed batch size, or None.

        Raises:
            ExportError: E005 when names, types or sizes are not those of this model.
        """
        inputs = [(edge.name, edge.type, tuple(edge.shape)) for edge in self.session.get_inputs()]
        outputs = [(edge.name, edge.type, tuple(edge.shape)) for edge in self.session.get_outputs()]
        side, channels = self.pixels.size, self.pixels.channels
        return checked_edges(
            path, inputs, outputs, ("tensor(uint8)", "tensor(float)"), (side, side, channels), self.labels.size
        )

    def _check_provider(self) -> None:
        """ONNX Runtime falls back to the CPU with a line in its log."""
        first = self.session.get_providers()[0]
        if self._gpu and first != "CUDAExecutionProvider":
            raise HardwareError(
                "H001",
                f"ONNX Runtime could not start its CUDA provider on {self.device} and fell back to {first}",
                try_="imgcls-fast doctor",
            )


class _Gpu:
    """One GPU in ONNX Runtime, on a stream of its own so that events can time it."""

    def __init__(self, onnxruntime: Any, device: str) -> None:
        if not cuda_provider():
            raise HardwareError(
                "H004",
                f"the installed ONNX Runtime has no CUDA provider, and the runtime onnx on {device} needs it",
                try_=env.requirement_hint("onnxruntime-gpu"),
            )
        import torch

        self.device = torch.device(device)
        self.index = self.device.index or 0
        self.stream = torch.cuda.Stream(self.device)
        # strictly float32, as OpenVINO is asked to be; a GPU that shall be faster gets the FP16 file
        settings = {"device_id": self.index, "user_compute_stream": str(self.stream.cuda_stream), "use_tf32": "0"}
        self.provider = ("CUDAExecutionProvider", settings)
        self.options = onnxruntime.RunOptions()
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")


class OnnxBound:
    """Buffers bound to a session: NumPy arrays on the CPU, torch tensors on a GPU. See `base.Bound`.

    Args:
        pixels: what `input` begins with; on the CPU it is `input`.
    """

    def __init__(self, session: Any, pixels: np.ndarray, columns: int, gpu: _Gpu | None) -> None:
        self._session, self._gpu, self._binding = session, gpu, session.io_binding()
        self.input: Any = pixels
        self.output: Any = np.zeros((len(pixels), columns), np.float32)
        device, index = "cpu", 0
        if gpu:
            import torch

            self.stream = gpu.stream
            with torch.cuda.stream(gpu.stream):
                self.input = torch.from_numpy(pixels).to(gpu.device)
                self.output = torch.zeros(self.output.shape, device=gpu.device)
            device, index = "cuda", gpu.index
        self._binding.bind_input("pixels", device, index, np.uint8, tuple(self.input.shape), _address(self.input))
        self._binding.bind_output("scores", device, index, np.float32, tuple(self.output.shape), _address(self.output))

    def replay(self) -> None:
        self._session.run_with_iobinding(self._binding, self._gpu.options if self._gpu else None)

    def wait(self) -> None:
        if self._gpu:
            self._gpu.stream.synchronize()


def _address(buffer: Any) -> int:
    return int(buffer.ctypes.data if isinstance(buffer, np.ndarray) else buffer.data_ptr())


def cuda_provider() -> bool:
    """Whether the installed ONNX Runtime has its CUDA part.

    Raises:
        HardwareError: H004 without ONNX Runtime.
    """
    onnxruntime = env.require("onnxruntime", "onnx", "the runtime onnx")
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def read_graph(path: Path) -> GraphFacts:
    """Look into a file before a runtime does.

    Raises:
        HardwareError: H004 without onnx.
        ExportError: E005 when it is no ONNX file, goes beyond `bounds.ONNX_...`, keeps weights in other files, or holds
            what no export of ours has and a runtime may not survive: loops, functions, sparse tensors.
    """
    with explained(path, (HostileOnnx, OSError)):
        seen = check_onnx(path)
    _demand_plain(path, seen)
    onnx = env.require("onnx", "onnx", "reading ONNX files")
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    with explained(path, (DecodeError, OSError)):
        model = onnx.load(str(path), load_external_data=False)
    tensors = list(_tensors(model.graph))
    halves = {t.name for t in tensors if t.data_type == onnx.TensorProto.FLOAT16}
    constants = (node for node in model.graph.node if node.op_type == "Constant")
    for node in constants:
        if any(a.t.data_type == onnx.TensorProto.FLOAT16 for a in node.attribute):
            halves |= set(node.output)
    quantized = (n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear"))
    return GraphFacts(any(n.input[1] in halves for n in quantized if len(n.input) > 1))


def _demand_plain(path: Path, seen: OnnxFacts) -> None:
    """Refuse what a runtime would follow: other files, loops, functions that expand, sparse tensors that become dense."""
    if seen.outside:
        raise ExportError(
            "E005",
            f"{path} keeps {len(seen.outside)} tensors in other files, first {seen.outside[0]!r}; only files that are whole are opened",
            try_="imgcls-fast export --onnx",
        )
    loops = sorted(set(seen.operators) & {"Loop", "Scan"})
    reasons = {
        f"a {' and a '.join(loops)}": bool(loops),
        f"{seen.functions} functions of its own": seen.functions > 0,
        f"{seen.sparse} sparse tensors": seen.sparse > 0,
        f"a node ({seen.unordered}) that takes what a later one makes": bool(seen.unordered),
    }
    if found := [what for what, there in reasons.items() if there]:
        raise ExportError(
            "E005",
            f"{path} holds {', '.join(found)}, which no exported model has; it was not opened",
            where=str(path),
            try_="imgcls-fast export --onnx",
        )


def _tensors(graph: Any) -> Iterator[Any]:
    """Every tensor of a graph: initializers, constants, and those of sub-graphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)


def checked_edges(
    path: Path,
    inputs: list[tuple[str, str, tuple[Any, ...]]],
    outputs: list[tuple[str, str, tuple[Any, ...]]],
    types: tuple[str, str],
    image: tuple[int, int, int],
    columns: int,
) -> int | None:
    """Compare a graph's inputs and outputs, (name, type, shape), with the model's; the fixed batch size, or None.

    Raises:
        ExportError: E005 with both sides.
    """
    expected = f"pixels {types[0]} (batch, {', '.join(map(str, image))}) -> scores {types[1]} (batch, {columns})"
    found = " -> ".join(
        ", ".join(f"{name} {kind} ({', '.join(map(str, shape))})" for name, kind, shape in edges)
        for edges in (inputs, outputs)
    )
    names = [edge[0] for edge in inputs] == ["pixels"] and [edge[0] for edge in outputs] == ["scores"]
    if names:
        (_, kind_in, shape_in), (_, kind_out, shape_out) = inputs[0], outputs[0]
        same = (
            (kind_in, kind_out) == types and shape_in[1:] == image and len(shape_out) == 2 and shape_out[1] == columns
        )
        if same and isinstance(shape_in[0], int) == isinstance(shape_out[0], int):
            return shape_in[0] if isinstance(shape_in[0], int) else None
    raise ExportError(
        "E005",
        f"{path} is not a graph of this model",
        where=str(path),
        why=f"expected {expected}, found {found}",
        try_="imgcls-fast export --onnx",
    )


def _profiled(path: Path) -> list[dict[str, Any]]:
    """Arguments of the nodes that ran, from ONNX Runtime's profile."""
    events: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]


def _ort_counts(ran: Iterable[dict[str, Any]]) -> tuple[Counter[str], dict[str, int]]:
    """Multiplying operators by precision, and all nodes by provider."""
    counts: Counter[str] = Counter()
    providers: Counter[str] = Counter()
    for node in ran:
        providers[node.get("provider", "")] += 1
        types = {kind for tensor in node.get("input_type_shape", ()) for kind in tensor}
        if node["op_name"] in _HEAVY_INT8:
            counts["int8"] += 1
        elif node["op_name"] in _HEAVY:
            kind = next((kind for kind in ("float", "bfloat16", "float16") if kind in types), "other")
            counts[PRECISION_NAMES.get(kind, kind)] += 1
    return counts, dict(providers)


def _errors() -> tuple[type[BaseException], ...]:
    """ONNX Runtime's errors, which have no common base but Exception."""
    state = env.require("onnxruntime.capi.onnxruntime_pybind11_state", "onnx", "the runtime onnx")
    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


@contextmanager
def explained(path: Path, errors: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Turn what a runtime raises at a damaged file into E005 with the first line of its message."""
    try:
        yield
    except ExportError:
        raise
    except errors as error:
        first = next((line for line in str(error).strip().splitlines() if line), type(error).__name__)
        raise ExportError(
            "E005", f"{path} cannot be loaded: {first}", where=str(path), try_="imgcls-fast export --onnx"
        ) from error
