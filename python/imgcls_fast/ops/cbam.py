"""CBAM, convolutional block attention with a residual sum and ReLU behind it: kernel, fallback and formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .cbam_ops import MAX_KERNEL, NHWC
from .library import DTYPES, EXTENSION, autocast_dtype, cuda_missing, describe, require

_CUDA_MISSING = cuda_missing()  # asked here: torch.compile does not trace into the compiled half


def cbam(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    conv_weight: Tensor,
    norm: torch.nn.Module | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    kernel: bool | None = None,
) -> Tensor:
    """Weigh the channels of each image, then its positions; add a residual and take the ReLU if asked.

    One call stands for two poolings, the shared two-layer perceptron, two sigmoids, two products, a convolution of two maps
    into one, its normalisation, the sum and the ReLU. Without a training norm an image is read from memory once.

    Args:
        x: (N, C, H, W) float32, float16, bfloat16 (or float64, by the formula). Another memory format than channels-last
            costs one copy.
        w1: (R, C), first layer of the perceptron, without bias. Used in float32, as are the other parameters.
        w2: (C, R), second layer.
        conv_weight: (1, 2, K, K), K odd: weights of the mean and of the maximum over the channels; padding K // 2.
        norm: `torch.nn.BatchNorm2d` of one channel behind the convolution, or None. In training it uses the statistics
            of the batch and updates its running ones, as the module does.
        residual: as `x`, added to the result. A wider dtype than that of `x` widens both.
        relu: whether negative results become 0.
        kernel: True takes the kernel or raises, False never does, None takes it where it is known to be faster.

    Returns:
        (N, C, H, W) channels-last, dtype and device of `x` (or of a wider `residual`). Deterministic, with gradients for
        every tensor; equal maxima share theirs, as in `torch.amax`. No second derivative.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or `kernel=True` where no kernel takes the inputs.

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018, equations 1 to 3.
    """
    _check(x, w1, w2, conv_weight, norm, residual)
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    why = cbam_refusal(x, conv_weight, norm)
    if kernel and why and not torch.compiler.is_exporting():
        raise ValueError(f"no kernel for this CBAM: {why}")
    if why or kernel is False or (kernel is None and not known_faster(x)):
        return _fallback(x, w1, w2, conv_weight, norm, residual, relu)
    x = x.contiguous(memory_format=NHWC)
    residual = None if residual is None else residual.contiguous(memory_format=NHWC)
    parameters = w1.float().contiguous(), w2.float().contiguous(), conv_weight.float().contiguous()
    if norm is not None and _uses_batch(norm):
        return _run_training(x, *parameters, norm, residual, relu)
    affine = None if norm is None else _affine_in_eval(norm)
    given = (x, *parameters, affine, residual)
    needs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    out: Tensor = _Cbam.apply(*given, relu) if needs else torch.ops.imgcls.cbam(*given, relu)[0]
    return out


def known_faster(x: Tensor) -> bool:
    """Whether a benchmark of ours (benchmarks/results, `ops.json`) has shown the kernel to beat PyTorch's best on such maps."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def cbam_refusal(x: Tensor, conv_weight: Tensor, norm: torch.nn.Module | None = None) -> str | None:
    """Why `cbam` takes the formula for these inputs, as one sentence; None when a kernel takes them. Reads no memory."""
    if torch.compiler.is_exporting():
        return "exported graphs hold standard operators only"
    if EXTENSION is None:
        return _CUDA_MISSING
    if x.dtype not in DTYPES:
        return f"{str(x.dtype).removeprefix('torch.')} has no kernel"
    if x.device.type not in ("cpu", "cuda"):
        return f"there are no kernels for {x.device.type}"
    if x.device.type == "cuda" and _CUDA_MISSING:
        return _CUDA_MISSING
    size = conv_weight.shape[-1]
    if size > MAX_KERNEL:
        return f"a convolution of {size} x {size}; the kernel takes up to {MAX_KERNEL}"
    if norm is not None and type(norm) is not torch.nn.BatchNorm2d:
        return f"{type(norm).__name__} between convolution and gate; the kernel takes BatchNorm2d"
    return None


def _check(
    x: Tensor, w1: Tensor, w2: Tensor, conv_weight: Tensor, norm: torch.nn.Module | None, residual: Tensor | None
) -> None:
    """The one check of everything that a caller passes."""
    given = {"x": x, "w1": w1, "w2": w2, "conv_weight": conv_weight}
    if residual is not None:
        given["residual"] = residual
    for name, tensor in given.items():
        require(isinstance(tensor, Tensor), f"{name} must be a tensor, got {type(tensor).__name__}")
        allowed = (*DTYPES, torch.float64)
        require(
            tensor.dtype in allowed, f"{name} must be float32, float16, bfloat16 or float64, got {describe(tensor)}"
        )
        require(tensor.device == x.device, f"{name} must be on {x.device} as x is, got {describe(tensor)}")
        require(tensor.layout == torch.strided, f"{name} must be a dense tensor, got {tensor.layout}")
    require(x.dim() == 4 and min(x.shape[1:]) >= 1, f"x must be (N, C, H, W) with C, H, W >= 1, got {describe(x)}")
    channels = x.shape[1]
    fits = w1.dim() == 2 and w1.shape[0] >= 1 and w1.shape[1] == channels
    require(fits, f"w1 must be (R, C) with R >= 1 and C = {channels} as x has, got {describe(w1)}")
    hidden = w1.shape[0]
    require(tuple(w2.shape) == (channels, hidden), f"w2 must be ({channels}, {hidden}), got {describe(w2)}")
    size = conv_weight.shape[-1] if conv_weight.dim() == 4 else 0
    fits = size % 2 == 1 and tuple(conv_weight.shape) == (1, 2, size, size)
    require(fits, f"conv_weight must be (1, 2, K, K) with K odd, got {describe(conv_weight)}")
    if residual is not None:
        same = residual.shape == x.shape
        require(same, f"residual must have the shape of x, {tuple(x.shape)}, got {describe(residual)}")
    if norm is not None:
        require(isinstance(norm, torch.nn.Module), f"norm must be a module or None, got {type(norm).__name__}")
        one = getattr(norm, "num_features", 1) == 1
        require(one, f"norm must be of 1 channel, got num_features {getattr(norm, 'num_features', None)}")


# --- formula ----------------------------------------------------------------------------------------------------------


def cbam_formula(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    conv_weight: Tensor,
    norm: Callable[[Tensor], Tensor] | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`cbam` in plain PyTorch with standard operators, in the dtype of its arguments: the oracle, and what export traces."""

    def perceptron(pooled: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(pooled, w1)), w2)

    gate = torch.sigmoid(perceptron(x.mean((2, 3))) + perceptron(x.amax((2, 3))))
    y = x * gate[:, :, None, None]
    maps = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
    logits = F.conv2d(maps, conv_weight, padding=conv_weight.shape[-1] // 2)
    if norm is not None:
        logits = norm(logits)
    out = y * torch.sigmoid(logits)
    if residual is not None:
        out = out + residual
    return F.relu(out) if relu else out


def _fallback(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    conv_weight: Tensor,
    norm: torch.nn.Module | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """The formula in the wider one of the dtypes of `x` and the parameters, outside of autocast."""
    wide = torch.promote_types(x.dtype, w1.dtype)
    given = x.to(wide), w1.to(wide), w2.to(wide), conv_weight.to(wide)
    other = None if residual is None else residual.to(wide)
    if autocast_dtype(x) is None:  # asked, because an exported graph would hold the context
        return cbam_formula(*given, norm, other, relu).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return cbam_formula(*given, norm, other, relu).to(x.dtype)


# --- batch normalisation of one channel -------------------------------------------------------------------------------


def _uses_batch(norm: Any) -> bool:
    return norm.training or norm.running_mean is None


def _affine_in_eval(norm: Any) -> Tensor:
    """(2,) float32: a, b of `a * logits + b`, with gradients for the weight and bias of the norm."""
    a = torch.rsqrt(norm.running_var.float() + norm.eps)
    if norm.affine:
        a = a * norm.weight.float()
    b = -a * norm.running_mean.float()
    return torch.cat([a, b + norm.bias.float() if norm.affine else b])


def _run_training(
    x: Tensor, w1: Tensor, w2: Tensor, conv_weight: Tensor, norm: Any, residual: Tensor | None, relu: bool
) -> Tensor:
    count = x.shape[0] * x.shape[2] * x.shape[3]
    require(count != 1, "a norm in training needs more than one position in the batch, got x with N = H = W = 1")
    weight, bias = (norm.weight.float(), norm.bias.float()) if norm.affine else (None, None)
    out, mean, variance = _CbamTraining.apply(x, w1, w2, conv_weight, weight, bias, residual, relu, norm.eps)
    if count and norm.training and norm.track_running_stats and norm.running_mean is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            share = norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked
            unbiased = variance * (count / (count - 1))
            norm.running_mean.mul_(1 - share).add_(mean * share)
            norm.running_var.mul_(1 - share).add_(unbiased * share)
    result: Tensor = out
    return result


# --- gradient ---------------------------------------------------------------------------------------------------------


class _Cbam(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        conv_weight: Tensor,
        affine: Tensor | None,
        residual: Tensor | None,
        relu: bool,
    ) -> Tensor:
        out, channel, hidden_sums, spatial = torch.ops.imgcls.cbam(x, w1, w2, conv_weight, affine, residual, relu)
        ctx.save_for_backward(x, out if relu else None, w1, w2, conv_weight, affine, channel, hidden_sums, spatial)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous(memory_format=NHWC)
        dx, masked, dw1, dw2, dconv, daffine = torch.ops.imgcls.cbam_grad(grad, *ctx.saved_tensors)
        residual = None if not ctx.needs_input_grad[5] else grad if ctx.saved_tensors[1] is None else masked
        return dx, dw1, dw2, dconv, daffine if ctx.needs_input_grad[4] else None, residual, None


class _CbamTraining(torch.autograd.Function):
    """With the statistics of the batch, which couple its images: the two halves apart."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        channel, hidden_sums, spatial = torch.ops.imgcls.cbam_maps(x, w1, w2, conv_weight)
        variance, mean = torch.var_mean(spatial[:, 2], correction=0)
        inverse = torch.rsqrt(variance + eps).reshape(1)
        a = inverse if weight is None else inverse * weight
        affine = torch.cat([a, -a * mean if bias is None else bias - a * mean])
        out = torch.ops.imgcls.cbam_apply(x, channel, spatial, affine, residual, relu)
        ctx.save_for_backward(
            x, out if relu else None, w1, w2, conv_weight, affine, channel, hidden_sums, spatial, mean, inverse
        )
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _mean: Tensor, _variance: Tensor) -> tuple[Tensor | None, ...]:
        x, out, w1, w2, conv_weight, affine, channel, hidden_sums, spatial, mean, inverse = ctx.saved_tensors
        grad = grad.contiguous(memory_format=NHWC)
        masked, dnormed, ties = torch.ops.imgcls.cbam_apply_grad(grad, x, out, channel, spatial, affine)
        behind = grad if out is None else masked
        # Ioffe and Szegedy 2015, the chain rule of section 3 for one channel
        normed = (spatial[:, 2] - mean) * inverse
        dbias, dweight = dnormed.sum().reshape(1), (dnormed * normed).sum().reshape(1)
        count = max(normed.numel(), 1)
        dlogits = affine[0] * (dnormed - dbias / count - normed * (dweight / count))
        dx, dw1, dw2, dconv = torch.ops.imgcls.cbam_maps_grad(
            behind, x, w1, w2, conv_weight, affine, channel, hidden_sums, spatial, dlogits, ties
        )
        asked = zip(ctx.needs_input_grad[4:7], (dweight, dbias, behind), strict=True)
        rest = (found if wanted else None for wanted, found in asked)
        return (dx, dw1, dw2, dconv, *rest, None, None)
