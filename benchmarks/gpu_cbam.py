"""The parts of `gpu_check.py` about CBAM: right, and how fast beside torch.compile of the formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_rows import (
    Journal,
    Replay,
    buffers_for,
    copy_speed,
    interleaved,
    prepare_compiler,
    relative,
    short,
    spread,
    sync,
)
from torch import Tensor

from imgcls_fast.models.map_attention import CBAM
from imgcls_fast.ops import cbam as cbam_ops

GATES = {torch.bfloat16: (4e-3, 1e-2), torch.float32: (2e-6, 1e-5)}  # output, gradients; as tests/ops
OURS = "ours"


def is_right(journal: Journal) -> None:
    for dtype, (out_gate, grad_gate) in GATES.items():
        for training in (False, True):
            torch.manual_seed(0)
            x = (
                torch.randn(4, 256, 14, 14, device=journal.device)
                .to(dtype)
                .contiguous(memory_format=torch.channels_last)
            )
            module = CBAM(256).to(journal.device).train(training)
            residual = torch.randn_like(x)
            weights = [module.w1, module.w2, module.conv.weight]
            results = []
            for cast, kernel in ((lambda t: t.detach().clone(), True), (lambda t: t.detach().double(), False)):
                leaves = [cast(t).requires_grad_() for t in (x, *weights, residual)]
                norm = torch.nn.BatchNorm2d(1).to(journal.device).train(training)
                norm = norm if kernel else norm.double()
                out = cbam_ops.cbam(*leaves[:4], norm, residual=leaves[4], relu=True, kernel=kernel)
                direction = (
                    torch.linspace(-1, 1, out.shape[-1], device=out.device).to(dtype).to(out.dtype).expand_as(out)
                )
                results.append([out.detach(), *torch.autograd.grad(out, leaves, direction)])
            errors = [relative(a, b) for a, b in zip(*results, strict=True)]
            holds = errors[0] <= out_gate and max(errors[1:]) <= grad_gate
            kind = f"{str(dtype).removeprefix('torch.')}{', training' if training else ''}"
            text = f"out {errors[0]:.1e}, worst gradient {max(errors[1:]):.1e}"
            journal.row(
                f"CBAM 4x256x14x14, {kind}, against float64",
                text,
                f"{out_gate:.0e}, {grad_gate:.0e}",
                holds,
                errors=errors,
            )


def cbam_sizes(journal: Journal) -> list[tuple[int, int, int]]:
    return [(2, 32, 7)] if journal.small else [(128, 256, 56), (128, 512, 28), (128, 2048, 7)]


def _cbam(channels: int, device: str) -> tuple[Any, Callable[..., Tensor]]:
    torch.manual_seed(0)
    module = CBAM(channels).to(device).eval()
    return module, torch.compile(partial(cbam_call, module, False), dynamic=False)


def cbam_call(module: Any, kernel: bool, x: Tensor) -> Tensor:
    return cbam_ops.cbam(x, module.w1, module.w2, module.conv.weight, module.norm, kernel=kernel)


def _map(batch: int, channels: int, side: int, device: str) -> Tensor:
    x = torch.randn(batch, channels, side, side, device=device).to(torch.float32 if device == "cpu" else torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def compile_all(journal: Journal) -> None:
    for size in cbam_sizes(journal):
        compile_cbam(*size, journal.device)


def compile_cbam(batch: int, channels: int, side: int, device: str) -> None:
    torch._dynamo.reset()
    module, compiled = _cbam(channels, device)
    x = _map(batch, channels, side, device)
    out = compiled(x)
    torch.autograd.grad(out, [x, module.w1, module.w2, module.conv.weight], torch.ones_like(out))


def cbam_times(journal: Journal) -> None:
    """CBAM's kernels beside torch.compile of the formula, forward and backward."""
    prepare_compiler()
    copy, device = copy_speed(journal.device), journal.device
    for batch, channels, side in cbam_sizes(journal):
        torch._dynamo.reset()
        module, compiled = _cbam(channels, device)
        stream = torch.cuda.Stream() if device == "cuda" else None
        size = batch * channels * side * side * (4 if device == "cpu" else 2)
        with torch.cuda.stream(stream):
            maps = [_map(batch, channels, side, device) for _ in range(buffers_for(size, device))]
            grad = torch.randn_like(maps[0])
        sync(device)
        passes: dict[str, dict[str, Replay]] = {"forward": {}, "backward": {}}
        first: dict[str, Tensor] = {}
        for name, call in ((OURS, partial(cbam_call, module, True)), ("formula compiled", compiled)):
            try:
                with torch.cuda.stream(stream):
                    outs = [call(x) for x in maps]
                sync(device)
                first[name] = outs[0].detach()
                passes["forward"][name] = Replay([partial(call, x) for x in maps], stream, device)
                leaves = [module.w1, module.w2, module.conv.weight]
                walks = [
                    partial(torch.autograd.grad, out, [x, *leaves], grad, retain_graph=True)
                    for out, x in zip(outs, maps, strict=True)
                ]
                passes["backward"][name] = Replay(walks, stream, device)
            except (RuntimeError, ValueError) as error:
                journal.row(f"CBAM {batch}x{channels}x{side}x{side}, {name}", short(error), "runs", False)
        for what, replays in passes.items():
            if len(replays) < 2:
                continue
            measured = {name: spread(s) for name, s in interleaved(replays, 2 if journal.small else 7).items()}
            ours, rival = (found["us"] for found in measured.values())
            floor = 1e6 * size * (2 if what == "forward" else 3) / copy
            text = f"ours {ours:.1f} us, {floor / ours:.0%} of the floor, {ours / rival:.3f}x compiled ({rival:.1f})"
            holds = None if journal.small else ours / rival <= 1 / 1.4
            data = {"contenders": measured, "floor_us": floor, "how": [r.how for r in replays.values()]}
            data["apart"] = relative(first[OURS], first["formula compiled"])
            journal.row(f"CBAM {batch}x{channels}x{side}x{side}, {what}", text, "at most 0.714x", holds, **data)
