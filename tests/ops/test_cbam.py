"""CBAM: the kernel does what the formula says, for every input that a caller may bring."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imgcls_fast.ops.cbam import cbam, cbam_formula, cbam_refusal
from imgcls_fast.ops.library import EXTENSION

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the compiled half is not built")

SHAPES = [  # N, C, H, W, R, K
    (2, 64, 14, 14, 4, 7),
    (3, 35, 9, 5, 3, 3),  # no multiple of a vector, higher than wide
    (1, 130, 7, 19, 8, 5),
    (5, 48, 7, 7, 3, 7),
    (2, 1, 1, 1, 1, 7),
    (3, 17, 1, 1, 2, 1),
    (2, 1, 8, 33, 2, 7),
    (1, 256, 28, 28, 16, 7),  # several bands of rows
    (9, 96, 3, 2, 40, 7),  # several images share one reading of the weights
]
GATES = {torch.float32: (2e-6, 1e-5), torch.bfloat16: (4e-3, 4e-3), torch.float16: (5e-4, 5e-4)}  # result, gradients
SUM_GATE = 5e-5  # of a gradient of one number: a sum of terms of both signs, which may be close to zero
NHWC = torch.channels_last


def isas() -> list[str]:
    names = []
    for name in ("base", "avx2", "avx512"):
        try:
            EXTENSION.set_isa(name)
        except (ValueError, AttributeError):
            continue
        names.append(name)
    if EXTENSION is not None:
        EXTENSION.set_isa("")
    return names


@pytest.fixture(autouse=True)
def one_thread_and_best_isa() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    EXTENSION.set_isa("")


class Case:
    """Operands of one call, on their rounded values, and what the float64 formula makes of them."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        *,
        residual: bool = False,
        relu: bool = False,
        norm: str = "none",
        seed: int = 0,
        change: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        n, c, h, w, r, k = shape
        draw = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw)

        self.relu, self.dtype = relu, dtype
        self.x = change(normal(n, c, h, w)).to(dtype).contiguous(memory_format=NHWC)
        scale = max(c, 16) ** 0.5  # of few channels too: a gate of 1 - 1e-9 has no gradient in float32
        self.parameters = [normal(r, c) / scale, normal(c, r) / r**0.5, normal(1, 2, k, k) / k]
        self.residual = normal(n, c, h, w).to(dtype).contiguous(memory_format=NHWC) if residual else None
        self.grad = normal(n, c, h, w).to(dtype).contiguous(memory_format=NHWC)
        self.norm = None if norm == "none" else torch.nn.BatchNorm2d(1)
        if self.norm is not None:
            with torch.no_grad():
                for tensor, value in zip(self.norm.state_dict().values(), (1.3, 0.2, 0.1, 0.5), strict=False):
                    tensor.fill_(value)
            self.norm.train(norm == "train")

    def run(self, function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Result, gradients and running statistics of `function`; all operands in `dtype` where one is given."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.to(dtype or tensor.dtype).detach().clone(memory_format=torch.preserve_format).requires_grad_()

        norm = copy.deepcopy(self.norm)
        if norm is not None and dtype is not None:
            norm = norm.to(dtype)
        leaves = {"x": leaf(self.x)}
        leaves |= {name: leaf(t) for name, t in zip(("w1", "w2", "conv"), self.parameters, strict=True)}
        residual = None if self.residual is None else leaf(self.residual)
        out = function(*leaves.values(), norm, residual=residual, relu=self.relu)
        if residual is not None:
            leaves["residual"] = residual
        if norm is not None:
            leaves |= dict(norm.named_parameters())
        found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), self.grad.to(out.dtype)), strict=True))
        found["out"] = out.detach()
        if norm is not None:
            found |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
        return found


def kernel(*given: Any, **options: Any) -> Tensor:
    return cbam(*given, **options, kernel=True)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2; infinite for a NaN."""
    a, b = a.detach().double(), b.detach().double()
    gap = float((a - b).norm() / b.norm().clamp_min(1e-30))
    return gap if gap == gap else float("inf")


def assert_close(case: Case) -> None:
    exact, found = case.run(cbam_formula, torch.float64), case.run(kernel)
    eager = case.run(cbam_formula, case.dtype)
    of_result, of_gradients = GATES[case.dtype]
    for name, value in exact.items():
        gap, of_eager = distance(found[name], value), distance(eager[name], value)
        bound = of_result if name == "out" else of_gradients if value.numel() > 3 else max(of_gradients, SUM_GATE)
        assert gap <= bound, f"{name}: {gap:.1e}, eager {of_eager:.1e}"
        if case.dtype != torch.float32:
            assert gap <= max(of_eager, 1e-6), f"{name}: {gap:.1e}, worse than eager's {of_eager:.1e}"


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula_and_its_gradients(shape: tuple[int, ...], isa: str) -> None:
    EXTENSION.set_isa(isa)
    for seed, (residual, relu) in enumerate(itertools.product((False, True), repeat=2)):
        assert_close(Case(shape, residual=residual, relu=relu, seed=seed))


@pytest.mark.parametrize("norm", ["eval", "train"])
@pytest.mark.parametrize("shape", SHAPES[:3] + SHAPES[-2:], ids=str)
def test_normalises_as_the_module_does(shape: tuple[int, ...], norm: str) -> None:
    assert_close(Case(shape, norm=norm, residual=True, relu=True))
    assert_close(Case(shape, norm=norm, seed=1))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_no_more_than_eager_does(dtype: torch.dtype, isa: str) -> None:
    EXTENSION.set_isa(isa)
    for shape, norm in itertools.product((SHAPES[0], SHAPES[1], SHAPES[3]), ("none", "eval", "train")):
        assert_close(Case(shape, dtype, norm=norm, residual=True, relu=True))
        assert_close(Case(shape, dtype, norm=norm, seed=1))


@pytest.mark.parametrize("option", ["no_affine", "no_statistics", "cumulative", "frozen_weights"])
def test_obeys_the_options_of_the_norm(option: str) -> None:
    case = Case(SHAPES[0], norm="train", relu=True)
    if option == "no_affine":
        case.norm = torch.nn.BatchNorm2d(1, affine=False)
    elif option == "no_statistics":
        case.norm = torch.nn.BatchNorm2d(1, track_running_stats=False).eval()
        exact, found = (
            case.norm and cbam_formula(case.x, *case.parameters, case.norm),
            cbam(case.x, *case.parameters, case.norm),
        )
        torch.testing.assert_close(found, exact)
        return
    elif option == "cumulative":
        case.norm = torch.nn.BatchNorm2d(1, momentum=None)
        other = copy.deepcopy(case.norm)
        for factor in (1.0, 3.0):
            cbam_formula(case.x * factor, *case.parameters, case.norm)
            kernel(case.x * factor, *case.parameters, other)
        for name, value in case.norm.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value)
        return
    else:
        for parameter in case.norm.parameters():
            parameter.requires_grad_(False)
        x = case.x.clone().requires_grad_()
        kernel(x, *case.parameters, case.norm).sum().backward()
        assert x.grad is not None and all(p.grad is None for p in case.norm.parameters())
        return
    assert_close(case)


# --- ties, extremes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.relu(),  # zeros: ties of the maximum over the channels wherever all are 0
        lambda x: x.relu() * (x > 2),  # mostly zeros
        lambda x: torch.zeros_like(x),
        lambda x: torch.full_like(x, 0.5),  # every position shares the maximum of its channel
        lambda x: (x * 2).round() / 2,
        lambda x: -x.relu(),
    ],
    ids=["relu", "sparse", "zero", "constant", "steps", "negative"],
)
def test_equal_maxima_share_the_gradient(change: Callable[[Tensor], Tensor], isa: str) -> None:
    EXTENSION.set_isa(isa)
    case = Case((2, 20, 6, 5, 3, 7), change=change)
    case.parameters[0] = case.parameters[0].abs() / 10  # gates far from 0 and 1 ...
    case.parameters[1] = torch.ones_like(case.parameters[1])  # ... and equal, so that equal channels stay equal
    exact, found = case.run(cbam_formula, torch.float64), case.run(kernel)
    for name, value in exact.items():
        small = 2e-5 * float(value.abs().max())
        torch.testing.assert_close(found[name], value.float(), rtol=2e-5, atol=small, msg=name)


def test_the_gradient_of_relu_at_zero_is_zero() -> None:
    case = Case(SHAPES[1], residual=True, relu=True)
    case.residual = torch.where(torch.arange(5) % 2 == 0, case.residual, torch.zeros(()))
    case.x = torch.where(torch.arange(5) % 2 == 0, case.x, torch.zeros(()))  # every other column of the result is 0
    found = case.run(kernel)
    assert float(found["out"][..., 1::2].abs().max()) == 0 and float(found["residual"][..., 1::2].abs().max()) == 0
    assert_close(case)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("size", [1e-30, 1e4, 1e18])
def test_huge_and_tiny_values(size: float, isa: str) -> None:
    EXTENSION.set_isa(isa)
    case = Case(SHAPES[0], change=lambda x: x * size)
    exact = cbam_formula(case.x.double(), *map(Tensor.double, case.parameters))
    of_eager = distance(cbam_formula(case.x, *case.parameters), exact)
    assert distance(kernel(case.x, *case.parameters), exact) <= max(2e-6, 2 * of_eager)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "residual"])
def test_nan_and_infinity_go_where_the_formula_has_them(where: str, bad: float, relu: bool) -> None:
    case = Case((2, 35, 6, 9, 3, 3), residual=True, relu=relu)
    (case.x if where == "x" else case.residual)[1, -1, 3, 4] = bad
    found = kernel(case.x, *case.parameters, residual=case.residual, relu=relu)
    exact = cbam_formula(case.x, *case.parameters, None, case.residual, relu)
    torch.testing.assert_close(found, exact, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["w1", "w2", "conv"])
def test_a_nan_in_a_parameter_is_never_hidden(which: int, relu: bool) -> None:
    case = Case((2, 35, 6, 9, 3, 3), relu=relu)
    case.parameters[which].view(-1)[-1] = float("nan")
    exact = cbam_formula(case.x, *case.parameters, None, None, relu)
    found = kernel(case.x, *case.parameters, relu=relu)
    assert bool(exact.isnan().any()) and bool(found.isnan()[exact.isnan()].all())


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed", "misaligned", "expanded"])
def test_any_memory_layout_gives_the_same(layout: str) -> None:
    case = Case(SHAPES[1], residual=True, relu=True)
    n, c, h, w = case.x.shape
    if layout == "misaligned":
        room = torch.empty(case.x.numel() + 1)
        moved = room[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    elif layout == "sliced":
        moved = torch.empty(n, c + 3, h * 2, w)[:, 1 : c + 1, ::2]
    elif layout == "transposed":
        moved = torch.empty(w, h, c, n).permute(3, 2, 1, 0)
    elif layout == "expanded":
        case.x = case.x[:1].expand(n, c, h, w)
        moved = torch.empty(n, c, h, w)
    else:
        moved = torch.empty(n, c, h, w)
    moved.copy_(case.x)
    given = case.x if layout == "expanded" else moved
    wanted = kernel(case.x.clone(memory_format=NHWC), *case.parameters, residual=case.residual, relu=True)
    found = kernel(given, *case.parameters, residual=moved, relu=False)
    assert found.is_contiguous(memory_format=NHWC)
    torch.testing.assert_close(
        kernel(given, *case.parameters, residual=case.residual, relu=True), wanted, rtol=0, atol=0
    )


@pytest.mark.parametrize("norm", ["none", "train"])
def test_expanded_and_strided_gradients(norm: str) -> None:
    case = Case(SHAPES[1], norm=norm, residual=True, relu=True)
    for grad in (torch.ones(()).expand(case.x.shape), torch.randn(5, 9, 35, 3).permute(3, 2, 1, 0)):
        case.grad = grad
        assert_close(case)


@pytest.mark.parametrize("wanted", ["x", "w1", "w2", "conv", "residual", "norm"])
@pytest.mark.parametrize("norm", ["eval", "train"])
def test_any_one_gradient_alone(wanted: str, norm: str) -> None:
    case = Case(SHAPES[1], norm=norm, residual=True, relu=True)
    whole = case.run(kernel)
    given = {"x": case.x, **dict(zip(("w1", "w2", "conv"), case.parameters, strict=True)), "residual": case.residual}
    module = copy.deepcopy(case.norm).requires_grad_(wanted == "norm")
    leaf = module.weight if wanted == "norm" else given[wanted].requires_grad_()
    residual = given.pop("residual")
    out = kernel(*given.values(), module, residual=residual, relu=True)
    (grad,) = torch.autograd.grad(out, [leaf], case.grad)
    torch.testing.assert_close(grad, whole["weight" if wanted == "norm" else wanted], rtol=0, atol=0)


def test_an_empty_batch_is_an_empty_result() -> None:
    case = Case((0, 16, 5, 5, 2, 7), residual=True, relu=True)
    found = case.run(kernel)
    assert found["out"].shape == (0, 16, 5, 5)
    assert all(float(found[name].abs().sum()) == 0 for name in ("w1", "w2", "conv"))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[-1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_every_output_and_nothing_else(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    EXTENSION.set_isa(isa)
    n, c, h, w, r, k = shape
    case = Case(shape, dtype, residual=True, relu=True)
    bands: list[tuple[str, Tensor, int]] = []

    def room(name: str, count: int, kind: torch.dtype = torch.float32) -> int:
        size = torch.empty((), dtype=kind).element_size()
        guarded = torch.full((count * size + 256,), 0xFF, dtype=torch.uint8)  # NaN in every type
        bands.append((name, guarded, count * size))
        return guarded.data_ptr() + 128

    def checked() -> dict[str, Tensor]:
        found = {}
        for name, guarded, size in bands:
            assert bool((guarded[:128] == 0xFF).all() and (guarded[128 + size :] == 0xFF).all()), (
                f"{name}: out of bounds"
            )
            kind = dtype if name in ("out", "masked", "dx") else torch.float32
            found[name] = guarded[128 : 128 + size].view(kind)
            assert not bool(found[name].isnan().any()), f"{name}: not fully written"
        return found

    numel = n * c * h * w
    kept = {"channel": room("channel", 3 * n * c), "hidden_sums": room("hidden_sums", 2 * n * r)}
    kept |= {"spatial": room("spatial", 3 * n * h * w), "out": room("out", numel, dtype)}
    w1, w2, conv = case.parameters
    common = {
        "x": case.x.data_ptr(), "w1": w1.data_ptr(), "w2": w2.data_ptr(), "conv": conv.data_ptr(), "affine": 0,
        "scratch": 0, "sizes": (n, c, h, w, r, k), "relu": True, "dtype": 0 if dtype == torch.float32 else 2, "steps": 3,
        "on_cuda": False, "stream": 0, "threads": 2,
    }  # fmt: skip
    EXTENSION.cbam(**common, **kept, residual=case.residual.data_ptr())
    made = {"masked": room("masked", numel, dtype), "dx": room("dx", numel, dtype), "dw1": room("dw1", r * c)}
    made |= {"dw2": room("dw2", r * c), "dconv": room("dconv", 2 * k * k), "daffine": room("daffine", 2)}
    made |= {"dlogits": room("dlogits", n * h * w), "ties": room("ties", n * h * w)}
    EXTENSION.cbam_grad(**common, **kept, **made, grad=case.grad.data_ptr())
    found, wanted = checked(), case.run(kernel)
    for name, other in (
        ("out", "out"),
        ("dx", "x"),
        ("masked", "residual"),
        ("dw1", "w1"),
        ("dw2", "w2"),
        ("dconv", "conv"),
    ):
        value = (
            wanted[other].permute(0, 2, 3, 1) if found[name].dtype == dtype and value_is_image(name) else wanted[other]
        )
        assert torch.equal(found[name], value.reshape(-1)), name


def value_is_image(name: str) -> bool:
    return name in ("out", "dx", "masked")


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["eval", "train"])
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[-1], (7, 20, 5, 6, 4, 7)], ids=str)
def test_twenty_repeats_and_two_threads_are_bitwise_equal(shape: tuple[int, ...], norm: str) -> None:
    case = Case(shape, norm=norm, residual=True, relu=True)
    first = case.run(kernel)
    for repeat in range(20):
        # torch's own sum over the maps, in training, may depend on the number of threads
        torch.set_num_threads(1 + repeat % 2 if norm == "eval" else 1)
        for name, value in case.run(kernel).items():
            assert torch.equal(value, first[name]), name


def test_an_image_does_not_depend_on_its_batch() -> None:
    case = Case((9, 96, 3, 2, 40, 7))
    whole = kernel(case.x, *case.parameters)
    for image in range(9):
        assert torch.equal(kernel(case.x[image : image + 1], *case.parameters), whole[image : image + 1])


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def operands(relu: bool = True) -> dict[str, tuple[Any, ...]]:
    """Arguments for every op."""
    case = Case((2, 19, 5, 4, 3, 7), residual=True)
    affine = torch.tensor([1.2, 0.1])
    out, channel, sums, spatial = torch.ops.imgcls.cbam(case.x, *case.parameters, affine, case.residual, relu)
    given = out if relu else None
    grad = case.grad
    _, dlogits, ties = torch.ops.imgcls.cbam_apply_grad(grad, case.x, given, channel, spatial, affine)
    kept = channel, sums, spatial
    return {
        "cbam": (case.x, *case.parameters, affine, case.residual, relu),
        "cbam_maps": (case.x, *case.parameters),
        "cbam_apply": (case.x, channel, spatial, affine, None, relu),
        "cbam_grad": (grad, case.x, given, *case.parameters, affine, *kept),
        "cbam_apply_grad": (grad, case.x, given, channel, spatial, None),
        "cbam_maps_grad": (grad, case.x, *case.parameters, affine, *kept, dlogits, ties),
    }


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", ["cbam", "cbam_maps", "cbam_apply", "cbam_grad", "cbam_apply_grad", "cbam_maps_grad"])
def test_obeys_the_rules_of_a_custom_op(name: str, relu: bool) -> None:
    torch.library.opcheck(getattr(torch.ops.imgcls, name).default, operands(relu)[name])


def test_float64_goes_through_the_formula_and_passes_gradcheck() -> None:
    case = Case((2, 5, 4, 3, 2, 3), residual=True)
    given = [t.double().requires_grad_() for t in (case.x, *case.parameters, case.residual)]
    assert cbam_refusal(given[0], given[3]) == "float64 has no kernel"
    assert torch.autograd.gradcheck(lambda *t: cbam(*t[:4], residual=t[4], relu=True), given)
    with pytest.raises(ValueError, match="no kernel for this CBAM: float64"):
        cbam(*given[:4], kernel=True)


def test_there_is_no_second_derivative() -> None:
    case = Case(SHAPES[1])
    x = case.x.requires_grad_()
    (grad,) = torch.autograd.grad(kernel(x, *case.parameters).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dynamic", "norm"),
    [
        ("inductor", False, "eval"),
        ("inductor", True, "train"),
        ("aot_eager", True, "eval"),
        ("aot_eager", False, "train"),
    ],
)
def test_compiles_as_one_graph(backend: str, dynamic: bool, norm: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, *rest, **options: kernel(x * 2, *rest, **options) + 1,
        fullgraph=True,
        dynamic=dynamic,
        backend=backend,
    )
    for batch in (3, 5) if dynamic else (3,):
        case = Case((batch, 20, 6, 5, 3, 7), norm=norm, residual=True, relu=True)
        plain = case.run(lambda x, *rest, **options: kernel(x * 2, *rest, **options) + 1)
        for name, value in case.run(compiled).items():
            torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("norm", ["none", "eval", "train"])
def test_under_autocast_the_gates_stay_float32(norm: str) -> None:
    case = Case(SHAPES[0], torch.bfloat16, norm=norm, residual=True, relu=True)
    plain = case.run(kernel)
    with torch.autocast("cpu", torch.bfloat16):
        within = case.run(kernel)
        fallback = cbam(case.x, *case.parameters, case.norm, residual=case.residual, relu=True, kernel=False)
    for name, value in plain.items():
        assert torch.equal(within[name], value), name
    assert fallback.dtype == torch.bfloat16 and distance(fallback, plain["out"]) < 1e-3


def test_a_wider_residual_widens_the_result() -> None:
    case = Case(SHAPES[0], torch.bfloat16)
    found = kernel(case.x, *case.parameters, residual=torch.ones(case.x.shape))
    assert found.dtype == torch.float32
    assert distance(found, cbam_formula(case.x.float(), *case.parameters) + 1) < 2e-6


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        case = Case((2, 20, 6, 5, 3, 7), norm="eval")
        self.w1, self.w2, self.conv = (torch.nn.Parameter(t) for t in case.parameters)
        self.norm = case.norm

    def forward(self, x: Tensor) -> Tensor:
        return cbam(x * 1.5, self.w1, self.w2, self.conv, self.norm, residual=x, relu=True)


def test_an_exported_graph_holds_standard_operators_only() -> None:
    block, x = Block().eval(), torch.randn(2, 20, 6, 5)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith("aten.") for target in targets), targets
    torch.testing.assert_close(program.module()(x), block(x))


def test_onnx_runtime_agrees() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    block, x = Block().eval(), torch.randn(3, 20, 6, 5)
    program = torch.onnx.export(block, (x,), dynamo=True, verbose=False)
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, block(x).detach().numpy(), rtol=1e-4, atol=1e-5)


# --- arguments --------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "x of three sizes": (lambda a: a.update(x=a["x"][0]), "x must be"),
    "no channels": (lambda a: a.update(x=torch.zeros(2, 0, 4, 4)), "x must be"),
    "no rows": (lambda a: a.update(x=torch.zeros(2, 8, 0, 4)), "x must be"),
    "whole numbers": (lambda a: a.update(x=a["x"].int()), "x must be float32"),
    "no tensor": (lambda a: a.update(w1=3), "w1 must be a tensor"),
    "sparse": (lambda a: a.update(w1=a["w1"].to_sparse()), "w1 must be a dense"),
    "w1 of other channels": (lambda a: a.update(w1=torch.zeros(2, 9)), "w1 must be"),
    "w1 without rows": (lambda a: a.update(w1=torch.zeros(0, 8)), "w1 must be"),
    "w2 not turned": (lambda a: a.update(w2=a["w2"].T), "w2 must be"),
    "even kernel": (lambda a: a.update(conv_weight=torch.zeros(1, 2, 4, 4)), "conv_weight must be"),
    "kernel not square": (lambda a: a.update(conv_weight=torch.zeros(1, 2, 3, 5)), "conv_weight must be"),
    "three maps": (lambda a: a.update(conv_weight=torch.zeros(1, 3, 3, 3)), "conv_weight must be"),
    "other device": (lambda a: a.update(w2=a["w2"].to("meta")), "w2 must be on cpu"),
    "residual of another shape": (lambda a: a.update(residual=torch.zeros(1, 8, 4, 4)), "residual must have"),
    "norm of two channels": (lambda a: a.update(norm=torch.nn.BatchNorm2d(2)), "norm must be of 1 channel"),
    "norm that is a number": (lambda a: a.update(norm=1.0), "norm must be a module"),
    "group norm": (lambda a: a.update(norm=torch.nn.GroupNorm(1, 1)), "no kernel for this CBAM: GroupNorm"),
    "kernel too large": (lambda a: a.update(conv_weight=torch.zeros(1, 2, 9, 9)), "no kernel for this CBAM: a conv"),
    "one position in training": (
        lambda a: a.update(x=torch.zeros(1, 8, 1, 1), norm=torch.nn.BatchNorm2d(1)),
        "more than one position",
    ),
}


def arguments() -> dict[str, Any]:
    return {
        "x": torch.zeros(2, 8, 4, 4), "w1": torch.zeros(2, 8), "w2": torch.zeros(8, 2), "conv_weight": torch.zeros(1, 2, 3, 3)
    }  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_argument_is_refused_by_name(what: str) -> None:
    given, (spoil, message) = arguments(), BAD[what]
    spoil(given)
    with pytest.raises(ValueError, match=message):
        cbam(**given, kernel=True)


def test_what_has_no_kernel_takes_the_formula() -> None:
    given = arguments() | {"x": torch.randn(2, 8, 4, 4), "norm": torch.nn.GroupNorm(1, 1)}
    torch.testing.assert_close(cbam(**given), cbam_formula(*given.values()))


DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool])
SIZES = st.lists(st.integers(0, 4), max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.fixed_dictionaries({name: st.one_of(st.none(), st.tuples(SIZES, DTYPES)) for name in arguments()}),
    relu=st.booleans(),
    op=st.booleans(),
)
def test_arguments_work_or_raise_value_error(shapes: dict[str, Any], relu: bool, op: bool) -> None:
    given = arguments()
    for name, change in shapes.items():
        if change is not None:
            given[name] = torch.zeros(change[0], dtype=change[1])
    try:
        if op:
            out = torch.ops.imgcls.cbam(*given.values(), None, None, relu)[0]
        else:
            out = cbam(**given, relu=relu)
    except ValueError:
        return
    assert out.shape == given["x"].shape
