"""Our attention kernels beside what a user would run instead: ratio, spread, and on a GPU the share of the byte floor.

    python benchmarks/bench_ops.py [--only window cbam sequence step] [--device cpu|cuda] [--rounds N] [--out FILE]

On the CPU: one thread, CPU time. On a GPU: CUDA events, bf16. Every contender is first compared with the formula in
float32; one that disagrees is not timed. Then all run in random order, round by round, in this one process; a ratio is the
median over rounds of contender / rival, with the least and greatest. The rival of a promise is the fastest of its
rivals. Both sides begin with the output of the qkv layer in image order and end there, so partition, shift and their
inverses are timed wherever a contender needs them. The byte floor is what must be read and written once, at the speed
of a copy measured here.

A rival that cannot run is listed with its reason. Exit code 1 when a promise does not hold, 0 otherwise.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from imgcls_fast import _C
from imgcls_fast.core import env
from imgcls_fast.models.attention import CBAM
from imgcls_fast.models.kernels import use_kernels
from imgcls_fast.models.placement import insert_attention
from imgcls_fast.ops import cbam as cbam_ops
from imgcls_fast.ops.window_attention import (
    Layout,
    merge_windows,
    shift_mask,
    split_windows,
    window_attention,
    window_attention_formula,
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative L2 against the formula in float32
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


@dataclass
class Case:
    """One table row group: contenders of equal result.

    Args:
        name: of the group.
        contenders: name -> function of the inputs; "ours" is one of them.
        inputs: leaves of the gradient. The forward pass is timed on detached ones, as in inference.
        floor: bytes that must move at least, forward and backward.
        goals: pass -> largest allowed ratio of ours to the fastest rival; None: reported only.
    """

    name: str
    contenders: dict[str, Callable[..., Tensor]]
    inputs: list[Tensor]
    grad: Tensor
    floor: tuple[int, int]
    goals: dict[str, float | None]
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def detached(self) -> list[Tensor]:
        return [tensor.detach() for tensor in self.inputs]


class Bench:
    """Times cases and collects rows."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = torch.device(device), rounds
        self.rows: list[dict[str, Any]] = []
        self.copy_speed = self._copy_speed() if device == "cuda" else None

    def clock(self, call: Callable[[], Any]) -> float:
        """Seconds of one call: of CPU time, or on the GPU (the mean of a few, so that launches overlap)."""
        if self.device.type == "cpu":
            begin = time.process_time()
            call()
            return time.process_time() - begin
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(5):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 5e3

    def _copy_speed(self) -> float:
        a, b = (torch.empty(1 << 28, dtype=torch.uint8, device=self.device) for _ in range(2))
        times = [self.clock(lambda: b.copy_(a)) for _ in range(10)]
        return 2 * a.numel() / statistics.median(times)

    def run(self, case: Case) -> None:
        """Check, then time forward and backward of each contender that is right."""
        working: dict[str, Callable[..., Tensor]] = {}
        truth = None
        for name, call in case.contenders.items():
            try:
                with torch.no_grad():
                    found = call(*case.detached).float()
                torch.autograd.grad(call(*case.inputs), case.inputs, case.grad)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                case.absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
                continue
            truth = found if truth is None else truth
            wrong = float((found - truth).norm() / truth.norm())
            if wrong > TOLERANCE[case.inputs[0].dtype] or wrong != wrong:
                case.absent[name] = f"differs from the formula by {wrong:.1e} (relative L2)"
                continue
            working[name] = call
        self._time(
            case, "forward", {name: _without_gradient(call, case) for name, call in working.items()}, case.floor[0]
        )
        self._time_backward(case, working)
        for name, why in case.absent.items():
            print(f"     {case.name:<44} absent: {name}: {why}", flush=True)
            self.rows.append({"case": case.name, "contender": name, "absent": why})

    def _time_backward(self, case: Case, working: dict[str, Callable[..., Tensor]]) -> None:
        """Of the backward pass alone: the graph is built outside the clock."""
        seconds: dict[str, list[float]] = {name: [] for name in working}
        for k in range(self.rounds + 2):
            for name in random.sample(list(working), len(working)):
                graphs = {name: working[name](*case.inputs)}
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                spent = self.clock(_gradient_of(graphs.pop(name), case, again=self.device.type == "cuda"))
                if k >= 2:
                    seconds[name].append(spent)
        self._report(case, "backward", seconds, case.floor[1])

    def _time(self, case: Case, what: str, calls: dict[str, Callable[[], Any]], floor: int) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for k in range(self.rounds + 2):  # the first two warm up
            for name in random.sample(list(calls), len(calls)):
                spent = self.clock(calls[name])
                if k >= 2:
                    seconds[name].append(spent)
        self._report(case, what, seconds, floor)

    def _report(self, case: Case, what: str, seconds: dict[str, list[float]], floor: int) -> None:
        middle = {name: statistics.median(found) for name, found in seconds.items()}
        rivals = [name for name in middle if name != "ours"]
        best = min(rivals, key=middle.__getitem__, default=None)
        for name, found in seconds.items():
            row: dict[str, Any] = {
                "case": case.name,
                "pass": what,
                "contender": name,
                "ms": round(middle[name] * 1e3, 4),
            }
            text = f"{middle[name] * 1e3:9.3f} ms"
            if name == "ours" and best is not None:
                ratios = sorted(a / b for a, b in zip(found, seconds[best], strict=True))
                row |= {"rival": best, "ratio": round(statistics.median(ratios), 4), "least": round(ratios[0], 4),
                        "greatest": round(ratios[-1], 4)}  # fmt: skip
                text += f"  {row['ratio']:.3f}x {best} [{row['least']:.3f}, {row['greatest']:.3f}]"
                goal = case.goals.get(what)
                if goal is not None:
                    row |= {"goal": goal, "holds": row["ratio"] <= goal}
                    text += f"  goal {goal:.3f}"
            if self.copy_speed and floor:
                row["share_of_floor"] = round(floor / self.copy_speed / middle[name], 3)
                text += f"  {row['share_of_floor']:.0%} of the byte floor"
            mark = {True: "ok  ", False: "FAIL", None: "    "}[row.get("holds")]
            print(f"{mark} {case.name:<44} {what:<9} {name:<20} {text}", flush=True)
            self.rows.append(row)


def _gradient_of(out: Tensor, case: Case, *, again: bool) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(out, case.inputs, case.grad, retain_graph=again)


def _without_gradient(call: Callable[..., Tensor], case: Case) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            call(*case.detached)

    return run


# --- cases ------------------------------------------------------------------------------------------------------------


def window_case(
    bench: Bench, name: str, batch: int, side: int, heads: int, dim: int, window: int, shift: int, goals: dict[str, float | None]
) -> Case:  # fmt: skip
    """Attention of one Swin layer on a batch of square maps; the bias is trained."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    layout = Layout(heads, (window, window), (shift, shift), scale=dim**-0.5)
    torch.manual_seed(0)
    qkv = torch.randn(batch, side, side, 3 * heads * dim, device=bench.device).to(dtype).requires_grad_()
    bias = torch.randn(heads, layout.tokens, layout.tokens, device=bench.device).requires_grad_()
    element = qkv.element_size()
    floor = (
        qkv.numel() * element * 4 // 3,
        qkv.numel() * element * 7 // 3,
    )  # qkv and out; qkv, its gradient, and out's
    return _attention_case(bench, name, qkv, bias, layout, floor, goals)


def _attention_case(
    bench: Bench, name: str, qkv: Tensor, bias: Tensor | None, layout: Layout, floor: tuple[int, int],
    goals: dict[str, float | None],
) -> Case:  # fmt: skip
    def ours(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        return window_attention(qkv, layout.heads, layout.window, layout.shift, bias=bias, kernel=True)

    def formula(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        return window_attention_formula(qkv, layout, None if bias is None else bias.to(qkv.dtype))

    def sdpa(qkv: Tensor, bias: Tensor | None = None, backend: SDPBackend | None = None) -> Tensor:
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
        windows = (qkv.shape[1] // layout.window[0]) * (qkv.shape[2] // layout.window[1])
        return merge_windows(out.unflatten(0, (-1, windows)), qkv.shape[1], qkv.shape[2], layout)

    contenders: dict[str, Callable[..., Tensor]] = {
        "eager formula": formula,
        "ours": ours,
        "compiled formula": torch.compile(formula),
    }
    contenders |= {"sdpa": sdpa, "compiled sdpa": torch.compile(sdpa), "flex": _flex(layout, qkv.device)}
    if bench.device.type == "cuda":
        contenders |= {name: functools.partial(sdpa, backend=backend) for name, backend in BACKENDS.items()}
    inputs = [qkv] if bias is None else [qkv, bias]
    grad = torch.randn(*qkv.shape[:3], qkv.shape[3] // 3, device=qkv.device).to(qkv.dtype)
    return Case(name, contenders, inputs, grad, floor, goals)


def _flex(layout: Layout, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention with the bias, and the shift mask, as a score modification."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)

    def run(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        height, width = qkv.shape[1:3]
        mask = shift_mask(height, width, layout, device) if any(layout.shift) else None

        def score(logit: Tensor, window: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if bias is not None:
                logit = logit + bias[head, i, j]
            return logit if mask is None else logit + mask[window % mask.shape[0], i, j]

        q, k, v = (part.flatten(0, 1).contiguous() for part in split_windows(qkv, layout))
        out = compiled(q, k, v, score_mod=score if bias is not None or mask is not None else None)
        windows = (height // layout.window[0]) * (width // layout.window[1])
        return merge_windows(out.unflatten(0, (-1, windows)), height, width, layout)

    return run


def windows(bench: Bench) -> None:
    """K1: Swin-T's stages."""
    if bench.device.type == "cpu":
        bench.run(
            window_case(
                bench, "512 windows of 7x7, 3 heads of 32", 512, 7, 3, 32, 7, 0, {"forward": 0.9, "backward": 1.0}
            )
        )
        bench.run(window_case(bench, "8 maps of 56x56, shifted, 3 heads of 32", 8, 56, 3, 32, 7, 3, {}))
        return
    for stage, (side, heads) in enumerate(((56, 3), (28, 6), (14, 12), (7, 24)), start=1):
        for shift in (0, 3) if side > 7 else (0,):
            text = f"Swin-T stage {stage}, batch 128{', shifted' if shift else ''}"
            bench.run(window_case(bench, text, 128, side, heads, 32, 7, shift, {}))


def sequences(bench: Bench) -> None:
    """K2: ViT."""
    cpu = bench.device.type == "cpu"
    for tokens, biased in itertools.product((50, 197) if cpu else (50, 197, 257), (False, True)):
        heads, batch = (6, 4) if cpu else (12, 128)
        dtype = torch.float32 if cpu else torch.bfloat16
        torch.manual_seed(0)
        qkv = torch.randn(batch, 1, tokens, 3 * heads * 64, device=bench.device).to(dtype).requires_grad_()
        bias = torch.randn(heads, tokens, tokens, device=bench.device).requires_grad_() if biased else None
        layout = Layout(heads, (1, tokens), scale=64**-0.5)
        size = qkv.numel() * qkv.element_size()
        name = f"{'BEiT' if biased else 'ViT'}, {tokens} tokens, {heads} heads of 64"
        bench.run(_attention_case(bench, name, qkv, bias, layout, (size * 4 // 3, size * 7 // 3), {}))


def cbams(bench: Bench) -> None:
    """K3."""
    cpu = bench.device.type == "cpu"
    shapes = ((8, 256, 56), (16, 512, 28), (32, 2048, 7)) if cpu else ((128, 256, 56), (128, 512, 28), (128, 2048, 7))
    goals: dict[str, float | None] = (
        {"forward": 0.8, "backward": 1.0} if cpu else {"forward": 1 / 1.4, "backward": 1 / 1.4}
    )
    for (batch, channels, side), (residual, training) in itertools.product(shapes, ((0, 0), (1, 0), (0, 1))):
        torch.manual_seed(0)
        module = CBAM(channels).to(bench.device).train(bool(training))
        x = torch.randn(batch, channels, side, side, device=bench.device)
        x = (
            x.to(torch.float32 if cpu else torch.bfloat16)
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_()
        )
        r = torch.randn_like(x).requires_grad_() if residual else None
        inputs = [x, *([] if r is None else [r]), module.w1, module.w2, module.conv.weight]
        call = functools.partial(_cbam, norm=module.norm, residual=residual)
        formula, ours = functools.partial(call, kernel=False), functools.partial(call, kernel=True)
        size = x.numel() * x.element_size()
        floor = ((2 + residual) * size, (3 + 2 * residual) * size)
        contenders = {"eager formula": formula, "ours": ours, "compiled formula": torch.compile(formula)}
        name = f"CBAM {batch}x{channels}x{side}x{side}"
        name += f"{' + residual, ReLU' if residual else ''}{', norm of the batch' if training else ''}"
        bench.run(Case(name, contenders, inputs, torch.randn_like(x), floor, {} if training else goals))


def _cbam(x: Tensor, *rest: Tensor, norm: nn.Module, residual: int, kernel: bool) -> Tensor:
    r = rest[0] if residual else None
    return cbam_ops.cbam(x, *rest[residual:], norm, residual=r, relu=bool(residual), kernel=kernel)


def steps(bench: Bench) -> None:
    """A whole training step: forward, loss, backward, optimizer; both sides compiled on a GPU, neither on a CPU."""
    import timm

    cpu = bench.device.type == "cpu"
    batch = 4 if cpu else 128
    for name, attention, goal in (
        ("swin_tiny_patch4_window7_224", (), None if cpu else 1 / 1.10),
        ("vit_small_patch16_224", (), None),
        ("resnet50", ("cbam@every-block",), None),
    ):
        torch.manual_seed(0)
        images = torch.randn(batch, 3, 224, 224, device=bench.device).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (batch,), device=bench.device)
        calls: dict[str, Callable[[], Any]] = {}
        for contender, mode in (("timm", "off"), ("ours", "on")):
            model = timm.create_model(name, num_classes=10)
            if attention:
                from imgcls_fast.models.build import ModelSpec

                insert_attention(model, ModelSpec(f"timm/{name}", num_outputs=10, image_size=224, attention=attention))
            model = model.to(bench.device, memory_format=torch.channels_last).train()
            use_kernels(model, mode)
            calls[contender] = _step(bench, model, images, labels)
        text = f"training step, {name}{' + cbam' if attention else ''}, batch {batch}"
        case = Case(text, {}, [], images, (0, 0), {"step": goal})
        bench._time(case, "step", calls, 0)


def _step(bench: Bench, model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Any]:
    on_gpu = bench.device.type == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=on_gpu)
    forward = torch.compile(model) if on_gpu else model

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


PARTS = {"window": windows, "sequence": sequences, "cbam": cbams, "step": steps}


def measure(device: str, parts: list[str], rounds: int) -> dict[str, Any]:
    """Run the parts; returns what the JSON file holds."""
    random.seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(device, rounds)
    for name in parts:
        PARTS[name](bench)
        torch._dynamo.reset()
    facts: dict[str, Any] = {**env.machine_facts(), "isa": _C.isa(), "device": device, "rounds": rounds}
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "copy_gb_per_s": round((bench.copy_speed or 0) / 1e9)}
    else:
        facts |= {"threads": 1}
    return {"machine": facts, "rows": bench.rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/<machine>/ops.json)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    result = measure(options.device, options.only, options.rounds)
    place = env.machine_slug(torch.cuda.get_device_name() if options.device == "cuda" else None)
    out = options.out or Path(__file__).parent / "results" / place / "ops.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failed = [row for row in result["rows"] if row.get("holds") is False]
    print(f"written to {out}; {len(failed)} promises do not hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
