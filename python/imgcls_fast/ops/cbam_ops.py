"""The ops of CBAM: schemas, shapes, and the call of the compiled half. `cbam` holds the function and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import DTYPES, EXTENSION, LIBRARY, describe, on_device_of, require, where_to_run

MAX_KERNEL = 7  # kCbamKernelMax in csrc/cpu/cbam.h; also of the GPU half
NHWC = torch.channels_last
_MAPS, _APPLY, _BOTH = 1, 2, 3  # CbamSteps in csrc/cbam.h

_PARAMETERS = "Tensor w1, Tensor w2, Tensor conv_weight"
_KEPT = "Tensor channel, Tensor hidden_sums, Tensor spatial"
_SCHEMAS = {
    "cbam": f"(Tensor x, {_PARAMETERS}, Tensor? affine, Tensor? residual, bool relu)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "cbam_maps": f"(Tensor x, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)",
    "cbam_apply": "(Tensor x, Tensor channel, Tensor spatial, Tensor? affine, Tensor? residual, bool relu) -> Tensor",
    "cbam_grad": f"(Tensor grad, Tensor x, Tensor? out, {_PARAMETERS}, Tensor? affine, {_KEPT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cbam_apply_grad": "(Tensor grad, Tensor x, Tensor? out, Tensor channel, Tensor spatial, Tensor? affine)"
    " -> (Tensor, Tensor, Tensor)",
    "cbam_maps_grad": f"(Tensor grad, Tensor x, {_PARAMETERS}, Tensor? affine, {_KEPT}, Tensor dlogits, Tensor ties)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
}


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _image(like: Tensor) -> Tensor:
    require(like.dim() == 4, f"x must be (N, C, H, W), got {describe(like)}")
    return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=NHWC)


def _kept(x: Tensor, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """channel (N, 3, C), hidden_sums (N, 2, R), spatial (N, 3, H, W) of csrc/cbam.h, without values."""
    require(x.dim() == 4, f"x must be (N, C, H, W), got {describe(x)}")
    n, c, h, w = x.shape
    return _floats(x, n, 3, c), _floats(x, n, 2, hidden), _floats(x, n, 3, h, w)


def _weights(x: Tensor, hidden: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three parameters, without values."""
    return _floats(x, hidden, x.shape[1]), _floats(x, x.shape[1], hidden), _floats(x, 1, 2, size, size)


def _positions(x: Tensor) -> Tensor:
    return _floats(x, x.shape[0], x.shape[2], x.shape[3])


def _masked(grad: Tensor, out: Tensor | None) -> Tensor:
    """Room for the gradient behind the ReLU; none is needed where there is no ReLU, and then the gradient itself is it."""
    return _image(grad) if out is not None else torch.empty(0, dtype=grad.dtype, device=grad.device)


def _fake_cbam(x: Tensor, w1: Tensor, w2: Tensor, conv_weight: Tensor, affine: Any, residual: Any, relu: bool) -> Any:
    return _image(x), *_kept(x, w1.shape[0])


def _fake_maps(x: Tensor, w1: Tensor, w2: Tensor, conv_weight: Tensor) -> Any:
    return _kept(x, w1.shape[0])


def _fake_apply(x: Tensor, channel: Tensor, spatial: Tensor, affine: Any, residual: Any, relu: bool) -> Any:
    return _image(x)


def _fake_grad(grad: Tensor, x: Tensor, out: Tensor | None, w1: Tensor, w2: Tensor, conv: Tensor, *_: Any) -> Any:
    weights = _weights(x, w1.shape[0], conv.shape[-1])
    return _image(x), _masked(grad, out), *weights, _floats(x, 2)


def _fake_apply_grad(grad: Tensor, x: Tensor, out: Tensor | None, *_: Any) -> Any:
    return _masked(grad, out), _positions(x), _positions(x)


def _fake_maps_grad(grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, conv_weight: Tensor, *_: Any) -> Any:
    return _image(x), *_weights(x, w1.shape[0], conv_weight.shape[-1])


def _cbam(
    x: Tensor, w1: Tensor, w2: Tensor, conv_weight: Tensor, affine: Tensor | None, residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, kept = _image(x), _kept(x, _hidden(w1))
    _launch(_BOTH, x, (w1, w2, conv_weight), affine, kept, relu, out=out, residual=residual)
    return out, *kept


def _cbam_maps(x: Tensor, w1: Tensor, w2: Tensor, conv_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kept = _kept(x, _hidden(w1))
    _launch(_MAPS, x, (w1, w2, conv_weight), None, kept, False)
    return kept


def _cbam_apply(
    x: Tensor, channel: Tensor, spatial: Tensor, affine: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    out = _image(x)
    _launch(_APPLY, x, None, affine, (channel, None, spatial), relu, out=out, residual=residual)
    return out


def _cbam_grad(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    conv_weight: Tensor,
    affine: Tensor | None,
    channel: Tensor,
    hidden_sums: Tensor,
    spatial: Tensor,
) -> tuple[Tensor, ...]:
    dx, masked, weights, daffine = _image(x), _masked(grad, out), _weights(x, *_sizes(w1, conv_weight)), _floats(x, 2)
    made = _gradients(dx, weights, daffine, _positions(x), _positions(x), masked)
    kept = channel, hidden_sums, spatial
    _launch(_BOTH, x, (w1, w2, conv_weight), affine, kept, out is not None, out=out, grad=grad, gradients=made)
    return dx, masked, *weights, daffine


def _cbam_apply_grad(
    grad: Tensor, x: Tensor, out: Tensor | None, channel: Tensor, spatial: Tensor, affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    masked, dlogits, ties = _masked(grad, out), _positions(x), _positions(x)
    made = _gradients(None, (None, None, None), None, dlogits, ties, masked)
    kept = channel, None, spatial
    _launch(_APPLY, x, None, affine, kept, out is not None, out=out, grad=grad, gradients=made)
    return masked, dlogits, ties


def _cbam_maps_grad(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    conv_weight: Tensor,
    affine: Tensor | None,
    channel: Tensor,
    hidden_sums: Tensor,
    spatial: Tensor,
    dlogits: Tensor,
    ties: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, weights = _image(x), _weights(x, *_sizes(w1, conv_weight))
    shape = (x.shape[0], *x.shape[2:])
    given = (_exact("dlogits", dlogits, shape, x), _exact("ties", ties, shape, x))
    made = _gradients(dx, weights, None, *given, None)
    _launch(_MAPS, x, (w1, w2, conv_weight), affine, (channel, hidden_sums, spatial), False, grad=grad, gradients=made)
    return dx, *weights


def _sizes(w1: Tensor, conv_weight: Tensor) -> tuple[int, int]:
    require(conv_weight.dim() == 4, f"conv_weight must be (1, 2, K, K), got {describe(conv_weight)}")
    return _hidden(w1), conv_weight.shape[-1]


def _hidden(w1: Tensor) -> int:
    require(w1.dim() == 2, f"w1 must be (R, C), got {describe(w1)}")
    return w1.shape[0]


def _gradients(
    dx: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    daffine: Tensor | None,
    dlogits: Tensor,
    ties: Tensor,
    masked: Tensor | None,
) -> dict[str, Tensor | None]:
    dw1, dw2, dconv = weights
    return {
        "dx": dx,
        "dw1": dw1,
        "dw2": dw2,
        "dconv": dconv,
        "daffine": daffine,
        "dlogits": dlogits,
        "ties": ties,
        "masked": masked,
    }


def _exact(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """A float32 operand of an op, contiguous; ops may be called by name, so they look at what they get, too."""
    fits = tuple(tensor.shape) == shape and tensor.dtype == torch.float32 and tensor.device == x.device
    require(fits, f"{name} must be {shape} float32 on {x.device}, got {describe(tensor)}")
    return tensor.contiguous()


def _like_x(name: str, tensor: Tensor | None, x: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    fits = tensor.shape == x.shape and tensor.dtype == x.dtype and tensor.device == x.device
    require(fits, f"{name} must be as x, {describe(x)}, got {describe(tensor)}")
    return tensor.contiguous(memory_format=NHWC)


def _launch(
    steps: int,
    x: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor] | None,
    affine: Tensor | None,
    kept: tuple[Tensor, Tensor | None, Tensor],
    relu: bool,
    *,
    out: Tensor | None = None,
    residual: Tensor | None = None,
    grad: Tensor | None = None,
    gradients: dict[str, Tensor | None] | None = None,
) -> None:
    """Check the operands of an op and run the compiled half on them."""
    require(x.dtype in DTYPES, f"x must be float32, float16 or bfloat16, got {describe(x)}")
    n, c, h, w = x.shape
    require(min(c, h, w) >= 1, f"x must be (N, C, H, W) with C, H, W >= 1, got {describe(x)}")
    hidden, size = 1, 1
    operands: dict[str, Tensor | None] = {"w1": None, "w2": None, "conv": None}
    if parameters is not None:
        w1, w2, conv = parameters
        hidden, size = _sizes(w1, conv)
        require(hidden >= 1, f"w1 must be (R, {c}) with R >= 1, got {describe(w1)}")
        odd = size % 2 == 1 and size <= MAX_KERNEL
        require(odd, f"conv_weight must be (1, 2, K, K) with K odd and at most {MAX_KERNEL}, got {describe(conv)}")
        operands["w1"] = _exact("w1", w1, (hidden, c), x)
        operands["w2"] = _exact("w2", w2, (c, hidden), x)
        operands["conv"] = _exact("conv_weight", conv, (1, 2, size, size), x)
    channel, hidden_sums, spatial = kept
    operands["affine"] = None if affine is None else _exact("affine", affine, (2,), x)
    operands["channel"] = _exact("channel", channel, (n, 3, c), x)
    operands["hidden_sums"] = None if hidden_sums is None else _exact("hidden_sums", hidden_sums, (n, 2, hidden), x)
    operands["spatial"] = _exact("spatial", spatial, (n, 3, h, w), x)
    operands["x"], operands["out"] = _like_x("x", x, x), _like_x("out", out, x)
    sizes, dtype = (n, c, h, w, hidden, size), DTYPES[x.dtype]
    if gradients is None:
        operands["residual"] = _like_x("residual", residual, x)
    else:
        operands |= gradients
        operands["grad"] = _like_x("grad", grad, x)
    half = EXTENSION
    launcher = half.cbam if gradients is None else half.cbam_grad
    if x.device.type == "cuda":
        floats = EXTENSION.cbam_scratch(sizes=sizes, dtype=dtype, gradient=gradients is not None)
        operands["scratch"] = _floats(x, floats)
    else:
        operands["scratch"] = None
    addresses = {name: 0 if operand is None else operand.data_ptr() for name, operand in operands.items()}
    with on_device_of(x):
        launcher(
            **addresses,
            sizes=sizes,
            relu=relu,
            dtype=dtype,
            steps=steps,
            **where_to_run(x),
        )


_RUN: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cbam": (_cbam, _fake_cbam),
    "cbam_maps": (_cbam_maps, _fake_maps),
    "cbam_apply": (_cbam_apply, _fake_apply),
    "cbam_grad": (_cbam_grad, _fake_grad),
    "cbam_apply_grad": (_cbam_apply_grad, _fake_apply_grad),
    "cbam_maps_grad": (_cbam_maps_grad, _fake_maps_grad),
}
for _name, (_implementation, _fake) in _RUN.items():
    LIBRARY.define(_name + _SCHEMAS[_name], tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _implementation, _key)
    torch.library.register_fake(f"imgcls::{_name}", _fake, lib=LIBRARY)
