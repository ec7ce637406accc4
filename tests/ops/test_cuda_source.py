"""The CUDA source of window attention, run thread by thread on a CPU by tests/cuda_emulator: right, in bounds, ordered."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum DType of kernels.h
FIRST_WARP_AHEAD, LAST_WARP_AHEAD, RANDOM = 0, 1, 2  # enum Schedule of cuda_emulator.h
H200 = (2, 232448)  # multiprocessors (two are enough), bytes of shared memory that a block may have
RTX_4090 = (2, 101376)
GUARD_BYTES = 512
MAP_NORESERVE = 0x4000  # of Linux, which Python's mmap does not name


class Forward(ctypes.Structure):
    """struct WindowAttention of kernels.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("qkv", "bias", "head_scale", "out", "lse")],
        *[(name, ctypes.c_int64) for name in ("batch", "height", "width")],
        *[
            (name, ctypes.c_int32)
            for name in ("heads", "head_dim", "window_h", "window_w", "shift_h", "shift_w", "grid")
        ],
        ("scale", ctypes.c_float),
        ("mask_value", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    ]


class Backward(ctypes.Structure):
    """struct WindowAttentionGrad of kernels.h."""

    _fields_ = [
        ("forward", Forward),
        *[(name, ctypes.c_void_p) for name in ("grad", "dqkv", "dbias", "dhead_scale", "scratch")],
    ]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `image` and `window` are (height, width)."""

    image: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    grid: bool = False
    batch: int = 1
    heads: int = 2
    head_dim: int = 32
    bias: bool = True
    cosine: bool = False
    dtype: torch.dtype = torch.bfloat16
    mask_value: float = -100.0

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def windows(self) -> int:
        return self.batch * self.image[0] * self.image[1] // self.tokens

    def __str__(self) -> str:
        parts = [f"{self.image[0]}x{self.image[1]}", f"w{self.window[0]}x{self.window[1]}", f"d{self.head_dim}"]
        parts += [f"s{self.shift[0]}x{self.shift[1]}"] * any(self.shift) + ["grid"] * self.grid
        parts += ["cosine"] * self.cosine + ["plain"] * (not self.bias) + [str(self.dtype).removeprefix("torch.")]
        return "-".join(parts)


# The emulated device ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def library(compiled: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    """The kernels compiled for the emulator."""
    made = compiled("window_attention")
    for name in ("forward", "backward", "refusal", "scratch_floats"):
        getattr(made, name).restype = ctypes.c_char_p
    return made


@pytest.fixture(scope="session")
def faults(compiled: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    """A kernel with a choice of faults."""
    made = compiled("faults")
    made.mirror_with.restype = ctypes.c_char_p
    return made


@pytest.fixture
def emulator(library: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """An emulated H200 that runs its threads in random order."""
    library.set_device(*H200)
    library.set_schedule(RANDOM, 1)
    yield library
    library.set_only_y(ctypes.c_int64(-1))
    library.forget_memory()


class Memory:
    """Tensors in global memory: guarded on both sides, outputs full of NaN, and known to the emulator."""

    def __init__(self, emulator: ctypes.CDLL) -> None:
        self.emulator = emulator
        self.blocks: list[Tensor] = []
        emulator.forget_memory()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size_bytes = math.prod(shape) * dtype.itemsize
        block = torch.full((size_bytes + 2 * GUARD_BYTES + -size_bytes % 16,), 0xFF, dtype=torch.uint8)
        self.blocks.append(block)
        inside = block[GUARD_BYTES : GUARD_BYTES + size_bytes].view(dtype).view(shape)
        self.emulator.allow_memory(ctypes.c_void_p(inside.data_ptr()), ctypes.c_int64(size_bytes))
        return inside

    def holding(self, values: Tensor) -> Tensor:
        return self.empty(tuple(values.shape), values.dtype).copy_(values)

    def is_intact(self) -> bool:
        return all(bool((b[:GUARD_BYTES] == 0xFF).all() and (b[-GUARD_BYTES:] == 0xFF).all()) for b in self.blocks)


class SparseMemory(Memory):
    """Zeros that take room only where they are touched; no guards."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size_bytes = math.prod(shape) * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        inside = torch.frombuffer(mmap.mmap(-1, size_bytes, flags=flags), dtype=dtype).view(shape)
        self.blocks.append(inside)
        self.emulator.allow_memory(ctypes.c_void_p(inside.data_ptr()), ctypes.c_int64(size_bytes))
        return inside


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclasses.dataclass
class Inputs:
    qkv: Tensor  # (batch, height, width, 3, heads, head_dim)
    bias: Tensor | None  # (heads, N, N) float32
    head_scale: Tensor | None  # (heads) float32
    grad: Tensor  # (batch, height, width, heads, head_dim)


def inputs_of(case: Case, seed: int = 0) -> Inputs:
    draw = torch.Generator().manual_seed(seed)
    lead = (case.batch, *case.image)
    return Inputs(
        torch.randn(*lead, 3, case.heads, case.head_dim, generator=draw).to(case.dtype),
        torch.randn(case.heads, case.tokens, case.tokens, generator=draw) if case.bias else None,
        1 + 9 * torch.rand(case.heads, generator=draw) if case.cosine else None,
        torch.randn(*lead, case.heads, case.head_dim, generator=draw).to(case.dtype),
    )


def struct_of(case: Case, qkv: Tensor | None, bias: Tensor | None, head_scale: Tensor | None) -> Forward:
    return Forward(
        address(qkv), address(bias), address(head_scale), None, None, case.batch, *case.image, case.heads,
        case.head_dim, *case.window, *case.shift, int(case.grid), case.head_dim**-0.5, case.mask_value,
        DTYPES[case.dtype],
    )  # fmt: skip


def run(emulator: ctypes.CDLL, case: Case, given: Inputs, *, lse: bool = True) -> dict[str, Tensor]:
    """Forward and, with lse, backward: every output that the case has. Checks the guard bands."""
    memory = Memory(emulator)
    bias = None if given.bias is None else memory.holding(given.bias)
    head_scale = None if given.head_scale is None else memory.holding(given.head_scale)
    held = Inputs(memory.holding(given.qkv), bias, head_scale, memory.holding(given.grad))
    made = launch(emulator, case, memory, held, lse=lse)
    assert memory.is_intact()
    return made


def launch(emulator: ctypes.CDLL, case: Case, memory: Memory, held: Inputs, *, lse: bool = True) -> dict[str, Tensor]:
    """The same with inputs that already lie in `memory`."""
    made = {"out": memory.empty(tuple(held.grad.shape), case.dtype)}
    forward = struct_of(case, held.qkv, held.bias, held.head_scale)
    forward.out = address(made["out"])
    if lse:
        made["lse"] = memory.empty((case.windows, case.heads, case.tokens), torch.float32)
        forward.lse = address(made["lse"])
    check(emulator.forward(ctypes.byref(forward)))
    if not lse:
        return made
    made["dqkv"] = memory.empty(tuple(held.qkv.shape), case.dtype)
    if held.bias is not None:
        made["dbias"] = memory.empty(tuple(held.bias.shape), torch.float32)
    if held.head_scale is not None:
        made["dhead_scale"] = memory.empty(tuple(held.head_scale.shape), torch.float32)
    floats = ctypes.c_int64()
    check(emulator.scratch_floats(ctypes.byref(forward), ctypes.byref(floats)))
    backward = Backward(
        forward, address(held.grad), address(made["dqkv"]), address(made.get("dbias")),
        address(made.get("dhead_scale")), address(memory.empty((floats.value,), torch.float32)),
    )  # fmt: skip
    check(emulator.backward(ctypes.byref(backward)))
    return made


def check(why: bytes | None) -> None:
    assert why is None, why


# The formula, as Swin and MaxViT spell it -------------------------------------------------------------------------


def parted(x: Tensor, case: Case) -> Tensor:
    """(batch, height, width, C) as (batch * windows, N, C)."""
    (height, width), (wh, ww) = case.image, case.window
    if case.grid:
        x = x.reshape(-1, wh, height // wh, ww, width // ww, x.shape[-1]).permute(0, 2, 4, 1, 3, 5)
    else:
        x = x.reshape(-1, height // wh, wh, width // ww, ww, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, wh * ww, x.shape[-1])


def joined(windows: Tensor, case: Case) -> Tensor:
    """The inverse of parted."""
    (height, width), (wh, ww) = case.image, case.window
    x = windows.reshape(-1, height // wh, width // ww, wh, ww, windows.shape[-1])
    return x.permute(0, 3, 1, 4, 2, 5) if case.grid else x.permute(0, 1, 3, 2, 4, 5)


def swin_mask(case: Case) -> Tensor:
    """(windows of one image, 1, N, N): mask_value between tokens of different slices of the shifted image."""
    regions = torch.zeros(1, *case.image, 1, dtype=torch.float64)
    count = 0
    for rows in slices_of(case.image[0], case.window[0], case.shift[0]):
        for columns in slices_of(case.image[1], case.window[1], case.shift[1]):
            regions[:, rows, columns] = count
            count += 1
    of_tokens = parted(regions, case).squeeze(-1)
    different = of_tokens[:, None, :] != of_tokens[:, :, None]
    return torch.zeros(different.shape, dtype=torch.float64).masked_fill(different, case.mask_value)[:, None]


def slices_of(size: int, window: int, shift: int) -> tuple[slice, slice, slice]:
    return slice(0, size - window), slice(size - window, size - shift), slice(size - shift, size)


def expected(case: Case, given: Inputs) -> dict[str, Tensor]:
    """Every output in float64: roll, partition, attention, reverse, roll, and autograd."""
    qkv = given.qkv.double().requires_grad_()
    bias = None if given.bias is None else given.bias.double().requires_grad_()
    head_scale = None if given.head_scale is None else given.head_scale.double().requires_grad_()
    back = (-case.shift[0], -case.shift[1])
    windows = parted(qkv.flatten(3).roll(back, dims=(1, 2)), case)
    q, k, v = windows.unflatten(-1, (3, case.heads, case.head_dim)).permute(2, 0, 3, 1, 4)
    if head_scale is None:
        logits = q @ k.mT * case.head_dim**-0.5
    else:
        logits = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT * head_scale[:, None, None]
    if bias is not None:
        logits = logits + bias
    if any(case.shift):
        logits = (logits.unflatten(0, (case.batch, -1)) + swin_mask(case)).flatten(0, 1)
    out = joined((logits.softmax(-1) @ v).transpose(1, 2).flatten(2), case).reshape(given.qkv.shape[0], *case.image, -1)
    out = out.roll(case.shift, dims=(1, 2)).unflatten(-1, (case.heads, case.head_dim))
    out.backward(given.grad.double())
    made = {"out": out.detach(), "lse": logits.detach().logsumexp(-1), "dqkv": qkv.grad}
    if bias is not None:
        made["dbias"] = bias.grad
    if head_scale is not None:
        made["dhead_scale"] = head_scale.grad
    return made


def error_of(got: Tensor, want: Tensor) -> float:
    """Relative L2, absolute where everything is tiny; a NaN anywhere makes it NaN, which no gate lets pass."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1.0))


# What is promised -------------------------------------------------------------------------------------------------

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

CASES = [
    Case((1, 1), (1, 1)),
    Case((7, 7), (7, 7), heads=3),
    Case((14, 21), (7, 7), batch=2),
    Case((14, 21), (7, 7), (3, 3), batch=2, heads=3),
    Case((14, 21), (7, 7), (3, 3), batch=2, dtype=F16, head_dim=64),
    Case((14, 21), (7, 7), (3, 3), batch=2, dtype=F32),
    Case((14, 21), (7, 7), (3, 3), dtype=F32, head_dim=64, bias=False),
    Case((21, 14), (7, 7), (0, 3), dtype=F16, bias=False),
    Case((7, 7), (7, 7), (3, 3), dtype=F16),  # the window is the image
    Case((16, 24), (8, 8), (4, 4), head_dim=64),
    Case((16, 24), (8, 8), batch=2, dtype=F16),
    Case((16, 24), (8, 8), (4, 4), cosine=True),
    Case((16, 24), (8, 8), (4, 4), cosine=True, head_dim=64, dtype=F16),
    Case((16, 24), (8, 8), (4, 4), cosine=True, dtype=F32),
    Case((14, 21), (7, 7), grid=True, batch=2),
    Case((14, 21), (7, 7), (3, 2), grid=True, dtype=F16),
    Case((10, 12), (5, 4), (2, 1), dtype=F32),  # 20 tokens: two warps of the four have none
    Case((3, 150), (3, 50), dtype=F32, heads=1),  # 150 tokens of a window that is not square
    Case((3, 50), (1, 50), bias=False, head_dim=64),
    Case((3, 50), (1, 50), head_dim=64, dtype=F16),
    Case((4, 65), (1, 65), heads=1),
    Case((24, 12), (12, 12), (6, 6), batch=2),
    Case((24, 12), (12, 12), (6, 6), cosine=True, dtype=F32),
    Case((24, 24), (12, 12), (6, 6), cosine=True, dtype=F16, heads=1),
    Case((24, 24), (12, 12), grid=True, head_dim=64, heads=1),
    Case((32, 16), (16, 16), (8, 8), heads=1),
    Case((2, 197), (1, 197), head_dim=64, bias=False),
    Case((2, 197), (1, 197), head_dim=64, dtype=F16, heads=1),
    Case((1, 197), (1, 197), dtype=F32, heads=1),
    Case((1, 257), (1, 257), head_dim=64, heads=1),
]

# Relative L2 error against float64 on the same inputs. In float16 and bfloat16 cosine logits lose what rounding q and k to
# length 1 costs; everything else keeps float32 until the end.
GATES = {
    (F32, False): {"out": 2e-6, "lse": 1e-6, "dqkv": 2e-6, "dbias": 2e-6},
    (F16, False): {"out": 5e-4, "lse": 1e-6, "dqkv": 6e-4, "dbias": 2e-6},
    (BF16, False): {"out": 4e-3, "lse": 1e-6, "dqkv": 5e-3, "dbias": 2e-6},
    (F32, True): {"out": 2e-6, "lse": 1e-6, "dqkv": 2e-6, "dbias": 2e-6, "dhead_scale": 1e-5},
    (F16, True): {"out": 6e-4, "lse": 1e-4, "dqkv": 1e-3, "dbias": 1e-3, "dhead_scale": 2e-3},
    (BF16, True): {"out": 4e-3, "lse": 5e-4, "dqkv": 6e-3, "dbias": 4e-3, "dhead_scale": 1e-2},
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_float64(emulator: ctypes.CDLL, case: Case) -> None:
    given = inputs_of(case)
    got, want = run(emulator, case, given), expected(case, given)
    assert got.keys() == want.keys()
    gates = GATES[case.dtype, case.cosine]
    errors = {name: error_of(got[name], want[name]) for name in want}
    assert all(errors[name] < gates[name] for name in want), errors


@pytest.mark.parametrize(
    "case",
    [
        Case((14, 21), (7, 7), (3, 3), batch=2),
        Case((14, 21), (7, 7), (3, 3), batch=2, dtype=F32, cosine=True),
        Case((16, 16), (8, 8), (4, 4), batch=2, head_dim=64, dtype=F16, cosine=True),
        Case((24, 24), (12, 12), (6, 6), cosine=True),
        Case((8, 100), (1, 100), heads=1, dtype=F32),
    ],
    ids=str,
)
def test_the_order_of_threads_changes_no_bit(emulator: ctypes.CDLL, case: Case) -> None:
    given, seen = inputs_of(case), []
    for schedule, seed in ((FIRST_WARP_AHEAD, 1), (LAST_WARP_AHEAD, 2), (RANDOM, 3), (RANDOM, 3), (RANDOM, 4)):
        emulator.set_schedule(schedule, seed)
        seen.append(run(emulator, case, given))
    for name, first in seen[0].items():
        assert all(torch.equal(first, other[name]) for other in seen[1:]), name


@pytest.mark.parametrize("head_dim", [32, 64])
def test_a_small_device_gives_the_same_bits_with_one_window_in_memory(emulator: ctypes.CDLL, head_dim: int) -> None:
    case = Case((14, 21), (7, 7), (3, 3), batch=2, head_dim=head_dim, cosine=True)
    given = inputs_of(case)
    two_stages = run(emulator, case, given)
    emulator.set_device(*RTX_4090)
    one_stage = run(emulator, case, given)
    assert all(torch.equal(two_stages[name], one_stage[name]) for name in two_stages)


def test_where_the_fast_backward_does_not_fit_the_general_one_takes_over(emulator: ctypes.CDLL) -> None:
    emulator.set_device(2, 65536)
    case = Case((14, 14), (7, 7), (3, 3), dtype=F32)
    given = inputs_of(case)
    got, want = run(emulator, case, given), expected(case, given)
    assert all(error_of(got[name], want[name]) < 2e-6 for name in want)


@pytest.mark.parametrize("case", [Case((14, 14), (7, 7)), Case((12, 12), (12, 12))], ids=str)
def test_the_output_does_not_depend_on_whether_lse_is_kept(emulator: ctypes.CDLL, case: Case) -> None:
    given = inputs_of(case)
    assert torch.equal(run(emulator, case, given, lse=False)["out"], run(emulator, case, given)["out"])


@pytest.mark.parametrize("case", [Case((7, 14), (7, 7)), Case((1, 100), (1, 100))], ids=str)
def test_an_empty_batch_has_a_bias_gradient_of_zero(emulator: ctypes.CDLL, case: Case) -> None:
    empty = dataclasses.replace(case, batch=0)
    got = run(emulator, empty, inputs_of(empty))
    assert torch.equal(got["dbias"], torch.zeros_like(got["dbias"]))


@pytest.mark.parametrize("case", [Case((7, 14), (7, 7), dtype=F32), Case((1, 100), (1, 100), dtype=F32)], ids=str)
@pytest.mark.parametrize(
    "what", ["nan in q", "inf in k", "nan in v", "inf in the gradient", "row of -inf", "inf in bias"]
)
def test_nan_and_infinity_come_out_where_pytorch_has_them(emulator: ctypes.CDLL, case: Case, what: str) -> None:
    given = inputs_of(case)
    assert given.bias is not None
    if what == "row of -inf":
        given.bias[1, 5] = -math.inf
    elif what == "inf in bias":
        given.bias[0, 3, 4] = math.inf
    elif what == "inf in the gradient":
        given.grad[0, 0, 2, 1, 3] = math.inf
    else:
        part = "qkv".index(what[-1])
        given.qkv[0, 0, 2, part, 1, 3] = math.nan if "nan" in what else math.inf
    got, want = run(emulator, case, given), expected(case, given)
    for name in want.keys() - {"lse"}:  # of a row with inf it is NaN here, inf in PyTorch; the softmax is NaN in both
        assert torch.equal(got[name].isnan(), want[name].isnan()), name
        finite = want[name].isfinite()
        assert torch.allclose(got[name][finite].double(), want[name][finite], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("case", [Case((7, 14), (7, 7)), Case((1, 100), (1, 100), dtype=F16)], ids=str)
def test_logits_of_ten_thousand_neither_overflow_nor_vanish(emulator: ctypes.CDLL, case: Case) -> None:
    given = inputs_of(case)
    assert given.bias is not None
    given.bias.mul_(1e4)
    got, want = run(emulator, case, given), expected(case, given)
    assert error_of(got["out"], want["out"]) < 4e-3
    assert bool(got["dqkv"].isfinite().all() and got["dbias"].isfinite().all())


@pytest.mark.parametrize("case", [Case((14, 14), (7, 7), (3, 3)), Case((24, 12), (12, 12), (6, 6))], ids=str)
def test_a_mask_of_minus_infinity_hides_the_other_regions(emulator: ctypes.CDLL, case: Case) -> None:
    hiding = dataclasses.replace(case, mask_value=-math.inf)
    given = inputs_of(hiding)
    got, want = run(emulator, hiding, given), expected(hiding, given)
    assert error_of(got["out"], want["out"]) < 4e-3
    assert error_of(got["dqkv"], want["dqkv"]) < 5e-3


@pytest.mark.parametrize("window", [(7, 7), (7, 14)], ids=str)
def test_a_token_of_zeros_has_cosine_logits_of_zero_and_a_finite_gradient(
    emulator: ctypes.CDLL, window: tuple[int, int]
) -> None:
    case = Case((7, 14), window, cosine=True, dtype=F32)
    given = inputs_of(case)
    given.qkv[0, 0, 2, :2] = 0
    got, want = run(emulator, case, given), expected(case, given)
    assert all(error_of(got[name], want[name]) < 1e-5 for name in want)


@pytest.mark.parametrize("window", [(4, 4), (4, 18)], ids=str)
def test_offsets_beyond_32_bits_are_right(emulator: ctypes.CDLL, window: tuple[int, int]) -> None:
    """The last of 65535 heads, in an image whose qkv has over 2^31 elements that are nearly all untouched."""
    image = (12, 16) if window == (4, 4) else (12, 18)
    case = Case(image, window, (2, 1), heads=65535, head_dim=64)
    one = dataclasses.replace(case, heads=1)
    given, memory = inputs_of(one), SparseMemory(emulator)
    lead = (1, *image)
    held = Inputs(
        memory.empty((*lead, 3, case.heads, case.head_dim), case.dtype),
        memory.empty((case.heads, case.tokens, case.tokens), torch.float32),
        None,
        memory.empty((*lead, case.heads, case.head_dim), case.dtype),
    )
    assert given.bias is not None and held.bias is not None
    assert held.qkv.numel() > 1 << 31
    held.qkv[..., -1:, :], held.grad[..., -1:, :], held.bias[-1:] = given.qkv, given.grad, given.bias
    emulator.set_only_y(ctypes.c_int64(case.heads - 1))
    got, want = launch(emulator, case, memory, held), expected(one, given)
    last = {"out": got["out"][..., -1:, :], "dqkv": got["dqkv"][..., -1:, :], "dbias": got["dbias"][-1:]}
    errors = {name: error_of(last[name], want[name]) for name in last}
    assert all(error < GATES[BF16, False][name] for name, error in errors.items()), errors


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head_dim": 48}, "head_dim must be 32 or 64"),
        ({"heads": 0}, "heads must be"),
        ({"window_h": 5}, "windows must divide"),
        ({"window_h": 0}, "a window must have"),
        ({"window_w": 2000, "width": 2000}, "a window must have"),
        ({"shift_h": -1}, "the shift must be"),
        ({"shift_w": 21}, "the shift must be"),
        ({"dtype": 3}, "the dtype must be"),
        ({"height": 7 << 40}, "at most 2^30"),
        ({"qkv": 8}, "multiple of 16"),
    ],
    ids=str,
)
def test_wrong_sizes_are_refused_before_the_device_is_asked(
    emulator: ctypes.CDLL, change: dict[str, int], sentence: str
) -> None:
    emulator.set_device(0, 0)  # asking it is an error
    struct = struct_of(Case((14, 21), (7, 7)), None, None, None)
    for name, value in change.items():
        setattr(struct, name, value)
    for gradient in (0, 1):
        assert sentence in emulator.refusal(ctypes.byref(struct), gradient).decode()
    assert sentence in emulator.forward(ctypes.byref(struct)).decode()


def test_what_does_not_fit_into_shared_memory_is_refused(emulator: ctypes.CDLL) -> None:
    def refuses(device: tuple[int, int], tokens: int, dtype: torch.dtype, head_dim: int) -> tuple[bool, bool]:
        emulator.set_device(*device)
        case = Case((1, tokens), (1, tokens), dtype=dtype, head_dim=head_dim)
        struct = struct_of(case, None, None, None)
        forward, backward = (emulator.refusal(ctypes.byref(struct), gradient) for gradient in (0, 1))
        return forward is not None, backward is not None

    assert refuses(H200, 257, BF16, 64) == (False, False)
    assert refuses(H200, 256, F32, 32) == (False, False)
    assert refuses(H200, 257, F32, 64) == (False, True)
    assert refuses(H200, 1024, BF16, 64) == (True, True)
    assert refuses(RTX_4090, 64, F32, 32) == (False, False)
    assert refuses(RTX_4090, 64, F32, 64) == (False, True)
    assert refuses(RTX_4090, 144, BF16, 64) == (False, False)
    assert refuses(RTX_4090, 257, BF16, 32) == (False, False)
    assert refuses(RTX_4090, 257, BF16, 64) == (False, True)


def test_the_gradient_that_would_spill_registers_is_refused_with_its_own_sentence(emulator: ctypes.CDLL) -> None:
    def refusals(tokens: int, head_dim: int) -> tuple[bytes | None, bytes | None]:
        struct = struct_of(Case((1, tokens), (1, tokens), dtype=F32, head_dim=head_dim), None, None, None)
        forward, backward = (emulator.refusal(ctypes.byref(struct), gradient) for gradient in (0, 1))
        return forward, backward

    emulator.set_device(*H200)
    assert refusals(64, 64) == (None, None)
    assert refusals(65, 32) == (None, None)
    forward, backward = refusals(65, 64)
    assert forward is None
    assert backward == b"the float32 gradient of heads of 64 channels takes windows of up to 64 tokens."
    called = Backward(struct_of(Case((1, 65), (1, 65), dtype=F32, head_dim=64), None, None, None), 0, 0, 0, 0, 0)
    assert b"takes windows of up to 64 tokens" in emulator.backward(ctypes.byref(called))


def test_without_a_device_the_answer_is_a_sentence(emulator: ctypes.CDLL) -> None:
    struct = struct_of(Case((14, 21), (7, 7)), None, None, None)
    emulator.set_device(0, 0)
    assert emulator.refusal(ctypes.byref(struct), 0) == b"there is no CUDA device."
    assert b"no device" in emulator.forward(ctypes.byref(struct))


# The emulator itself ----------------------------------------------------------------------------------------------

FAULTS = {  # the numbers of enum Fault in faults.cpp, and what the emulator says; None: it shows in the result
    "none": (0, None),
    "no wait for the copy": (1, b"copies under way"),
    "no barrier": (2, None),
    "half a warp at a barrier of the warp": (3, b"wait for each other"),
    "lanes at different instructions": (4, b"lanes of a warp meet at"),
    "a thread that returns early": (5, b"after some threads have returned"),
    "a misaligned copy": (6, b"misaligned address in global memory"),
    "a copy from behind the tensor": (7, b"from outside the tensors"),
    "a write behind shared memory": (8, b"outside shared memory"),
    "more shared memory than asked for": (9, b"given leave for"),
}


@pytest.mark.parametrize("schedule", [FIRST_WARP_AHEAD, LAST_WARP_AHEAD, RANDOM])
def test_the_emulator_notices_faults(faults: ctypes.CDLL, schedule: int) -> None:
    given = torch.arange(4.0 * 128).view(128, 4)
    faults.forget_memory()
    faults.allow_memory(ctypes.c_void_p(given.data_ptr()), ctypes.c_int64(given.nbytes))
    faults.set_schedule(schedule, 1)
    for name, (number, sentence) in FAULTS.items():
        result = torch.zeros_like(given)
        said = faults.mirror_with(number, ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(result.data_ptr()))
        if sentence is None:
            assert said is None, name
            assert torch.equal(result, given.flip(0)) == (name == "none"), name
        else:
            assert sentence in (said or b""), name
