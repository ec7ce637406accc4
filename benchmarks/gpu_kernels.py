"""Every CUDA kernel once, forwards and backwards, on small shapes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python benchmarks/gpu_kernels.py

`gpu_check.py` runs it under memcheck, racecheck, initcheck and synccheck.
"""

from __future__ import annotations

import itertools
import sys

import torch

from imgcls_fast.ops.cbam import cbam, cbam_refusal
from imgcls_fast.ops.window_attention import window_attention


def main() -> int:
    if not torch.cuda.is_available():
        print("no usable GPU", file=sys.stderr)
        return 4
    ran = refused = 0
    shapes = (
        ((14, 14), (7, 7), (3, 3)),
        ((8, 8), (8, 8), (0, 0)),
        ((12, 12), (12, 12), (0, 0)),
        ((1, 197), (1, 197), (0, 0)),
    )
    types = (torch.bfloat16, torch.float16, torch.float32)
    for (image, window, shift), dtype, dim, cosine in itertools.product(shapes, types, (32, 64), (False, True)):
        tokens = window[0] * window[1]
        qkv = torch.randn(2, *image, 3 * 2 * dim, device="cuda").to(dtype).requires_grad_()
        bias = torch.randn(2, tokens, tokens, device="cuda").requires_grad_()
        scale = (torch.rand(2, device="cuda") * 10).requires_grad_() if cosine else None
        try:
            out = window_attention(qkv, 2, window, shift, bias=bias, head_scale=scale, kernel=True)
        except ValueError as error:
            print(f"refused: {error}")
            refused += 1
            continue
        out.sum().backward()
        ran += 1
    for (channels, side), dtype, residual in itertools.product(((64, 14), (96, 7), (5, 3)), types, (False, True)):
        x = torch.randn(2, channels, side, side, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        w1 = torch.randn(8, channels, device="cuda", requires_grad=True)
        w2 = torch.randn(channels, 8, device="cuda", requires_grad=True)
        conv = torch.randn(1, 2, 7, 7, device="cuda", requires_grad=True)
        assert cbam_refusal(x, conv) is None
        for norm in (None, torch.nn.BatchNorm2d(1).cuda()):
            cbam(
                x, w1, w2, conv, norm, residual=x.detach() if residual else None, relu=residual, kernel=True
            ).sum().backward()
            ran += 1
    torch.cuda.synchronize()
    print(f"{ran} calls, {refused} refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
