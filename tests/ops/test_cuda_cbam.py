"""The CUDA source of CBAM, run thread by thread on a CPU by tests/cuda_emulator, behind the real ops and gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from imgcls_fast.ops import cbam_ops
from imgcls_fast.ops.cbam import cbam, cbam_formula

GATES = {torch.float32: (2e-6, 1e-5), torch.bfloat16: (4e-3, 1e-2), torch.float16: (5e-4, 2e-3)}
RANDOM = 2  # enum Schedule of cuda_emulator.h
GUARD = 128  # floats of poison behind the scratch memory


class Forward(ctypes.Structure):
    """struct Cbam of cbam.h."""

    _fields_ = [
        *[
            (name, ctypes.c_void_p)
            for name in (
                "x",
                "w1",
                "w2",
                "conv",
                "affine",
                "residual",
                "out",
                "channel",
                "hidden_sums",
                "spatial",
                "scratch",
            )
        ],
        *[(name, ctypes.c_int64) for name in ("batch", "height", "width")],
        *[(name, ctypes.c_int32) for name in ("channels", "hidden", "kernel")],
        ("relu", ctypes.c_bool),
        ("dtype", ctypes.c_int32),
    ]


class Backward(ctypes.Structure):
    """struct CbamGrad of cbam.h."""

    _fields_ = [
        ("forward", Forward),
        *[
            (name, ctypes.c_void_p)
            for name in ("grad", "masked", "dx", "dw1", "dw2", "dconv", "daffine", "dlogits", "ties", "scratch")
        ],
    ]


class EmulatedExtension:
    """Stands in for `_C`: the CUDA half on the emulator, on tensors of the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.calls = 0

    def _forward(self, given: dict[str, Any]) -> Forward:
        n, c, h, w, hidden, kernel = given["sizes"]
        p = Forward(
            batch=n,
            height=h,
            width=w,
            channels=c,
            hidden=hidden,
            kernel=kernel,
            relu=given["relu"],
            dtype=given["dtype"],
        )
        for name, _ in Forward._fields_[:10]:
            setattr(p, name, given.get(name, 0))
        return p

    def _run(self, call: Any, p: Any, forward: Forward, steps: int, gradient: bool) -> None:
        floats = self.library.scratch_floats(ctypes.byref(forward), int(gradient))
        scratch = torch.full((floats + GUARD,), float("nan"))
        p.scratch = scratch.data_ptr()
        reason = call(ctypes.byref(p), steps)
        assert reason is None, reason
        assert scratch[floats:].isnan().all(), "memory behind the scratch was written"
        self.calls += 1

    def cbam(self, *, steps: int, **given: Any) -> None:
        p = self._forward(given)
        self._run(self.library.forward, p, p, steps, gradient=False)

    def cbam_grad(self, *, steps: int, **given: Any) -> None:
        g = Backward(forward=self._forward(given))
        for name, _ in Backward._fields_[1:-1]:
            setattr(g, name, given.get(name, 0))
        self._run(self.library.backward, g, g.forward, steps, gradient=True)


@pytest.fixture(scope="session")
def library(compiled: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    made = compiled("cbam")
    made.forward.restype = made.backward.restype = ctypes.c_char_p
    made.scratch_floats.restype = ctypes.c_int64
    return made


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedExtension]:
    library.set_device(2, 232448)
    library.set_schedule(RANDOM, 1)
    extension = EmulatedExtension(library)
    monkeypatch.setattr(cbam_ops, "EXTENSION", extension)
    yield extension
    assert extension.calls > 0, "the emulated kernels were not called"


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def inputs_of(
    n: int, c: int, h: int, w: int, hidden: int, kernel: int, dtype: torch.dtype, *, ties: bool
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, w, generator=draw)
    if ties:
        x = (x * 2).round().relu() / 2  # equal maxima, and zeros, as behind a ReLU
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    # gates that do not saturate: 1.0 twice in float32 would be a tie that float64 does not have
    weights = [0.3 * torch.randn(s, generator=draw) for s in ((hidden, c), (c, hidden), (1, 2, kernel, kernel))]
    residual = torch.randn(n, c, h, w, generator=draw).to(dtype).contiguous(memory_format=torch.channels_last)
    return [x, *weights, residual]


#         n, c, h, w, hidden, kernel
SHAPES = [(2, 16, 5, 7, 4, 7), (3, 70, 4, 4, 8, 3), (1, 5, 1, 1, 1, 7), (2, 8, 17, 9, 3, 5)]


@pytest.mark.parametrize("norm", ["none", "eval", "train"])
@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_output_and_gradients_against_float64(
    shape: tuple[int, ...], dtype: torch.dtype, norm: str, emulated: EmulatedExtension
) -> None:
    n, c, h, w, hidden, kernel = shape
    if norm == "train" and n * h * w < 8:
        n = 8  # a norm over two positions gives plus and minus one, and hardly a gradient
    for residual, ties in ((False, False), (True, True)):
        given = inputs_of(n, c, h, w, hidden, kernel, dtype, ties=ties)[: 5 if residual else 4]
        module = torch.nn.BatchNorm2d(1).train(norm == "train")
        with torch.no_grad():
            module.weight.fill_(1.3), module.bias.fill_(-0.2), module.running_mean.fill_(0.1)
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in given]
        out = cbam(
            *leaves[:4],
            None if norm == "none" else module,
            residual=leaves[4] if residual else None,
            relu=residual,
            kernel=True,
        )
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = [out.detach(), *torch.autograd.grad(out, leaves, direction)]

        twin = torch.nn.BatchNorm2d(1).double().train(norm == "train")
        with torch.no_grad():
            twin.weight.fill_(1.3), twin.bias.fill_(-0.2), twin.running_mean.fill_(0.1)
        doubles = [t.detach().double().requires_grad_() for t in given]
        expected = cbam_formula(
            *doubles[:4], None if norm == "none" else twin, doubles[4] if residual else None, residual
        )
        truth = [expected.detach(), *torch.autograd.grad(expected, doubles, direction.double())]
        gates = [GATES[dtype][0]] + [GATES[dtype][1]] * len(leaves)
        for k, (a, b, gate) in enumerate(zip(found, truth, gates, strict=True)):
            assert error(a, b) <= gate, (k, residual, error(a, b))


def test_repeats_are_bitwise_equal_in_any_order_of_threads(emulated: EmulatedExtension) -> None:
    given = inputs_of(3, 24, 6, 5, 4, 7, torch.bfloat16, ties=True)
    results = []
    for seed in range(3):
        emulated.library.set_schedule(RANDOM, seed)
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in given]
        out = cbam(*leaves[:4], residual=leaves[4], relu=True, kernel=True)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
