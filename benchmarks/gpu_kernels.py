"""Every CUDA kernel once, forwards and backwards, on small shapes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck --kernel-name kns=imgcls python benchmarks/gpu_kernels.py
    ncu --clock-control none python benchmarks/gpu_kernels.py --profile

A kernel gets as many CTAs a head as run at once on the GPU, and one at least. So with about 400 heads one CTA takes all windows of
its head, one after the other: prefetch, change of stages and the sums over windows run, which a few heads on a large GPU leave out.
`gpu_check.py` runs it under memcheck and racecheck. `--profile` is Swin-T's first stage at batch 128 instead.
"""

from __future__ import annotations

import itertools
import sys

import torch

from imgcls_fast.ops.cbam import cbam, cbam_refusal
from imgcls_fast.ops.window_attention import window_attention

MANY = 400  # heads: more than CTAs that fit on a GPU at once, whatever the kernel
#          images, map, window, shift, heads
SHAPES = (
    (1, (28, 28), (7, 7), (3, 3), MANY),  # Swin's first stages in windows; 16 of them for each CTA
    (1, (14, 14), (7, 7), (0, 0), MANY),
    (2, (14, 14), (7, 7), (3, 3), 2),
    (2, (8, 8), (8, 8), (0, 0), 2),
    (3, (1, 197), (1, 197), (0, 0), MANY),
    (2, (12, 12), (12, 12), (0, 0), 2),
    (2, (1, 197), (1, 197), (0, 0), 2),
)


def main() -> int:
    if not torch.cuda.is_available():
        print("no usable GPU", file=sys.stderr)
        return 4
    if "--profile" in sys.argv[1:]:
        attention(128, (56, 56), (7, 7), (3, 3), 3, torch.bfloat16, 32, False)
        torch.cuda.synchronize()
        return 0
    ran = refused = 0
    types = (torch.bfloat16, torch.float32, torch.float16)
    for shape, dtype, dim, cosine in itertools.product(SHAPES, types, (32, 64), (False, True)):
        if shape[-1] == MANY and (cosine or (dtype == torch.float16 and dim == 64)):
            continue
        try:
            attention(*shape, dtype, dim, cosine)
        except ValueError as error:
            print(f"refused: {error}")
            refused += 1
            continue
        ran += 1
        print(f"case {shape}, {dtype}, {dim}{', cosine' if cosine else ''}", flush=True)
    for (channels, side), dtype, residual in itertools.product(((64, 14), (96, 7), (5, 3)), types, (False, True)):
        for norm in (None, torch.nn.BatchNorm2d(1).cuda()):
            channel_attention(channels, side, dtype, residual, norm)
            ran += 1
            print(f"case CBAM {channels}x{side}x{side}, {dtype}", flush=True)
    torch.cuda.synchronize()
    print(f"{ran} calls, {refused} refused")
    return 0


def attention(
    batch: int, image: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], heads: int, dtype: torch.dtype,
    dim: int, cosine: bool,
) -> None:  # fmt: skip
    tokens = window[0] * window[1]
    qkv = torch.randn(batch, *image, 3 * heads * dim, device="cuda").to(dtype).requires_grad_()
    bias = torch.randn(heads, tokens, tokens, device="cuda").requires_grad_()
    scale = (torch.rand(heads, device="cuda") * 10).requires_grad_() if cosine else None
    out = window_attention(qkv, heads, window, shift, bias=bias, head_scale=scale, kernel=True)
    out.sum().backward()
    torch.cuda.synchronize()


def channel_attention(
    channels: int, side: int, dtype: torch.dtype, residual: bool, norm: torch.nn.BatchNorm2d | None
) -> None:
    x = torch.randn(2, channels, side, side, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    w1 = torch.randn(8, channels, device="cuda", requires_grad=True)
    w2 = torch.randn(channels, 8, device="cuda", requires_grad=True)
    conv = torch.randn(1, 2, 7, 7, device="cuda", requires_grad=True)
    assert cbam_refusal(x, conv) is None
    other = x.detach() if residual else None
    cbam(x, w1, w2, conv, norm, residual=other, relu=residual, kernel=True).sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
