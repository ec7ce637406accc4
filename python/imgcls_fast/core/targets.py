"""The words for exports: what a model is exported to, in which precision, and which runtime opens which file.

Apart from `exports`, because help lists them: with `exports` it would import hashing, locks and signatures (70 ms become 84).
"""

from __future__ import annotations

TARGETS = {  # name -> what the file is
    "onnx": "an ONNX file (the default)",
    "trt": "a TensorRT engine",
    "pt2": "a program of torch.export",
    "aoti": "a package compiled by AOTInductor, for this kind of machine",
    "torchscript": "a TorchScript file; deprecated by PyTorch",
    "triton": "a model repository for Triton Inference Server",
}
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
RUNTIMES = ("auto", "torch", "compile", "aoti", "onnx", "openvino", "trt")
READS = {
    "aoti": "aoti",
    "onnx": "onnx",
    "openvino": "onnx",
    "trt": "trt",
}  # runtime -> target of the export that it opens
