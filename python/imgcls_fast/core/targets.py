"""What a model is exported to, in which precision and how; and which runtime opens which file. It imports nothing.

Apart from `exports`, because help lists these words: with `exports` it would import hashing, locks and signatures (70 ms become
84). A new target is one entry of `TARGETS`: flag, help, errors, endings and trust are read from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
RUNTIMES = ("auto", "torch", "compile", "aoti", "onnx", "openvino", "trt")
READS = {"aoti": "aoti", "onnx": "onnx", "openvino": "onnx", "trt": "trt"}  # runtime -> target of the export that it opens


class Way(NamedTuple):
    """How one target is made in one precision. Code asks these fields; no code compares names of precisions.

    Attributes:
        target, precision: the names, as in names of folders.
        reduced: the numbers are not those of FP32, so that small differences from torch are allowed.
        judged: the gate judges it on labelled rows.
        quantized: ranges are calibrated, and a share of the gate rows serves the search for layers that INT8 harms.
        proven: it is refused unless the gate passes it; otherwise only a failure or a budget that was asked for refuses it.
        rescued: layers whose values leave the range of the type keep FP32 (AutoCast).
        stand_in: PyTorch computes its scores, because no ONNX runtime on a CPU takes the type.
        default: index.json names it for its target, whatever the precision.
        milder: the precision to try where it loses too much; empty: none.
    """

    target: str = ""
    precision: str = ""
    reduced: bool = True
    judged: bool = True
    quantized: bool = False
    proven: bool = False
    rescued: bool = False
    stand_in: bool = False
    default: bool = True
    milder: str = "fp32"


class Target(NamedTuple):
    """One kind of file that a model is exported to.

    Attributes:
        help: help of its flag.
        maker: "module:function" in exporting/; it takes `materials.Materials` and a `Way`, and returns the Export.
        ways: precision -> how.
        usual: the precision where none is asked for.
        endings: endings of a copy of its file, the usual one first; empty: a folder.
        native: opening it runs code out of it, so that its maker must be known.
    """

    help: str
    maker: str
    ways: Mapping[str, Way]
    usual: str = "fp32"
    endings: tuple[str, ...] = ()
    native: bool = False


_GRAPHS = {
    "fp32": Way(reduced=False, judged=False, milder=""),
    "fp16": Way(rescued=True),
    "bf16": Way(stand_in=True),
    "int8": Way(quantized=True, proven=True, milder="fp16"),
}
_ON_CPUS = {**_GRAPHS, "bf16": Way(stand_in=True, default=False)}
_PROGRAMS = {"fp32": Way(reduced=False, judged=False, milder=""), "fp16": Way(judged=False), "bf16": Way(judged=False)}

TARGETS: dict[str, Target] = {
    "onnx": Target("an ONNX file (the default)", "onnx_export:export", _ON_CPUS, endings=(".onnx",)),
    "trt": Target(
        "a TensorRT engine", "trt_export:export", _GRAPHS, "fp16", endings=(".plan", ".engine", ".trt"), native=True
    ),
    "pt2": Target("a program of torch.export", "programs:export", _PROGRAMS, endings=(".pt2",)),
    "aoti": Target(
        "a package compiled by AOTInductor, for this kind of machine",
        "programs:export",
        _PROGRAMS,
        endings=(".pt2",),
        native=True,
    ),
    "torchscript": Target(
        "a TorchScript file; deprecated by PyTorch", "programs:export", _PROGRAMS, endings=(".pt", ".ts")
    ),
    "triton": Target("a model repository for Triton Inference Server", "triton:export", _GRAPHS),
}
