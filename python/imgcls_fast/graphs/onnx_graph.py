"""A bundle as one ONNX file: uint8 NHWC pixels in, probabilities out, compared with torch on real images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import env
from ..core.bundle import Bundle
from ..core.config_verbs import ExportConfig
from ..core.errors import ExportError
from ..core.exports import Export, choose, export_key, find_key, finish, new_export
from ..core.phases import phase
from ..core.text import to_json
from ..engines.agreement import clear_margin, compare_engines, judge_comparison
from ..engines.base import Engine
from ..engines.onnx_runtime import OnnxEngine
from ..engines.torch_runtime import DTYPES, TorchEngine, load_model, scorer_of

BF16_OPSET = 22  # the first whose convolutions and poolings take bfloat16
STRUCTURE_ONLY = "structure-only"

_DOMAINS = ("", "ai.onnx")  # standard operators only
_PREFIX = "imgcls_fast."  # of our entries in the model's metadata
_LARGEST_BATCH = 65536
# ONNX's reference evaluator is written for clarity: a graph of this many weights and pixels takes it seconds.
_REFERENCE_WEIGHTS, _REFERENCE_SIDE, _REFERENCE_IMAGES = 300_000, 64, 4


@phase("writing the ONNX file and comparing it")
def export_onnx(
    bundle: Bundle,
    exports: Path,
    batches: Iterable[np.ndarray],
    *,
    precision: str = "fp32",
    settings: ExportConfig | None = None,
    name_it: bool = True,
) -> Export:
    """Write exports/onnx-<precision>-<key8>/model.onnx, compare it with torch, and only then name it in exports/index.json.

    An export with the same key that is there and whole is taken as it is.

    Args:
        batches: (n, H, W, C) uint8 real images for the comparison; not empty.
        name_it: whether index.json shall name it.

    Raises:
        HardwareError: H004 when onnx, onnxscript or onnxruntime is missing.
        ExportError: E001 when the graph cannot be made or is not plain ONNX.
        GateFailed: E901 when scores differ by more than `settings.max_score_diff` (half precision: 5e-2), or the class of
            an image whose first class leads clearly differs; nothing is kept.
    """
    settings = settings or ExportConfig()  # type: ignore[call-arg]
    for module in ("onnx", "onnxscript", "onnxruntime"):
        env.require(module, "onnx", "export --onnx")
    opset = max(settings.opset, BF16_OPSET) if precision == "bf16" else settings.opset
    versions = env.versions(("torch", "onnx", "onnxscript", "onnxruntime"))
    key = export_key(bundle, opset=opset, batch=settings.batch, versions=versions)
    export = find_key(exports, bundle, "onnx", precision, key)
    if export is None:
        with new_export(exports, "onnx", precision, key) as temporary:
            path = temporary / "model.onnx"
            write_graph(bundle, path, precision=precision, opset=opset, batch=settings.batch)
            facts = graph_facts(path, bundle, settings.batch)
            facts |= verify_graph(path, bundle, batches, precision, settings.max_score_diff)
            export = finish(temporary, bundle, "onnx", precision, "model.onnx", {**facts, "versions": versions})
    if name_it:
        choose(export)
    return export


def write_graph(
    bundle: Bundle,
    path: Path,
    *,
    precision: str = "fp32",
    opset: int = 20,
    batch: int | None = None,
    logits: bool = False,
) -> None:
    """One ONNX file with the weights inside and the model's facts in its metadata.

    Input `pixels`, (batch, S, S, C) uint8; output `scores`, (batch, K) float32. The first and only consumer of the bytes is
    a Cast. With fp16 or bf16 the network between normalisation and softmax is of that type.

    Args:
        batch: fixed batch size; None: dynamic.
        opset: from 23 on an attention that is PyTorch's `scaled_dot_product_attention` becomes one operator, Attention.
        logits: end before temperature and softmax (the output is still called `scores`).

    Raises:
        ExportError: E001 when the graph cannot be made or is not plain ONNX.
    """
    scorer = scorer_of(bundle, precision, logits=logits)
    side, channels = bundle.pixels.size, bundle.pixels.channels
    example = torch.zeros((batch or 2, side, side, channels), dtype=torch.uint8)
    dynamic = None if batch else {"pixels": {0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                scorer,
                (example,),
                str(path),
                dynamo=True,
                opset_version=opset,
                input_names=["pixels"],
                output_names=["scores"],
                dynamic_shapes=dynamic,
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            "E001",
            f"{bundle.arch.get('arch')} cannot be exported to ONNX opset {opset}: {first}",
            try_="imgcls-fast export --onnx --opset 18 --debug",
        ) from error
    _finish_file(path, bundle)


def _finish_file(path: Path, bundle: Bundle) -> None:
    """Check that the file is plain ONNX, and put the model's facts into its metadata."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False)
    _retype_folded(graph.graph)
    onnx.checker.check_model(graph, full_check=True)  # types and shapes too
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in graph.graph.node if node.domain not in _DOMAINS})
    if foreign:
        raise ExportError("E001", f"the graph holds operators that are not standard ONNX: {', '.join(foreign)}")
    if any(tensor.external_data for tensor in graph.graph.initializer):
        raise ExportError("E001", "the graph keeps weights outside its file")
    _cast_first(graph.graph)
    onnx.helper.set_model_props(graph, {_PREFIX + name: value for name, value in file_facts(bundle).items()})
    graph.producer_name, graph.producer_version = "imgcls-fast", env.package_version()
    onnx.save(graph, str(path))


def _retype_folded(graph: Any) -> None:
    """Give convolution weights into which the exporter has folded a batch norm the type of the convolution's input.

    It computes them with NumPy, which has no bfloat16, and leaves them in float32 (torch 2.14, onnxscript 0.7).
    """
    import onnx

    half = onnx.TensorProto.BFLOAT16
    typed = {tensor.name: tensor for tensor in graph.initializer}
    casts = [node for node in graph.node if node.op_type == "Cast"]
    if not any(attribute.i == half for node in casts for attribute in node.attribute):
        return
    del graph.value_info[:]  # wrong about the same tensors
    for node in graph.node:
        for name in node.input[1:] if node.op_type in ("Conv", "ConvTranspose") else ():
            tensor = typed.get(name)
            if tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT:
                values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()).to(torch.bfloat16)
                raw = values.view(torch.int16).numpy().tobytes()
                tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, half, tensor.dims, raw, raw=True))


def _cast_first(graph: Any) -> None:
    """Let `Shape` look at the floats: the bytes then have one consumer, and TensorRT nothing to object to."""
    consumers = [node for node in graph.node if "pixels" in node.input]
    cast = next((node for node in consumers if node.op_type == "Cast"), None)
    if cast is None:
        return  # the lint reports it
    for node in consumers:
        if node.op_type == "Shape":
            node.input[0] = cast.output[0]
    others = [node for node in graph.node if node is not cast]
    first = type(cast)()
    first.CopyFrom(cast)
    del graph.node[:]
    graph.node.extend([first, *others])


def file_facts(bundle: Bundle) -> dict[str, str]:
    """Facts that an exported file records about itself: classes, pixel specification, and which bundle it was made of."""
    return {
        "classes": to_json(list(bundle.labels.classes)),
        "labels": to_json(bundle.labels.to_dict()),
        "pixels": to_json(bundle.pixels.to_dict()),
        "bundle": bundle.digest,
        **{name: repr(value) for name, value in bundle.scaling().items()},
        "arch": str(bundle.arch.get("arch")),
    }


def graph_facts(path: Path, bundle: Bundle, batch: int | None) -> dict[str, Any]:
    """Operator set, inputs and outputs for meta.json, read back from the file."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False)
    side, channels, rows = bundle.pixels.size, bundle.pixels.channels, batch or "batch"
    return {
        "opset": next(int(entry.version) for entry in graph.opset_import if entry.domain in _DOMAINS),
        "batch": batch,
        "input": {"name": "pixels", "dtype": "uint8", "shape": [rows, side, side, channels]},
        "output": {"name": "scores", "dtype": "float32", "shape": [rows, bundle.labels.size]},
    }


def verify_graph(
    path: Path, bundle: Bundle, batches: Iterable[np.ndarray], precision: str, max_score_diff: float
) -> dict[str, Any]:
    """Score real images with the file and with torch.

    No ONNX runtime on a CPU takes bfloat16, so that a small graph is judged by ONNX's reference evaluator, and of a large one
    only the structure is: `verified` holds which.

    Returns:
        verified ("onnxruntime", "reference" or "structure-only") and comparison (a dict, or None).

    Raises:
        ExportError: E001 without images; GateFailed: E901 when the scores differ.
    """
    reference = TorchEngine(
        load_model(bundle), bundle.labels, bundle.pixels, temperature=bundle.temperatures, thresholds=bundle.thresholds
    )  # in float32, whatever the file is in
    if precision != "bf16":
        engine: Engine = OnnxEngine(path, bundle.labels, bundle.pixels)
        how, runtime = "onnxruntime", "ONNX Runtime"
    elif _small(path, bundle):
        engine, how, runtime = _ReferenceEngine(path, bundle), "reference", "ONNX's reference evaluator"
        batches = [next(iter(batches))[:_REFERENCE_IMAGES]]
    else:
        return {"verified": STRUCTURE_ONLY, "comparison": None}
    result = compare_engines(reference, engine, batches, margin=clear_margin(precision))
    engine.close()
    judge_comparison(result, precision, max_score_diff, runtime)
    return {"verified": how, "comparison": result.to_dict()}


def _small(path: Path, bundle: Bundle) -> bool:
    weights = path.stat().st_size // DTYPES["bf16"].itemsize
    return weights <= _REFERENCE_WEIGHTS and bundle.pixels.size <= _REFERENCE_SIDE


class _ReferenceEngine:
    """ONNX's reference evaluator as an Engine: slow, and exact about types that runtimes do not have."""

    thread_safe, runtime, precision, max_batch, thresholds = False, "reference", "bf16", 1024, None

    def __init__(self, path: Path, bundle: Bundle) -> None:
        from onnx.reference import ReferenceEvaluator

        self.labels, self.pixels = bundle.labels, bundle.pixels
        self._evaluator: Any = ReferenceEvaluator(str(path))

    def scores(self, pixels: Any) -> np.ndarray:
        return np.asarray(self._evaluator.run(["scores"], {"pixels": np.ascontiguousarray(pixels)})[0], np.float32)

    def warmup(self, n: int) -> None:
        return None  # nothing to compile

    def close(self) -> None:
        self._evaluator = None
