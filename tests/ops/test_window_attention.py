"""Window attention: the kernel against float64, PyTorch's own error, hostile memory and hostile arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imgcls_fast import _C
from imgcls_fast.ops import window_attention as ops
from imgcls_fast.ops.library import cuda_missing
from imgcls_fast.ops.window_attention import (
    Layout,
    refusal,
    sequence_attention,
    window_attention,
    window_attention_formula,
)

ISAS = [
    name for name in ("base", "avx2", "avx512") if name in ("base", _C.isa()) or (name, _C.isa()) == ("avx2", "avx512")
]
# relative L2 against float64 on the same rounded inputs: output, dqkv; dbias and dhead_scale are float32 always
GATES = {torch.float32: (2e-6, 1e-5), torch.bfloat16: (4e-3, 4e-3), torch.float16: (5e-4, 5e-4)}
SUM_GATE = 1e-5


NO_GPU = "needs a CUDA device and a build with CUDA"
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not (torch.cuda.is_available() and cuda_missing() is None), reason=NO_GPU),
    ],
)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


@pytest.fixture(params=[*ISAS, GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the CPU, and the GPU."""
    if request.param == "cuda":
        yield "cuda"
        return
    _C.set_isa(request.param)
    yield "cpu"
    _C.set_isa("")


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2; NaN fails every comparison."""
    expected = expected.double()
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-30))


def make(
    batch: int, image: tuple[int, int], window: tuple[int, int], heads: int, dim: int, *, dtype: torch.dtype = torch.float32,
    bias: bool = True, cosine: bool = False, seed: int = 0,
) -> list[Tensor | None]:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    tokens = window[0] * window[1]
    qkv = torch.randn(batch, *image, 3 * heads * dim, generator=draw).to(dtype)
    table = torch.randn(heads, tokens, tokens, generator=draw) if bias else None
    scale = torch.rand(heads, generator=draw) * 20 + 1 if cosine else None
    return [qkv, table, scale]


def run(
    inputs: list[Tensor | None], heads: int, window: tuple[int, int], grad: Tensor, device: str = "cpu", **how: Any
) -> list[Tensor]:
    """Output and the gradient of every input that is there, back on the CPU."""
    leaves = [None if t is None else t.detach().to(device).requires_grad_() for t in inputs]
    qkv, bias, scale = leaves
    assert qkv is not None
    out = window_attention(qkv, heads, window, bias=bias, head_scale=scale, **how)
    there = [t for t in leaves if t is not None]
    return [t.cpu() for t in (out.detach(), *torch.autograd.grad(out, there, grad.to(out)))]


def skip_what_the_gpu_refuses(inputs: list[Tensor | None], heads: int, window: tuple[int, int], **how: Any) -> None:
    """Sizes that only the CPU half takes; that they are refused is what `refusal` says."""
    qkv, bias, scale = inputs
    assert qkv is not None
    layout = Layout(heads, window, grid=how.get("grid", False), shift=how.get("shift", (0, 0)))
    why = refusal(qkv.cuda(), layout, bias is not None, scale is not None)
    if why:
        pytest.skip(f"no GPU kernel: {why}")


def reference(
    inputs: list[Tensor | None], heads: int, window: tuple[int, int], grad: Tensor, **how: Any
) -> list[Tensor]:
    """The same in float64: partition, shift and mask as Swin's authors write them, with none of our code."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    qkv, bias, scale = leaves
    assert qkv is not None
    shift, grid = how.get("shift", (0, 0)), how.get("grid", False)
    batch, height, width, channels = qkv.shape
    (wh, ww), dim = window, channels // (3 * heads)
    where = torch.arange(height * width).view(height, width).roll((-shift[0], -shift[1]), (0, 1))
    region = torch.zeros(height, width)
    slices = [[slice(0, -w), slice(-w, -s if s else None), slice(-s if s else size, None)] for w, s, size in
              ((wh, shift[0], height), (ww, shift[1], width))]  # fmt: skip
    for number, (rows, columns) in enumerate(itertools.product(*slices)):
        region[rows, columns] = number
    out = torch.empty(batch, height * width, heads * dim, dtype=torch.float64)
    parts = qkv.reshape(batch, height * width, 3, heads, dim)
    down, across = height // wh, width // ww
    for wy, wx in itertools.product(range(down), range(across)):
        if grid:
            rows, columns = slice(wy, None, down), slice(wx, None, across)
        else:
            rows, columns = slice(wy * wh, (wy + 1) * wh), slice(wx * ww, (wx + 1) * ww)
        index, own = where[rows, columns].flatten(), region[rows, columns].flatten()
        q, k, v = parts[:, index].permute(2, 0, 3, 1, 4)
        if scale is not None:
            q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
            logits = q @ k.mT * scale.view(-1, 1, 1)
        else:
            logits = q @ k.mT * how.get("scale", dim**-0.5)
        logits = logits + (0 if bias is None else bias)
        if any(shift):
            logits = logits + (own[:, None] != own[None, :]) * -100.0
        out[:, index] = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, len(index), heads * dim)
    there = [t for t in leaves if t is not None]
    image = out.view(batch, height, width, heads * dim)
    return [image.detach(), *torch.autograd.grad(image, there, grad.double())]


#        batch, image, window, heads, head_dim, how
CASES: list[tuple[int, tuple[int, int], tuple[int, int], int, int, dict[str, Any]]] = [
    (2, (14, 14), (7, 7), 3, 32, {}),
    (2, (14, 21), (7, 7), 3, 32, {"shift": (3, 3)}),
    (2, (7, 14), (7, 7), 2, 32, {"shift": (0, 3)}),
    (1, (16, 16), (8, 8), 4, 64, {"shift": (4, 4), "bias": False}),
    (2, (14, 14), (7, 7), 2, 32, {"shift": (6, 1), "cosine": True}),
    (1, (16, 16), (8, 8), 2, 32, {"cosine": True, "bias": False}),
    (1, (24, 12), (12, 12), 2, 32, {"shift": (6, 6)}),
    (1, (16, 16), (16, 16), 1, 64, {}),
    (2, (21, 14), (7, 7), 1, 32, {"grid": True}),
    (2, (1, 197), (1, 197), 3, 64, {}),
    (2, (1, 50), (1, 50), 2, 64, {"bias": False}),
    (1, (1, 257), (1, 257), 1, 64, {}),
    (3, (3, 2), (1, 1), 1, 16, {}),
    (1, (4, 2), (2, 1), 12, 8, {}),
    (1, (3, 5), (3, 5), 3, 24, {}),
    (1, (4, 4), (4, 4), 4, 16, {"shift": (1, 3), "scale": 0.3}),
    (2, (1, 17), (1, 17), 2, 128, {}),
    (130, (4, 4), (4, 4), 1, 16, {}),
    (1, (5, 13), (5, 13), 1, 40, {}),
    (2, (4, 4), (4, 4), 5, 7, {"cosine": True}),
    (1, (2, 3), (2, 3), 1, 1, {}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)).replace(" ", ""))
def test_output_and_gradients_against_float64_and_against_pytorch_in_the_same_type(
    case: Any, dtype: torch.dtype, device: str
) -> None:
    batch, image, window, heads, dim, how = case
    how = dict(how)
    what = {"bias": how.pop("bias", True), "cosine": how.pop("cosine", False)}
    for seed in (0, 1):
        inputs = make(batch, image, window, heads, dim, dtype=dtype, seed=seed, **what)
        if device == "cuda":
            skip_what_the_gpu_refuses(inputs, heads, window, **how)
        grad = torch.randn(batch, *image, heads * dim, generator=torch.Generator().manual_seed(seed + 9)).to(dtype)
        expected = reference(inputs, heads, window, grad, **how)
        found = run(inputs, heads, window, grad, device, kernel=True, **how)
        own = _formula_run(inputs, heads, window, grad, **how)
        gates = (*GATES[dtype], SUM_GATE, SUM_GATE)
        for name, a, b, eager, gate in zip(
            ("out", "dqkv", "dbias", "dscale"), found, expected, own, gates, strict=False
        ):
            ours, theirs = error(a, b), error(eager, b)
            assert ours <= gate, f"{name}, seed {seed}: {ours:.1e} > {gate:.0e}"
            # no worse than PyTorch; below a few units in the last place of float32 the two differ by chance
            assert ours <= max(1.25 * theirs, 1e-6), f"{name}: {ours:.2e}, PyTorch's own {theirs:.2e}"


def _formula_run(
    inputs: list[Tensor | None], heads: int, window: tuple[int, int], grad: Tensor, **how: Any
) -> list[Tensor]:
    """PyTorch's formula in the inputs' own type, parameters cast to it as autocast does."""
    leaves = [None if t is None else t.detach().to(inputs[0].dtype).requires_grad_() for t in inputs]  # type: ignore[union-attr]
    qkv, bias, scale = leaves
    assert qkv is not None
    how.setdefault("scale", (qkv.shape[3] // (3 * heads)) ** -0.5)
    out = window_attention_formula(qkv, Layout(heads, window, **how), bias, scale)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


@pytest.mark.parametrize(("shift", "grid"), [((3, 3), False), ((0, 0), True)])
@pytest.mark.parametrize("cosine", [False, True])
def test_formula_and_fallback_are_the_same_function(shift: tuple[int, int], grid: bool, cosine: bool) -> None:
    inputs = make(2, (14, 14), (7, 7), 3, 16, cosine=cosine)
    grad = torch.randn(2, 14, 14, 48, generator=torch.Generator().manual_seed(3))
    expected = reference(inputs, 3, (7, 7), grad, shift=shift, grid=grid)
    double = [None if t is None else t.double() for t in inputs]
    for found, gate in (
        (run(double, 3, (7, 7), grad, shift=shift, grid=grid), 1e-12),
        (run(inputs, 3, (7, 7), grad, shift=shift, grid=grid, kernel=False), 3e-5),
    ):
        assert all(error(a, b) < gate for a, b in zip(found, expected, strict=True))


def test_gradients_by_finite_differences() -> None:
    qkv, bias, scale = (
        t.double().requires_grad_() for t in make(1, (4, 4), (2, 2), 2, 8, cosine=True) if t is not None
    )
    assert torch.autograd.gradcheck(lambda a, b: window_attention(a, 2, (2, 2), (1, 1), bias=b), (qkv, bias))
    assert torch.autograd.gradcheck(
        lambda a, b, c: window_attention(a, 2, (2, 2), bias=b, head_scale=c), (qkv, bias, scale)
    )


# --- memory -----------------------------------------------------------------------------------------------------------

_POISON = 0xFF  # as bytes: NaN in every float type
_BAND = 4096


def _guarded(tensor: Tensor, *, poison: bool) -> tuple[Tensor, Tensor]:
    """The bytes of `tensor` (poisoned if it is an output) between two bands of poison."""
    size = tensor.numel() * tensor.element_size()
    whole = torch.full((size + 2 * _BAND,), _POISON, dtype=torch.uint8)
    inner = whole[_BAND : _BAND + size].view(tensor.dtype).view(tensor.shape)
    if not poison:
        inner.copy_(tensor)
    return whole, inner


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize(
    ("image", "window", "heads", "dim", "shift"),
    [((14, 14), (7, 7), 3, 32, (3, 3)), ((3, 5), (3, 5), 3, 24, (0, 0)), ((1, 50), (1, 50), 1, 64, (0, 0))],
)
def test_everything_is_written_and_nothing_beside_it(
    image: tuple[int, int],
    window: tuple[int, int],
    heads: int,
    dim: int,
    shift: tuple[int, int],
    dtype: torch.dtype,
    isa: str,
) -> None:
    qkv, bias, _ = make(2, image, window, heads, dim, dtype=dtype)
    assert qkv is not None and bias is not None
    count, tokens = 2 * (image[0] // window[0]) * (image[1] // window[1]), window[0] * window[1]
    grad = torch.randn(2, *image, heads * dim).to(dtype)
    given = {"qkv": qkv, "bias": bias, "grad": grad}
    made = {
        "out": grad,
        "lse": torch.empty(count, heads, tokens),
        "dqkv": qkv,
        "dbias": bias,
    }
    buffers = {name: _guarded(t, poison=False) for name, t in given.items()}
    buffers |= {name: _guarded(t, poison=True) for name, t in made.items()}
    at = {name: inner.data_ptr() for name, (_, inner) in buffers.items()}
    common = {
        "sizes": (2, *image, heads, dim, *window, *shift), "grid": False, "scale": dim**-0.5, "mask_value": -100.0,
        "dtype": ops.DTYPES[dtype], "on_cuda": False, "stream": 0, "threads": 2,
    }  # fmt: skip
    _C.window_attention(qkv=at["qkv"], bias=at["bias"], head_scale=0, out=at["out"], lse=at["lse"], **common)
    _C.window_attention_grad(
        qkv=at["qkv"], bias=at["bias"], head_scale=0, lse=at["lse"], grad=at["grad"], dqkv=at["dqkv"], dbias=at["dbias"],
        dhead_scale=0, scratch=0, **common,
    )  # fmt: skip
    for name, (whole, inner) in buffers.items():
        assert inner.isfinite().all(), name
        bands = torch.cat([whole[:_BAND], whole[-_BAND:]])
        assert (bands == _POISON).all(), f"bytes beside {name} were written"
        if name in given:
            assert torch.equal(inner, given[name]), f"{name} was changed"
    expected = reference([qkv, bias, None], heads, window, grad, shift=shift)
    for name, value in zip(("out", "dqkv", "dbias"), expected, strict=True):
        assert error(buffers[name][1], value) <= max(GATES[dtype])


def test_strided_misaligned_and_expanded_inputs_give_the_same_result() -> None:
    qkv, bias, _ = make(2, (14, 14), (7, 7), 3, 32)
    assert qkv is not None and bias is not None
    grad = torch.randn(2, 14, 14, 96)
    expected = run([qkv, bias, None], 3, (7, 7), grad, kernel=True)
    flat = torch.empty(qkv.numel() + 1)
    forms = {
        "transposed": qkv.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": torch.cat([qkv, qkv], 3)[..., : qkv.shape[3]],
        "one element off": flat[1:].copy_(qkv.flatten()).view(qkv.shape),
    }
    for name, form in forms.items():
        found = run([form, bias.transpose(1, 2).contiguous().transpose(1, 2), None], 3, (7, 7), grad, kernel=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
    ones = run([qkv, bias, None], 3, (7, 7), torch.ones_like(grad), kernel=True)
    expanded = run([qkv, bias, None], 3, (7, 7), torch.ones(()).expand_as(grad), kernel=True)
    assert all(torch.equal(a, b) for a, b in zip(expanded, ones, strict=True))


def test_only_the_gradients_that_are_wanted() -> None:
    qkv, bias, _ = make(1, (7, 7), (7, 7), 2, 32)
    assert qkv is not None and bias is not None
    bias.requires_grad_()
    out = window_attention(qkv, 2, (7, 7), bias=bias, kernel=True)
    out.sum().backward()
    assert bias.grad is not None and qkv.grad is None
    with torch.no_grad():
        assert not window_attention(qkv, 2, (7, 7), bias=bias, kernel=True).requires_grad
    with pytest.raises(RuntimeError, match="once_differentiable"):
        squares = window_attention(qkv, 2, (7, 7), bias=bias, kernel=True).square().sum()
        (first,) = torch.autograd.grad(squares, bias, create_graph=True)
        first.sum().backward()


def test_no_images_give_no_output_and_zero_gradients() -> None:
    qkv, bias, _ = make(0, (7, 7), (7, 7), 2, 32)
    out, dqkv, dbias = run([qkv, bias, None], 2, (7, 7), torch.zeros(0, 7, 7, 64), kernel=True)
    assert out.shape == (0, 7, 7, 64) and dqkv.shape == (0, 7, 7, 192)
    assert torch.equal(dbias, torch.zeros_like(dbias))


# --- values -----------------------------------------------------------------------------------------------------------


def test_logits_of_ten_thousand_do_not_overflow(isa: str) -> None:
    qkv, bias, _ = make(1, (7, 7), (7, 7), 2, 32)
    assert qkv is not None and bias is not None
    for table in (bias * 1e4, bias - 1e4, bias + 1e4):
        grad = torch.randn(1, 7, 7, 64)
        expected = reference([qkv, table, None], 2, (7, 7), grad)
        found = run([qkv, table, None], 2, (7, 7), grad, kernel=True)
        theirs = _formula_run([qkv, table, None], 2, (7, 7), grad)
        for a, b, c in zip(found, expected, theirs, strict=True):
            assert error(a, b) <= max(1.5 * error(c, b), 2e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "bias"])
def test_what_is_not_finite_spreads_as_in_pytorch(value: float, where: str, isa: str) -> None:
    qkv, bias, _ = make(1, (7, 7), (7, 7), 2, 32)
    assert qkv is not None and bias is not None
    if where == "q":
        qkv[0, 2, 3, 5] = value
    else:
        bias[1, 4, 17] = value
    expected = window_attention(qkv, 2, (7, 7), bias=bias, kernel=False)
    found = window_attention(qkv, 2, (7, 7), bias=bias, kernel=True)
    assert torch.equal(found.isnan(), expected.isnan())
    assert expected.isnan().any() or value == -float("inf")
    torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_a_row_that_is_masked_as_a_whole_is_nan_as_in_pytorch(isa: str) -> None:
    qkv, bias, _ = make(1, (7, 7), (7, 7), 1, 32)
    assert qkv is not None and bias is not None
    bias[0, 5] = -float("inf")
    found = window_attention(qkv, 1, (7, 7), bias=bias, kernel=True).flatten(1, 2)[0]
    assert found[5].isnan().all()
    assert found[[k for k in range(49) if k != 5]].isfinite().all()


def test_masked_tokens_have_no_part_in_the_result(isa: str) -> None:
    """-inf in the bias is a probability of exactly zero, forwards and backwards."""
    qkv, bias, _ = make(1, (7, 7), (7, 7), 1, 32)
    assert qkv is not None and bias is not None
    bias[0, :, 9] = -float("inf")
    other = qkv.clone()
    other[0, 1, 2, 32:] = 1e6  # key and value of token 9
    grad = torch.randn(1, 7, 7, 32)
    a, b = (run([x, bias, None], 1, (7, 7), grad, kernel=True) for x in (qkv, other))
    assert torch.equal(a[0], b[0])
    assert (a[1][0, 1, 2, 32:] == 0).all() and (a[2][0, :, 9] == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and cuda_missing() is None), reason=NO_GPU)
class TestOnAGpu:
    """What only a GPU can show; `device` above runs the numbers there as well."""

    @pytest.mark.parametrize("dtype", GATES, ids=str)
    def test_twenty_repeats_are_bitwise_equal_amid_other_work(self, dtype: torch.dtype) -> None:
        inputs = make(16, (28, 28), (7, 7), 3, 32, dtype=dtype, cosine=True)
        grad = torch.randn(16, 28, 28, 96)
        first = run(inputs, 3, (7, 7), grad, "cuda", shift=(3, 3), kernel=True)
        noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
        for _ in range(20):
            with torch.cuda.stream(other):
                noise = noise @ noise / 2048
            again = run(inputs, 3, (7, 7), grad, "cuda", shift=(3, 3), kernel=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_a_captured_graph_replays_with_new_inputs(self) -> None:
        qkv, bias, _ = make(4, (14, 14), (7, 7), 3, 32, dtype=torch.bfloat16)
        assert qkv is not None and bias is not None
        pixels, table = qkv.cuda(), bias.cuda()
        window_attention(pixels, 3, (7, 7), (3, 3), bias=table, kernel=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = window_attention(pixels, 3, (7, 7), (3, 3), bias=table, kernel=True)
        pixels.copy_(qkv.flip(0))
        graph.replay()
        expected = window_attention(qkv.flip(0).cuda(), 3, (7, 7), (3, 3), bias=table, kernel=True)
        assert torch.equal(out, expected)

    def test_a_misaligned_tensor_is_copied_not_a_fault(self) -> None:
        qkv, bias, _ = make(2, (7, 7), (7, 7), 3, 32, dtype=torch.bfloat16)
        assert qkv is not None and bias is not None
        flat = torch.empty(qkv.numel() + 1, dtype=torch.bfloat16, device="cuda")
        off = flat[1:].copy_(qkv.flatten()).view(qkv.shape)
        found = window_attention(off, 3, (7, 7), bias=bias.cuda(), kernel=True)
        assert torch.equal(found, window_attention(qkv.cuda(), 3, (7, 7), bias=bias.cuda(), kernel=True))

    def test_more_windows_than_a_grid_has_rows_and_offsets_beyond_two_to_the_31(self) -> None:
        batch = 2**31 // (56 * 56 * 288) + 2
        if torch.cuda.mem_get_info()[0] < 3 * batch * 56 * 56 * 384:
            pytest.skip("needs 18 GB of GPU memory")
        qkv = torch.randn(batch, 56, 56, 288, dtype=torch.bfloat16, device="cuda")
        bias = torch.randn(3, 49, 49, device="cuda")
        whole = window_attention(qkv, 3, (7, 7), (3, 3), bias=bias, kernel=True)
        last = window_attention(qkv[-3:].contiguous(), 3, (7, 7), (3, 3), bias=bias, kernel=True)
        assert torch.equal(whole[-3:], last)


@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_twenty_repeats_are_bitwise_equal_and_threads_do_not_matter(dtype: torch.dtype) -> None:
    inputs = make(3, (14, 14), (7, 7), 3, 32, dtype=dtype, cosine=True)
    grad = torch.randn(3, 14, 14, 96)
    threads = torch.get_num_threads()
    first = run(inputs, 3, (7, 7), grad, shift=(3, 3), kernel=True)
    try:
        for k in range(20):
            torch.set_num_threads(1 + k % 3)
            again = run(inputs, 3, (7, 7), grad, shift=(3, 3), kernel=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_the_order_of_images_does_not_change_their_results() -> None:
    qkv, bias, _ = make(5, (14, 14), (7, 7), 3, 32)
    assert qkv is not None
    order = torch.tensor([3, 1, 4, 0, 2])
    whole = window_attention(qkv, 3, (7, 7), (3, 3), bias=bias, kernel=True)
    assert torch.equal(window_attention(qkv[order], 3, (7, 7), (3, 3), bias=bias, kernel=True), whole[order])
    assert torch.equal(window_attention(qkv[2:3], 3, (7, 7), (3, 3), bias=bias, kernel=True), whole[2:3])


# --- PyTorch's machinery ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cosine", "has_bias"), [(False, True), (True, False)])
def test_opcheck(cosine: bool, has_bias: bool) -> None:
    qkv, bias, scale = make(2, (8, 8), (4, 4), 2, 16, bias=has_bias, cosine=cosine)
    arguments = (2, (4, 4), (1, 2), False, 0.25, -100.0)
    torch.library.opcheck(torch.ops.imgcls.window_attention.default, (qkv, bias, scale, *arguments, False))
    torch.library.opcheck(torch.ops.imgcls.window_attention.default, (qkv, bias, scale, *arguments, True))
    _, lse = torch.ops.imgcls.window_attention(qkv, bias, scale, *arguments, True)
    grad = torch.randn(2, 8, 8, 32)
    torch.library.opcheck(torch.ops.imgcls.window_attention_grad.default, (grad, qkv, bias, scale, lse, *arguments))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
        self.table = torch.nn.Parameter(torch.randn(2, 16, 16))
        self.proj = torch.nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(window_attention(self.qkv(x), 2, (4, 4), (2, 2), bias=self.table, kernel=True))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_forwards_and_backwards_without_recompiling(block: Block, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    graphs = torch._dynamo.utils.counters["stats"]
    for n in (4, 7, 3) if dynamic else (4, 4):
        x = torch.randn(n, 8, 8, 32)
        results = []
        for module in (block, compiled):
            block.zero_grad()
            out = module(x)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
        assert all(error(a, b) < 1e-5 for a, b in zip(*results, strict=True))
        if n == 4:
            first = graphs["unique_graphs"]
    assert graphs["unique_graphs"] == first


def test_autocast_runs_in_its_type_and_the_bias_stays_float32(block: Block) -> None:
    x = torch.randn(2, 8, 8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
        whole = window_attention(torch.randn(1, 8, 8, 96), 2, (4, 4), bias=block.table, kernel=True)
    assert out.dtype == whole.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert block.table.grad is not None and block.table.grad.dtype == torch.float32
    assert error(out, block(x)) < 2e-2


def test_exported_graphs_hold_standard_operators_and_run_in_onnx_runtime(block: Block, tmp_path: Any) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    block.eval()
    x = torch.randn(2, 8, 8, 32)
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(block, (x,), dynamic_shapes=batch)
    assert not [n for n in program.graph.nodes if "imgcls" in str(n.target)]
    path = tmp_path / "block.onnx"
    torch.onnx.export(block, (x,), str(path), dynamo=True, dynamic_shapes=batch, external_data=False, verbose=False)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    other = torch.randn(5, 8, 8, 32)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    np.testing.assert_allclose(found, block(other).detach().numpy(), atol=2e-6)


def test_checkpointed_blocks_give_the_same_gradients(block: Block) -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, 8, 8, 32)
    found = []
    for call in (block, lambda t: checkpoint(block, t, use_reentrant=False)):
        block.zero_grad()
        call(x).sum().backward()
        found.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qkv": torch.zeros(2, 7, 7)}, r"qkv must be \(B, H, W, 3 \* C\)"),
        ({"qkv": torch.zeros(2, 7, 7, 96, dtype=torch.int64)}, "float32, float16, bfloat16"),
        ({"qkv": torch.zeros(2, 7, 7, 97)}, "3 \\* heads \\* head_dim"),
        ({"qkv": torch.zeros(2, 8, 7, 96)}, "do not divide the image of 8 x 7"),
        ({"qkv": torch.zeros(2, 0, 7, 96)}, "no tokens"),
        ({"heads": 0}, "heads must be a whole number from 1"),
        ({"window": (0, 7)}, "at least 1 x 1"),
        ({"window": (7,)}, "two numbers"),
        ({"shift": (7, 0)}, "0 <= shift < window"),
        ({"shift": (-1, 0)}, "0 <= shift < window"),
        ({"shift": (1, 0), "grid": True}, "grid attention has no shift"),
        ({"bias": torch.zeros(3, 48, 49)}, r"bias must be floats of \(2, 49, 49\)"),
        ({"bias": torch.zeros(2, 49, 49, dtype=torch.int32)}, "bias must be floats"),
        ({"bias": torch.zeros(2, 49, 49, device="meta")}, "one device"),
        ({"head_scale": torch.zeros(3)}, "head_scale must be 2 floats"),
        ({"head_scale": torch.zeros(2), "scale": 1.0}, "exclude each other"),
        ({"qkv": torch.zeros(2, 7, 7, 396), "heads": 1, "kernel": True}, "a head of 132 channels"),
        (
            {"qkv": torch.zeros(1, 1, 1100, 24), "heads": 1, "window": (1, 1100), "kernel": True},
            "windows of 1100 tokens",
        ),
        ({"qkv": torch.zeros(2, 7, 7, 96, dtype=torch.float64), "kernel": True}, "float64 has no kernel"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"qkv": torch.zeros(2, 7, 7, 96), "heads": 2, "window": (7, 7), **changes}
    with pytest.raises(ValueError, match=words):
        window_attention(**arguments)


def test_a_sequence_is_an_image_of_one_row() -> None:
    qkv, bias, _ = make(2, (1, 50), (1, 50), 2, 32)
    assert qkv is not None
    found = sequence_attention(qkv.squeeze(1), 2, bias=bias, kernel=True)
    assert torch.equal(found, window_attention(qkv, 2, (1, 50), bias=bias, kernel=True).squeeze(1))
    with pytest.raises(ValueError, match=r"qkv must be \(B, N, 3 \* C\)"):
        sequence_attention(qkv, 2)


@given(
    shape=st.lists(st.integers(0, 9), min_size=2, max_size=5),
    heads=st.integers(-1, 4),
    window=st.tuples(st.integers(-1, 9), st.integers(-1, 9)),
    shift=st.tuples(st.integers(-2, 9), st.integers(-2, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool]),
    bias=st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
    grid=st.booleans(),
    kernel=st.sampled_from([True, False, None]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_arguments_give_a_result_of_the_right_shape_or_a_value_error(
    shape: list[int], heads: int, window: tuple[int, int], shift: tuple[int, int], dtype: torch.dtype, bias: list[int] | None,
    grid: bool, kernel: bool | None,
) -> None:  # fmt: skip
    qkv = torch.ones(*shape, 8 * 3 * 2).to(dtype)
    table = None if bias is None else torch.ones(bias)
    try:
        out = window_attention(qkv, heads, window, shift, bias=table, grid=grid, kernel=kernel)
    except ValueError:
        return
    assert out.shape == (*qkv.shape[:3], 16) and out.dtype == dtype


@pytest.mark.parametrize("seed", range(20))
def test_random_valid_shapes_agree_with_the_formula(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for _ in range(10):
        window = (int(draw.integers(1, 10)), int(draw.integers(1, 10)))
        image = (window[0] * int(draw.integers(1, 4)), window[1] * int(draw.integers(1, 4)))
        shift = (int(draw.integers(0, window[0])), int(draw.integers(0, window[1])))
        heads, dim = int(draw.integers(1, 5)), int(draw.integers(1, 70))
        inputs = make(int(draw.integers(1, 4)), image, window, heads, dim, bias=bool(draw.integers(2)), seed=seed)
        grad = torch.randn(inputs[0].shape[0], *image, heads * dim)  # type: ignore[union-attr]
        found = run(inputs, heads, window, grad, shift=shift, kernel=True)
        expected = run([None if t is None else t.double() for t in inputs], heads, window, grad, shift=shift)
        assert all(error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True)), (image, window, shift, heads, dim)
