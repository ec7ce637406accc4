"""The parts of `gpu_check.py` about window attention: right, and how fast beside PyTorch's best."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import gpu_cbam
import torch
from gpu_rows import (
    Journal,
    Replay,
    buffers_for,
    card,
    copy_speed,
    interleaved,
    prepare_compiler,
    relative,
    short,
    spread,
    sync,
)
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from imgcls_fast.ops.window_attention import (
    Layout,
    merge_windows,
    shift_mask,
    split_windows,
    window_attention,
    window_attention_formula,
)

WRONG = 3
# relative L2 against float64 on the same rounded inputs: output and dqkv; dbias is float32 always. As tests/ops
GATES = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
SUM_GATE = 1e-5
BACKENDS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}  # fmt: skip
OURS, COMPILED = "ours", "timm compiled"


# --- right ------------------------------------------------------------------------------------------------------------


def attention_is_right(journal: Journal) -> int:
    """Swin's first stage, shifted, output and all gradients against float64, and twenty repeats; then CBAM."""
    batch, side, device = (1, 14, "cpu") if journal.small else (16, 56, "cuda")
    wrong = False
    for dtype, shift in ((torch.bfloat16, 3), (torch.bfloat16, 0), (torch.float16, 3), (torch.float32, 3)):
        layout = Layout(3, (7, 7), (shift, shift), scale=32**-0.5)
        torch.manual_seed(0)
        qkv = torch.randn(batch, side, side, 288, device=device).to(dtype).requires_grad_()
        bias = torch.randn(3, 49, 49, device=device).requires_grad_()
        grad = torch.randn(batch, side, side, 96, device=device).to(dtype)

        def run(qkv: Tensor = qkv, bias: Tensor = bias, grad: Tensor = grad, shift: int = shift) -> list[Tensor]:
            out = window_attention(qkv, 3, (7, 7), (shift, shift), bias=bias, kernel=True)
            return [out.detach(), *torch.autograd.grad(out, [qkv, bias], grad)]

        found = run()
        doubles = [t.detach().double().requires_grad_() for t in (qkv, bias)]
        out = window_attention_formula(doubles[0], layout, doubles[1])
        truth = [out.detach(), *torch.autograd.grad(out, doubles, grad.double())]
        errors = [relative(a, b) for a, b in zip(found, truth, strict=True)]
        holds = all(e <= g for e, g in zip(errors, (GATES[dtype], GATES[dtype], SUM_GATE), strict=True))
        name = f"Swin stage 1, batch {batch}, {str(dtype).removeprefix('torch.')}{', shifted' if shift else ''}"
        text = "out {:.1e}, dqkv {:.1e}, dbias {:.1e}".format(*errors)
        journal.row(f"{name}, against float64", text, f"{GATES[dtype]:.0e}, {SUM_GATE:.0e}", holds, errors=errors)
        if not holds:
            journal.row(f"{name}, where", where_wrong(found[0], truth[0]))
        same = sum(
            all(torch.equal(a, b) for a, b in zip(found, run(), strict=True)) for _ in range(3 if journal.small else 20)
        )
        equal = same == (3 if journal.small else 20)
        journal.row(f"{name}, repeats", f"{same} bitwise equal", "all", equal)
        far = not all(e <= 10 * g for e, g in zip(errors, (GATES[dtype], GATES[dtype], SUM_GATE), strict=True))
        wrong |= far or not equal  # a little over a gate is a row that fails; the rest is worth its time still
    gpu_cbam.is_right(journal)
    return WRONG if wrong else 0


def where_wrong(found: Tensor, truth: Tensor) -> str:
    """Shares of an output's rows, columns and heads that are off: a lead to the fault."""
    off = ((found.double() - truth).abs() > 0.05 + 0.05 * truth.abs()) | found.isnan()
    per = {name: [round(float(x), 3) for x in off.float().mean(axes)[:14]] for name, axes in
           (("rows", (0, 2, 3)), ("columns", (0, 1, 3)), ("images", (1, 2, 3)))}  # fmt: skip
    channels = [round(float(x), 3) for x in off.float().mean((0, 1, 2)).unflatten(0, (-1, 8)).mean(1)]
    return f"{float(off.float().mean()):.3f} of all; {per}; channels by 8 {channels}"


# --- speed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One attention layer of a batch: a square map in windows of 7x7, or a sequence without bias."""

    name: str
    batch: int
    side: int
    heads: int
    dim: int = 32
    shift: int = 0
    tokens: int = 0

    @property
    def layout(self) -> Layout:
        window = (1, self.tokens) if self.tokens else (7, 7)
        return Layout(self.heads, window, (self.shift, self.shift), scale=self.dim**-0.5)

    def inputs(self, count: int, device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """`count` times qkv and the gradient of the output, and one bias."""
        torch.manual_seed(0)
        size = (self.batch, 1, self.tokens) if self.tokens else (self.batch, self.side, self.side)
        width = self.heads * self.dim
        qkv = [torch.randn(*size, 3 * width, device=device).to(dtype).requires_grad_() for _ in range(count)]
        grads = [torch.randn(*size, width, device=device).to(dtype) for _ in range(count)]
        bias = None if self.tokens else torch.randn(self.heads, 49, 49, device=device).requires_grad_()
        return qkv, grads, bias


SHAPES = [
    *(Shape(f"Swin-T stage {k}{', shifted' if shift else ''}", 128, side, heads, shift=shift)
      for k, (side, heads) in enumerate(((56, 3), (28, 6), (14, 12), (7, 24)), 1) for shift in ((0, 3) if side > 7 else (0,))),
    *(Shape(f"ViT, {tokens} tokens", 128, 0, 12, dim=64, tokens=tokens) for tokens in (50, 197)),
]  # fmt: skip
SMALL = [Shape("Swin-T stage 3, shifted", 1, 14, 2, shift=3), Shape("ViT, 50 tokens", 1, 0, 2, dim=64, tokens=50)]


def attention_times(journal: Journal) -> None:
    """Each shape forward and backward: ours, PyTorch's four backends, and timm's way compiled; first ours alone."""
    prepare_compiler()
    shapes = SMALL if journal.small else SHAPES
    if journal.warm:
        for shape in shapes:
            compile_one(shape, journal.device)
        gpu_cbam.compile_all(journal)
        return
    gc.freeze()  # each capture collects garbage first
    copy = copy_speed(journal.device)
    journal.row("copy", f"{copy / 1e12:.3f} TB/s read and written", card=card())
    for shape in shapes:
        time_shape(journal, shape, copy, alone=True)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for shape in shapes:
        if journal.left() < 6:
            journal.row(shape.name, "not measured: out of time")
            break
        found[shape.name] = time_shape(journal, shape, copy, alone=False)
    window_goals(journal, found, copy, {shape.name: shape for shape in shapes})
    journal.row("after the timings", card())


def time_shape(journal: Journal, shape: Shape, copy: float, *, alone: bool) -> dict[str, dict[str, float]]:
    """Microseconds by pass and contender."""
    device, dtype = journal.device, torch.float32 if journal.small else torch.bfloat16
    size = (
        shape.batch
        * (shape.tokens or shape.side**2)
        * shape.heads
        * shape.dim
        * 3
        * torch.empty(0, dtype=dtype).element_size()
    )
    stream = torch.cuda.Stream() if device == "cuda" else None
    names = [OURS] if alone else [OURS, *BACKENDS, COMPILED]
    passes: dict[str, dict[str, Replay]] = {"forward": {}, "backward": {}}
    refused: dict[str, str] = {}
    with torch.cuda.stream(stream):
        qkv, grads, bias = shape.inputs(buffers_for(size, device), device, dtype)
        truth = window_attention_formula(
            qkv[0].detach(), shape.layout, None if bias is None else bias.detach().to(dtype)
        )
    sync(device)
    apart = {}
    for name in names:
        try:
            call = contender(name, shape, qkv[0])
            with torch.cuda.stream(stream):
                outs = [call(x, bias) for x in qkv]
            sync(device)
            apart[name] = relative(outs[0].detach(), truth)
            passes["forward"][name] = Replay([partial(call, x, bias) for x in qkv], stream, device)
            wanted = [] if bias is None else [bias]
            walks = [
                partial(torch.autograd.grad, out, [x, *wanted], grad, retain_graph=True)
                for out, x, grad in zip(outs, qkv, grads, strict=True)
            ]
            passes["backward"][name] = Replay(walks, stream, device)
        except (RuntimeError, ValueError) as error:
            refused[name] = short(error)
    times: dict[str, dict[str, float]] = {}
    for what, replays in passes.items():
        if OURS not in replays:
            journal.row(f"{shape.name}, {what}", f"ours: {refused.get(OURS)}", "runs", False)
            continue
        measured = interleaved(replays, 2 if journal.small else 7)
        floor = 1e6 * size * (4 / 3 if what == "forward" else 7 / 3) / copy
        times[what] = {name: spread(seconds)["us"] for name, seconds in measured.items()}
        share = {name: round(floor / us, 3) for name, us in times[what].items()}
        data = {}
        for name, seconds in measured.items():
            more = {"share_of_floor": share[name], "how": replays[name].how, "apart": apart[name]}
            data[name] = spread(seconds) | more
        text = f"ours {times[what][OURS]:.1f} us, {share[OURS]:.0%} of the floor {floor:.1f}"
        rest = ", ".join(f"{name} {us:.1f}" for name, us in times[what].items() if name != OURS)
        journal.row(f"{shape.name}, {what}{', alone' if alone else ''}", f"{text}; {rest}" if rest else text,
                    floor_us=floor, contenders=data, refused=refused, buffers=len(qkv))  # fmt: skip
        if apart[OURS] > 3e-2:
            journal.row(f"{shape.name}, output", f"{apart[OURS]:.1e} from the formula", "3e-2", False)
    return times


def contender(name: str, shape: Shape, like: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    layout = shape.layout
    if name == OURS:
        return lambda qkv, bias: window_attention(
            qkv, layout.heads, layout.window, layout.shift, bias=bias, kernel=True
        )
    if name == COMPILED:
        return compiled_as_timm(shape, like)
    mask = shift_mask(shape.side, shape.side, layout, like.device).unsqueeze(1) if shape.shift else None
    return partial(sdpa, layout, BACKENDS[name], mask)


def sdpa(layout: Layout, backend: SDPBackend, region: Tensor | None, qkv: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's attention by one backend, with partition, shift and mask around it."""
    q, k, v = (part.flatten(0, 1) for part in split_windows(qkv, layout))
    mask = None if bias is None else bias.unsqueeze(0)
    if region is not None and mask is not None:
        mask = (region + mask).repeat(q.shape[0] // region.shape[0], 1, 1, 1)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))
    count = (qkv.shape[1] // layout.window[0]) * (qkv.shape[2] // layout.window[1])
    return merge_windows(out.unflatten(0, (-1, count)), qkv.shape[1], qkv.shape[2], layout)


def compiled_as_timm(shape: Shape, like: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What timm runs by default between its two linear layers, through torch.compile."""
    torch._dynamo.reset()
    mask = shift_mask(shape.side, shape.side, shape.layout, like.device) if shape.shift else None
    way = partial(vit_as_timm, shape.heads) if shape.tokens else partial(swin_as_timm, shape.heads, shape.shift, mask)
    return torch.compile(way, dynamic=False)


def swin_as_timm(heads: int, shift: int, mask: Tensor | None, qkv: Tensor, bias: Tensor) -> Tensor:
    batch, height, width, channels = qkv.shape
    if shift:
        qkv = torch.roll(qkv, (-shift, -shift), (1, 2))
    parts = qkv.view(batch, height // 7, 7, width // 7, 7, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 49, channels)
    q, k, v = parts.reshape(-1, 49, 3, heads, channels // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
    if mask is not None:
        logits = (logits.view(-1, mask.shape[0], heads, 49, 49) + mask.unsqueeze(1).unsqueeze(0)).view(
            -1, heads, 49, 49
        )
    out = (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(-1, 7, 7, channels // 3)
    out = out.view(batch, height // 7, width // 7, 7, 7, -1).permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)
    return torch.roll(out, (shift, shift), (1, 2)) if shift else out


def vit_as_timm(heads: int, qkv: Tensor, bias: Tensor | None) -> Tensor:
    batch, _, tokens, channels = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, heads, channels // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (logits.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(batch, 1, tokens, channels // 3)


def compile_one(shape: Shape, device: str) -> None:
    """Fill the compiler's cache."""
    (qkv,), (grad,), bias = shape.inputs(1, device, torch.float32 if device == "cpu" else torch.bfloat16)
    out = compiled_as_timm(shape, qkv)(qkv, bias)
    torch.autograd.grad(out, [qkv] if bias is None else [qkv, bias], grad)


def window_goals(
    journal: Journal, found: dict[str, dict[str, dict[str, float]]], copy: float, shapes: dict[str, Shape]
) -> None:
    """Geometric means over Swin-T's stages against the fastest rival of each, as the goals are stated."""
    for shifted, what, goal in ((False, "forward", 1 / 1.5), (True, "forward", 0.5), (None, "backward", 0.5)):
        ratios, shares = [], []
        for name, passes in found.items():
            if not name.startswith("Swin") or shifted not in (None, "shifted" in name) or len(passes.get(what, {})) < 2:
                continue
            ours, shape = passes[what][OURS], shapes[name]
            size = shape.batch * shape.side**2 * shape.heads * shape.dim * 3 * 2
            shares.append(1e6 * size * (4 / 3 if what == "forward" else 7 / 3) / copy / ours)
            ratios.append(ours / min(us for rival, us in passes[what].items() if rival != OURS))
        if ratios:
            mean, share = statistics.geometric_mean(ratios), statistics.geometric_mean(shares)
            kind = {None: "", True: " shifted", False: " unshifted"}[shifted]
            text = f"{mean:.3f}x the best rival, {share:.0%} of the floor"
            holds = None if journal.small else mean <= goal and share >= 0.8
            journal.row(f"Swin-T stages{kind}, {what}", text, f"at most {goal:.3f}, at least 80%", holds)
