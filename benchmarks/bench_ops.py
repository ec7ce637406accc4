"""Our attention kernels beside what a user would run instead, forward and backward.

On the CPU: one thread, CPU time, float32. On a GPU: CUDA events, bf16. Both sides begin with the output of the qkv layer in
image order and end there, so partition, shift and their inverses are timed wherever a contender needs them. Every contender
is first compared with the formula in float32, outputs and gradients; a rival that disagrees is not timed, a kernel that does
fails. The backward pass is timed alone: its graph is built outside the clock. The limit is the bytes that must move once, at
the speed of a copy measured in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from duels import Contender, Contest, Disagree, Pair, Setup
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from imgcls_fast import _C
from imgcls_fast.engines.timing import Prepared
from imgcls_fast.models.map_attention import CBAM
from imgcls_fast.ops import cbam as cbam_ops
from imgcls_fast.ops.window_attention import (
    Layout,
    merge_windows,
    shift_mask,
    split_windows,
    window_attention,
    window_attention_formula,
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative L2 of outputs against the formula in float32
GRADIENTS = 10.0  # times that, for gradients
TIES = 5e-3  # of gradients through a maximum: where two channels nearly tie, rounding decides which one gets it
BACKENDS = {
    "sdpa, flash": SDPBackend.FLASH_ATTENTION,
    "sdpa, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa, cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa, math": SDPBackend.MATH,
}
OURS = "kernel"


def _windows(name: str, batch: int, side: int, heads: int, shift: int, **more: Any) -> Contest:
    params = {"name": name, "batch": batch, "side": side, "heads": heads, "shift": shift}
    return Contest("ops", name, "windows", params, **more)


def _sequence(name: str, batch: int, tokens: int, heads: int, biased: bool, **more: Any) -> Contest:
    params = {"name": name, "batch": batch, "tokens": tokens, "heads": heads, "biased": biased}
    return Contest("ops", name, "sequence", params, **more)


def _cbam(batch: int, channels: int, side: int, kind: str, **more: Any) -> Contest:
    name = f"CBAM {batch}x{channels}x{side}x{side}{kind and f', {kind}'}"
    params = {"name": name, "batch": batch, "channels": channels, "side": side, "kind": kind}
    return Contest("ops", name, "cbam", params, **more)


CPU: dict[str, Any] = {"threads": 1, "devices": ("cpu",)}
GPU: dict[str, Any] = {"devices": ("cuda",)}
CONTESTS = [
    _windows("256 windows 7x7, 3 heads of 32", 256, 7, 3, 0, **CPU),
    _windows("4 maps 56x56, shifted windows 7x7", 4, 56, 3, 3, **CPU),
    _sequence("ViT, 197 tokens, 6 heads of 64", 4, 197, 6, False, **CPU),
    _sequence("BEiT, 197 tokens, 6 heads of 64", 4, 197, 6, True, **CPU, full=True),
    _sequence("ViT, 50 tokens, 6 heads of 64", 4, 50, 6, False, **CPU, full=True),
    *(_cbam(*shape, kind, **CPU, full=(shape, kind) not in (((8, 256, 56), ""), ((32, 2048, 7), "")))
      for shape in ((8, 256, 56), (16, 512, 28), (32, 2048, 7)) for kind in ("", "residual", "training")),
    Contest("ops", "small windows", "windows",
            {"name": "64 windows 7x7", "batch": 64, "side": 7, "heads": 3, "shift": 0, "small": True}, **CPU, small=True),
    *(_windows(f"Swin-T stage {stage}, batch 128{', shifted' if shift else ''}", 128, side, heads, shift, **GPU)
      for stage, (side, heads) in enumerate(((56, 3), (28, 6), (14, 12), (7, 24)), 1) for shift in ((0, 3) if side > 7 else (0,))),
    *(_sequence(f"{'BEiT' if biased else 'ViT'}, {tokens} tokens, 12 heads of 64", 128, tokens, 12, biased, **GPU)
      for tokens in (50, 197, 257) for biased in (False, True)),
    *(_cbam(*shape, kind, **GPU) for shape in ((128, 256, 56), (128, 512, 28), (128, 2048, 7)) for kind in ("", "residual", "training")),
]  # fmt: skip


@pytest.mark.parametrize("contest", CONTESTS, ids=str)
def bench_ops(duel: Callable[[Contest], list[dict[str, Any]]], contest: Contest) -> None:
    first = duel(contest)[0]
    assert first["cases"] or first["slow"], first["absent"]


# --- set-ups ----------------------------------------------------------------------------------------------------------


def windows(
    work: Path,
    name: str,
    batch: int,
    side: int,
    heads: int,
    shift: int,
    device: str,
    full: bool = False,
    small: bool = False,
) -> Setup:
    """Attention of one Swin layer with 7x7 windows on a batch of square maps; the bias is trained."""
    layout = Layout(heads, (7, 7), (shift, shift), scale=32**-0.5)
    torch.manual_seed(0)
    qkv = torch.randn(batch, side, side, 3 * heads * 32, device=device).to(_dtype(device)).requires_grad_()
    bias = torch.randn(heads, layout.tokens, layout.tokens, device=device).requires_grad_()
    goals = {f"{name}, forward": 0.9, f"{name}, backward": 1.0} if device == "cpu" and not shift else {}
    contenders = _attention(layout, device, ("formula", OURS, "sdpa") if small else None)
    return _setup(name, contenders, [qkv, bias], _attention_grad(qkv), _attention_bytes(qkv), {} if small else goals)


def sequence(
    work: Path, name: str, batch: int, tokens: int, heads: int, biased: bool, device: str, full: bool = False
) -> Setup:
    """Attention over the whole sequence of a ViT, or with BEiT's bias."""
    layout = Layout(heads, (1, tokens), scale=64**-0.5)
    torch.manual_seed(0)
    qkv = torch.randn(batch, 1, tokens, 3 * heads * 64, device=device).to(_dtype(device)).requires_grad_()
    bias = torch.randn(heads, tokens, tokens, device=device).requires_grad_()
    inputs = [qkv, bias] if biased else [qkv]
    return _setup(name, _attention(layout, device), inputs, _attention_grad(qkv), _attention_bytes(qkv), {})


def cbam(
    work: Path, name: str, batch: int, channels: int, side: int, kind: str, device: str, full: bool = False
) -> Setup:
    """CBAM on a channels-last map: plain, with residual and ReLU behind it, or with batch statistics."""
    torch.manual_seed(0)
    module = CBAM(channels).to(device).train(kind == "training")
    shape = (batch, channels, side, side)
    x, residual = (
        torch.randn(shape, device=device)
        .to(_dtype(device))
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    )
    has_residual = kind == "residual"
    inputs = [x, *([residual] if has_residual else []), module.w1, module.w2, module.conv.weight]
    call = partial(_cbam_call, norm=module.norm, has_residual=has_residual)
    formula, ours = partial(call, kernel=False), partial(call, kernel=True)
    size = x.numel() * x.element_size()
    goal = (0.8, 1.0) if device == "cpu" else (1 / 1.4, 1 / 1.4)
    goals = {} if kind == "training" else {f"{name}, forward": goal[0], f"{name}, backward": goal[1]}
    contenders = {"formula": formula, OURS: ours, "compiled formula": torch.compile(formula)}
    moved = ((2 + has_residual) * size, (3 + 2 * has_residual) * size)
    return _setup(name, contenders, inputs, torch.randn_like(x), moved, goals, gradients=TIES)


def _setup(
    name: str, contenders: dict[str, Callable[..., Tensor]], inputs: list[Tensor], grad: Tensor, moved: tuple[int, int],
    goals: dict[str, float], gradients: float | None = None,
) -> Setup:  # fmt: skip
    device, dtype = inputs[0].device.type, inputs[0].dtype
    forward, backward = f"{name}, forward", f"{name}, backward"
    allowed = TOLERANCE[dtype], max(gradients or 0.0, GRADIENTS * TOLERANCE[dtype])

    def check(name: str, outputs: Mapping[str, Any]) -> dict[str, Any]:
        output, *gradients = (_relative(a, b) for a, b in zip(outputs[name], outputs["formula"], strict=False))
        worst = max(gradients, default=0.0)
        if not (output <= allowed[0] and worst <= allowed[1]):
            raise Disagree(f"differs from the formula by {output:.1e}, its gradients by {worst:.1e} (relative L2)")
        return {"relative_l2": float(f"{output:.2e}")} | ({"gradients": float(f"{worst:.2e}")} if gradients else {})

    speed = partial(_copy_s, device)
    return Setup(
        {
            key: partial(
                _open, call, inputs, grad, forward, None if key == "FlexAttention" and device == "cpu" else backward
            )
            for key, call in contenders.items()
        },
        [Pair(OURS, rival, goals) for rival in contenders if rival != OURS],
        check,
        clock="cpu" if device == "cpu" else "gpu",
        limits={
            case: ("the bytes at copy speed", partial(speed, size))
            for case, size in ((forward, moved[0]), (backward, moved[1]))
        },
    )


def _open(
    call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, forward: str, backward: str | None
) -> Contender:
    """Both passes; FlexAttention has no backward pass on a CPU."""
    detached = [tensor.detach() for tensor in inputs]
    on_gpu = grad.is_cuda

    def run() -> Tensor:
        with torch.no_grad():
            return call(*detached)

    def graph() -> Callable[[], Any]:
        out = call(*inputs)
        if on_gpu:
            torch.cuda.synchronize()
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=on_gpu)

    found = [run()] if backward is None else [out := call(*inputs), *torch.autograd.grad(out, inputs, grad)]
    calls: dict[str, Any] = {forward: run} | ({} if backward is None else {backward: Prepared(graph)})
    output = [tensor.detach().float() for tensor in found]
    return Contender(calls, output, str(grad.dtype).removeprefix("torch."), {"isa": _C.isa()})


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _copy_s(device: str, size: int) -> float:
    """Seconds to move so many bytes (read or written), at the speed of a copy."""
    a, b = (torch.empty(1 << (26 if device == "cpu" else 28), dtype=torch.uint8, device=device) for _ in range(2))

    def spent() -> float:
        began = time.perf_counter()
        b.copy_(a)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return size * min(spent() for _ in range(7)) / (2 * a.numel())


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _attention_grad(qkv: Tensor) -> Tensor:
    return torch.randn(*qkv.shape[:3], qkv.shape[3] // 3, device=qkv.device).to(qkv.dtype)


def _attention_bytes(qkv: Tensor) -> tuple[int, int]:
    """Read qkv and write the output; read qkv and the output's gradient and write that of qkv."""
    size = qkv.numel() * qkv.element_size()
    return size * 4 // 3, size * 7 // 3


def _cbam_call(x: Tensor, *rest: Tensor, norm: nn.Module, has_residual: bool, kernel: bool) -> Tensor:
    residual = rest[0] if has_residual else None
    return cbam_ops.cbam(x, *rest[has_residual:], norm, residual=residual, relu=has_residual, kernel=kernel)


# --- contenders -------------------------------------------------------------------------------------------------------


def _attention(layout: Layout, device: str, only: tuple[str, ...] | None = None) -> dict[str, Callable[..., Tensor]]:
    def ours(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        return window_attention(qkv, layout.heads, layout.window, layout.shift, bias=bias, kernel=True)

    def formula(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        return window_attention_formula(qkv, layout, None if bias is None else bias.to(qkv.dtype))

    sdpa = partial(_sdpa, layout)
    contenders: dict[str, Callable[..., Tensor]] = {
        "formula": formula,
        OURS: ours,
        "compiled formula": torch.compile(formula),
        "sdpa": sdpa,
        "compiled sdpa": torch.compile(sdpa),
        "FlexAttention": partial(_flex, layout, torch.compile(_flex_attention())),
    }
    if device == "cuda":
        contenders |= {name: partial(sdpa, backend=backend) for name, backend in BACKENDS.items()}
    return {name: call for name, call in contenders.items() if only is None or name in only}


def _sdpa(layout: Layout, qkv: Tensor, bias: Tensor | None = None, backend: SDPBackend | None = None) -> Tensor:
    q, k, v = (part.flatten(0, 1) for part in split_windows(qkv, layout))
    mask = None if bias is None else bias.unsqueeze(0)
    if any(layout.shift):
        region = shift_mask(qkv.shape[1], qkv.shape[2], layout, qkv.device).unsqueeze(1)
        mask = region if mask is None else region + mask
        mask = mask.repeat(q.shape[0] // mask.shape[0], 1, 1, 1)
    mask = None if mask is None else mask.to(q.dtype)
    if backend is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return _merged(out, qkv, layout)


def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def _flex(layout: Layout, compiled: Callable[..., Tensor], qkv: Tensor, bias: Tensor | None = None) -> Tensor:
    """FlexAttention with the bias, and the shift mask, as a score modification."""
    mask = shift_mask(qkv.shape[1], qkv.shape[2], layout, qkv.device) if any(layout.shift) else None

    def score(logit: Tensor, window: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if bias is not None:
            logit = logit + bias[head, i, j]
        return logit if mask is None else logit + mask[window % mask.shape[0], i, j]

    q, k, v = (part.flatten(0, 1).contiguous() for part in split_windows(qkv, layout))
    return _merged(compiled(q, k, v, score_mod=None if bias is None and mask is None else score), qkv, layout)


def _merged(out: Tensor, qkv: Tensor, layout: Layout) -> Tensor:
    count = (qkv.shape[1] // layout.window[0]) * (qkv.shape[2] // layout.window[1])
    return merge_windows(out.unflatten(0, (-1, count)), qkv.shape[1], qkv.shape[2], layout)
