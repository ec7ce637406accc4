"""Attention inside windows of an image, and inside whole short sequences: kernel, fallback and formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .library import (
    DTYPES,
    EXTENSION,
    LIBRARY,
    autocast_dtype,
    cuda_missing,
    describe,
    on_device_of,
    require,
    where_to_run,
)

MAX_TOKENS = 1024  # of one window, on the CPU; the GPU kernels say themselves what fits (`window_attention_refusal`)
MAX_HEAD_DIM = 128
MASK_VALUE = -100.0  # Swin's: finite, so that no row is ever masked as a whole
_ALIGNMENT = 16  # bytes that one load of the GPU kernels takes
_SHORTEST = 1e-12  # of a query or key, as in torch.nn.functional.normalize

# cuDNN reads a float32 mask as bfloat16 and has given NaN gradients with a mask, so it never gets one.
_MASK_SAFE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Layout:
    """How tokens of an image form windows.

    Args:
        heads: number of heads.
        window: height and width in tokens; both divide the image.
        shift: cyclic shift of Swin, rows and columns, 0 <= shift < window.
        grid: windows of MaxViT's grid: tokens lie image / window apart. Not with a shift.
        scale: of the logits, without `head_scale`.
        mask_value: added to logits between tokens that the shift brought together.
    """

    heads: int
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    grid: bool = False
    scale: float = 1.0
    mask_value: float = MASK_VALUE

    @property
    def tokens(self) -> int:
        """N, of one window."""
        return self.window[0] * self.window[1]


def window_attention(
    qkv: Tensor,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    *,
    bias: Tensor | None = None,
    head_scale: Tensor | None = None,
    scale: float | None = None,
    grid: bool = False,
    mask_value: float = MASK_VALUE,
    kernel: bool | None = None,
) -> Tensor:
    """Multi-head attention inside (shifted) windows, straight from the qkv layer's output in image order.

    One call stands for roll, partition, softmax(q k^T * scale + bias + mask) v, reverse and roll back.

    Args:
        qkv: (B, H, W, 3 * C) float32, float16, bfloat16 (or float64, by the formula); q, k, v side by side, each
            (heads, C / heads). Made contiguous if it is not. float32 becomes autocast's type under autocast.
        heads: number of heads; divides C.
        window: (wh, ww) tokens; divides (H, W). N = wh * ww.
        shift: cyclic shift in tokens, smaller than the window; tokens of different regions are masked from each other.
        bias: (heads, N, N) added to the logits, trainable; used in float32.
        head_scale: (heads,) or (heads, 1, 1): cosine logits of Swin V2, `head_scale * cos(q, k)`; used in float32.
        scale: of the logits; default 1 / sqrt(C / heads). Not with `head_scale`.
        grid: MaxViT's grid attention: a window holds tokens that lie H / wh and W / ww apart.
        mask_value: added to masked logits.
        kernel: True takes the kernel or raises, False never does, None takes it where it is known to be faster.

    Returns:
        (B, H, W, C), dtype and device of `qkv`. Deterministic, with gradients for `qkv`, `bias` and `head_scale`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or `kernel=True` where no kernel takes the inputs.

    Source: Liu et al., "Swin Transformer", ICCV 2021, equations 2 to 4; Liu et al., "Swin Transformer V2", CVPR 2022,
    equation 2; Tu et al., "MaxViT", ECCV 2022, section 3.2.
    """
    if qkv.dtype == torch.float32:
        qkv = qkv.to(autocast_dtype(qkv) or torch.float32)
    layout = _checked(qkv, heads, window, shift, bias, head_scale, scale, grid, mask_value)
    bias = None if bias is None else bias.float() if qkv.dtype != torch.float64 else bias
    if head_scale is not None:
        head_scale = head_scale.reshape(heads)
        head_scale = head_scale if qkv.dtype == torch.float64 else head_scale.float()
    if torch.compiler.is_exporting():  # exported graphs hold standard operators only
        return window_attention_formula(qkv, layout, bias, head_scale)
    if kernel is not False:
        head_dim = qkv.shape[3] // (3 * heads)
        why = refusal(qkv, layout, bias is not None, head_scale is not None)
        if kernel and why:
            raise ValueError(f"no kernel for this attention: {why}")
        if not why and (kernel or known_faster(qkv.device.type, layout, head_dim, bias is not None)):
            return _run(qkv, layout, bias, head_scale)
    return _fallback(qkv, layout, bias, head_scale)


def sequence_attention(
    qkv: Tensor, heads: int, *, bias: Tensor | None = None, scale: float | None = None, kernel: bool | None = None
) -> Tensor:
    """Multi-head attention over a whole short sequence (Dosovitskiy et al., ViT, ICLR 2021): one window of one row.

    Args:
        qkv: (B, N, 3 * C), as for `window_attention`.
        heads, bias, scale, kernel: as for `window_attention`; `bias` is (heads, N, N).

    Returns:
        (B, N, C).

    Raises:
        ValueError: as `window_attention`.
    """
    require(qkv.dim() == 3, f"qkv must be (B, N, 3 * C), got {describe(qkv)}")
    window = (1, qkv.shape[1])
    return window_attention(qkv.unsqueeze(1), heads, window, bias=bias, scale=scale, kernel=kernel).squeeze(1)


def known_faster(device: str, layout: Layout, head_dim: int, has_bias: bool) -> bool:
    """Whether a benchmark of ours (benchmarks/results, `ops.json`) has shown the kernel to beat PyTorch's best at this."""
    return device == "cpu" and has_bias and layout.tokens <= 64 and head_dim <= 32


def _checked(
    qkv: Tensor,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    bias: Tensor | None,
    head_scale: Tensor | None,
    scale: float | None,
    grid: bool,
    mask_value: float,
) -> Layout:
    """The one check of everything that a caller passes."""
    require(qkv.dim() == 4, f"qkv must be (B, H, W, 3 * C), got {describe(qkv)}")
    allowed = (*DTYPES, torch.float64)
    require(qkv.dtype in allowed, f"qkv must be float32, float16, bfloat16 or float64, got {describe(qkv)}")
    require(isinstance(heads, int) and heads >= 1, f"heads must be a whole number from 1, got {heads!r}")
    _, height, width, channels = qkv.shape
    require(
        channels > 0 and channels % (3 * heads) == 0,
        f"the last size of qkv must be 3 * heads * head_dim with heads {heads}, got {describe(qkv)}",
    )
    for name, pair in (("window", window), ("shift", shift)):
        require(len(pair) == 2, f"{name} must be two numbers (rows, columns), got {pair!r}")
    wh, ww = window
    require(wh >= 1 and ww >= 1, f"window must be at least 1 x 1, got {wh} x {ww}")
    require(height >= 1 and width >= 1, f"qkv has no tokens: {describe(qkv)}")
    require(
        height % wh == 0 and width % ww == 0,
        f"windows of {wh} x {ww} do not divide the image of {height} x {width} tokens",
    )
    require(0 <= shift[0] < wh and 0 <= shift[1] < ww, f"shift must be in 0 <= shift < window, got {shift} of {window}")
    require(not (grid and any(shift)), "grid attention has no shift")
    tokens = wh * ww
    if bias is not None:
        fits = tuple(bias.shape) == (heads, tokens, tokens) and bias.is_floating_point()
        require(fits, f"bias must be floats of ({heads}, {tokens}, {tokens}), got {describe(bias)}")
        require(bias.device == qkv.device, f"bias and qkv must be on one device, got {bias.device} and {qkv.device}")
    if head_scale is not None:
        fits = head_scale.numel() == heads and head_scale.is_floating_point()
        require(fits, f"head_scale must be {heads} floats, got {describe(head_scale)}")
        require(head_scale.device == qkv.device, f"head_scale and qkv must be on one device, got {head_scale.device}")
        require(scale is None, "scale and head_scale exclude each other")
    own = (channels // (3 * heads)) ** -0.5 if scale is None else float(scale)
    return Layout(heads, (wh, ww), (shift[0], shift[1]), grid, own, mask_value)


# --- formula ----------------------------------------------------------------------------------------------------------


def window_attention_formula(
    qkv: Tensor, layout: Layout, bias: Tensor | None = None, head_scale: Tensor | None = None
) -> Tensor:
    """`window_attention` in plain PyTorch with standard operators: the oracle of the tests, and what export traces."""
    q, k, v = split_windows(qkv, layout)
    if head_scale is not None:
        q = (
            F.normalize(q.float(), dim=-1, eps=_SHORTEST).to(q.dtype)
            if q.dtype != torch.float64
            else F.normalize(q, dim=-1)
        )
        k = (
            F.normalize(k.float(), dim=-1, eps=_SHORTEST).to(k.dtype)
            if k.dtype != torch.float64
            else F.normalize(k, dim=-1)
        )
        logits = (q @ k.transpose(-2, -1)) * head_scale.view(-1, 1, 1)
    else:
        logits = (q * layout.scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    if any(layout.shift):
        mask = shift_mask(qkv.shape[1], qkv.shape[2], layout, qkv.device)
        logits = logits + mask.to(logits.dtype).unsqueeze(1)
    return merge_windows(logits.softmax(-1).to(v.dtype) @ v, qkv.shape[1], qkv.shape[2], layout)


def split_windows(qkv: Tensor, layout: Layout) -> list[Tensor]:
    """q, k, v, each (B, windows, heads, N, head_dim)."""
    _, height, width, channels = qkv.shape
    wh, ww = layout.window
    if any(layout.shift):
        qkv = qkv.roll((-layout.shift[0], -layout.shift[1]), (1, 2))
    if layout.grid:
        parts = qkv.reshape(-1, wh, height // wh, ww, width // ww, channels).permute(0, 2, 4, 1, 3, 5)
    else:
        parts = qkv.reshape(-1, height // wh, wh, width // ww, ww, channels).permute(0, 1, 3, 2, 4, 5)
    windows, head_dim = (height // wh) * (width // ww), channels // (3 * layout.heads)
    parts = parts.reshape(-1, windows, layout.tokens, 3, layout.heads, head_dim)  # the one copy
    return list(parts.permute(3, 0, 1, 4, 2, 5).unbind(0))


def merge_windows(out: Tensor, height: int, width: int, layout: Layout) -> Tensor:
    """(B, windows, heads, N, head_dim) back to (B, H, W, C)."""
    wh, ww = layout.window
    head_dim = out.shape[-1]
    parts = out.reshape(-1, height // wh, width // ww, layout.heads, wh, ww, head_dim)
    parts = parts.permute(0, 4, 1, 5, 2, 3, 6) if layout.grid else parts.permute(0, 1, 4, 2, 5, 3, 6)
    image = parts.reshape(-1, height, width, layout.heads * head_dim)
    return image.roll(layout.shift, (1, 2)) if any(layout.shift) else image


def shift_mask(height: int, width: int, layout: Layout, device: torch.device) -> Tensor:
    """(windows, N, N) float32: `mask_value` between tokens of different regions of the shifted image, else 0."""

    def regions(size: int, window: int, shift: int) -> Tensor:
        position = torch.arange(size, device=device)
        return (position >= size - window).long() + (position >= size - shift).long() * (1 if shift else 0)

    (wh, ww), (sh, sw) = layout.window, layout.shift
    region = regions(height, wh, sh)[:, None] * 3 + regions(width, ww, sw)[None, :]
    region = region.reshape(height // wh, wh, width // ww, ww).permute(0, 2, 1, 3).reshape(-1, wh * ww)
    return (region[:, None, :] != region[:, :, None]).float() * layout.mask_value


# --- fallback ---------------------------------------------------------------------------------------------------------


def _fallback(qkv: Tensor, layout: Layout, bias: Tensor | None, head_scale: Tensor | None) -> Tensor:
    """PyTorch's fused attention where it can, else the formula."""
    if qkv.dtype == torch.float64:
        return window_attention_formula(qkv, layout, bias, head_scale)
    q, k, v = (part.flatten(0, 1) for part in split_windows(qkv, layout))
    scale = layout.scale
    if head_scale is not None:
        q = (F.normalize(q.float(), dim=-1) * head_scale.view(-1, 1, 1)).to(v.dtype)
        k = F.normalize(k.float(), dim=-1).to(v.dtype)
        scale = 1.0
    mask = None if bias is None else bias.unsqueeze(0)
    if any(layout.shift):
        regions = shift_mask(qkv.shape[1], qkv.shape[2], layout, qkv.device).unsqueeze(1)
        mask = regions if mask is None else regions + mask
        mask = mask.repeat(q.shape[0] // mask.shape[0], 1, 1, 1)
    if mask is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        with sdpa_kernel(_MASK_SAFE):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), scale=scale)
    windows = (qkv.shape[1] // layout.window[0]) * (qkv.shape[2] // layout.window[1])
    return merge_windows(out.unflatten(0, (-1, windows)), qkv.shape[1], qkv.shape[2], layout)


# --- kernel -----------------------------------------------------------------------------------------------------------


def refusal(qkv: Tensor, layout: Layout, has_bias: bool, cosine: bool) -> str | None:
    """Why no kernel takes this, as one sentence; None when one does. Reads no memory of the tensor."""
    if EXTENSION is None:
        return cuda_missing()
    if qkv.dtype not in DTYPES:
        return f"{str(qkv.dtype).removeprefix('torch.')} has no kernel"
    head_dim = qkv.shape[3] // (3 * layout.heads)
    if qkv.device.type == "cpu":
        if head_dim > MAX_HEAD_DIM:
            return f"a head of {head_dim} channels; the kernel takes up to {MAX_HEAD_DIM}"
        if layout.tokens > MAX_TOKENS:
            return f"windows of {layout.tokens} tokens; the kernel takes up to {MAX_TOKENS}"
        return None
    if qkv.device.type != "cuda":
        return f"there are no kernels for {qkv.device.type}"
    training = torch.is_grad_enabled()
    sizes = (1, *layout.window, layout.heads, head_dim, *layout.window, *layout.shift)  # the kernels care for no more
    return _cuda_refusal(sizes, has_bias, cosine, layout.grid, DTYPES[qkv.dtype], training)


@torch.compiler.assume_constant_result
def _cuda_refusal(
    sizes: tuple[int, ...], has_bias: bool, cosine: bool, grid: bool, dtype: int, gradient: bool
) -> str | None:
    missing = cuda_missing()
    why = missing or EXTENSION.window_attention_refusal(
        sizes=sizes, has_bias=has_bias, cosine=cosine, grid=grid, dtype=dtype, gradient=gradient
    )
    return why or None


_ARGUMENTS = "int heads, SymInt[] window, SymInt[] shift, bool grid, float scale, float mask_value"
LIBRARY.define(
    f"window_attention(Tensor qkv, Tensor? bias, Tensor? head_scale, {_ARGUMENTS}, bool keep_lse) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
LIBRARY.define(
    f"window_attention_grad(Tensor grad, Tensor qkv, Tensor? bias, Tensor? head_scale, Tensor lse, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


def _run(qkv: Tensor, layout: Layout, bias: Tensor | None, head_scale: Tensor | None) -> Tensor:
    needs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (qkv, bias, head_scale))
    arguments = (layout.heads, layout.window, layout.shift, layout.grid, layout.scale, layout.mask_value)
    qkv = qkv.contiguous()
    if needs:
        out: Tensor = _WindowAttention.apply(qkv, bias, head_scale, *arguments)
        return out
    return torch.ops.imgcls.window_attention(qkv, bias, head_scale, *arguments, False)[0]


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, head_scale: Tensor | None, *arguments: Any) -> Tensor:
        out, lse = torch.ops.imgcls.window_attention(qkv, bias, head_scale, *arguments, True)
        ctx.save_for_backward(qkv, bias, head_scale, lse)
        ctx.arguments = arguments
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        qkv, bias, head_scale, lse = ctx.saved_tensors
        dqkv, dbias, dscale = torch.ops.imgcls.window_attention_grad(
            grad.contiguous(), qkv, bias, head_scale, lse, *ctx.arguments
        )
        found = (dqkv, dbias if bias is not None else None, dscale if head_scale is not None else None)
        return (*found, *(None for _ in ctx.arguments))


def _outputs(qkv: Tensor, heads: int, window: Any, keep_lse: bool) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = qkv.shape
    windows, tokens = (height // window[0]) * (width // window[1]), window[0] * window[1]
    out = qkv.new_empty((batch, height, width, channels // 3))
    shape = (batch * windows, heads, tokens) if keep_lse else (0,)
    return out, qkv.new_empty(shape, dtype=torch.float32)


def _gradients(qkv: Tensor, bias: Tensor | None, head_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    none = qkv.new_empty(0, dtype=torch.float32)
    return (
        torch.empty_like(qkv, memory_format=torch.contiguous_format),
        none if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format),
        none.clone() if head_scale is None else torch.empty_like(head_scale),
    )


# what the functions of the library take after their tensors is what `_common` takes, in the same order


def _forward_fake(
    qkv: Tensor, bias: Tensor | None, head_scale: Tensor | None, heads: int, window: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _outputs(qkv, heads, window, keep_lse=rest[-1])


def _backward_fake(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, head_scale: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(qkv, bias, head_scale)


def _ready(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, and at an address that the kernels can load from."""
    if tensor is None:
        return None
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.device.type == "cuda" and tensor.data_ptr() % _ALIGNMENT else tensor


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _common(
    qkv: Tensor, heads: int, window: Any, shift: Any, grid: bool, scale: float, mask_value: float
) -> dict[str, Any]:
    batch, height, width, channels = qkv.shape
    return {
        "sizes": (batch, height, width, heads, channels // (3 * heads), *window, *shift),
        "grid": grid,
        "scale": scale,
        "mask_value": mask_value,
        "dtype": DTYPES[qkv.dtype],
        **where_to_run(qkv),
    }


def _forward_impl(
    qkv: Tensor, bias: Tensor | None, head_scale: Tensor | None, heads: int, window: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    *how, keep_lse = rest
    qkv, bias, head_scale = (_ready(t) for t in (qkv, bias, head_scale))  # type: ignore[assignment]
    out, lse = _outputs(qkv, heads, window, keep_lse)
    if out.numel():
        with on_device_of(qkv):
            EXTENSION.window_attention(
                qkv=_address(qkv),
                bias=_address(bias),
                head_scale=_address(head_scale),
                out=_address(out),
                lse=_address(lse),
                **_common(qkv, heads, window, *how),
            )
    return out, lse


def _backward_impl(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, head_scale: Tensor | None, lse: Tensor, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad, qkv, bias, head_scale = (_ready(t) for t in (grad.to(qkv.dtype), qkv, bias, head_scale))  # type: ignore[assignment]
    dqkv, dbias, dscale = _gradients(qkv, bias, head_scale)
    if qkv.numel() == 0:
        return dqkv, dbias.zero_(), dscale.zero_()
    common = _common(qkv, *how)
    with on_device_of(qkv):
        scratch = None
        if common["on_cuda"]:
            asked = {name: common[name] for name in ("sizes", "grid", "dtype")}
            floats = EXTENSION.window_attention_scratch(has_bias=bias is not None, cosine=head_scale is not None, **asked)
            scratch = qkv.new_empty(max(floats, 1), dtype=torch.float32)
        EXTENSION.window_attention_grad(
            qkv=_address(qkv),
            bias=_address(bias),
            head_scale=_address(head_scale),
            lse=_address(lse),
            grad=_address(grad),
            dqkv=_address(dqkv),
            dbias=_address(dbias),
            dhead_scale=_address(dscale),
            scratch=_address(scratch),
            **common,
        )
    return dqkv, dbias, dscale


torch.library.register_fake("imgcls::window_attention", _forward_fake, lib=LIBRARY)
torch.library.register_fake("imgcls::window_attention_grad", _backward_fake, lib=LIBRARY)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("window_attention", _forward_impl, _key)
    LIBRARY.impl("window_attention_grad", _backward_impl, _key)
