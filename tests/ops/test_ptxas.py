"""What the assembler says about the CUDA kernels: registers within budget, nothing spilled."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "window_attention.cu"
DTYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32"}  # as mangled

# Registers of a thread. 168 let three CTAs of 128 threads run on a multiprocessor, 255 two of 128 or one of 256 (65536
# registers; CUDA programming guide, compute capability 9.0).
BUDGETS = {
    ("small_forward", 32): 168,
    ("small_forward", 64): 168,
    ("large_forward", 32): 128,
    ("large_forward", 64): 168,
    ("small_backward", 32): 200,
    ("small_backward", 64): 248,
    ("large_backward", 32): 255,
    ("large_backward", 64): 255,
}
FP32_BUDGET = 255
ABSENT = {("large_backward", 64, "fp32")}  # would spill, so it is not built and window_attention_refusal says so


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], tuple[int, int]]:
    """Registers and spilled bytes of each kernel on sm_90, by name, head_dim and dtype."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    target = tmp_path_factory.mktemp("ptxas") / "window_attention.o"
    flags = "-std=c++17 -O3 -gencode arch=compute_90,code=sm_90 -Xptxas -v -c"
    done = subprocess.run([nvcc, *flags.split(), str(SOURCE), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {}
    for block in done.stderr.split("Compiling entry function")[1:]:
        name = re.search(r"\d+((?:small|large)_(?:forward|backward))I(13__nv_bfloat16|6__half|f)Li(\d+)E", block)
        registers = re.search(r"Used (\d+) registers", block)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        assert registers and spills, block
        if name:
            key = (name[1], int(name[3]), DTYPES[name[2]])
            made[key] = (int(registers[1]), int(spills[1]) + int(spills[2]))
    return made


@pytest.mark.slow
def test_every_kernel_is_there_once(reported: dict[tuple[str, int, str], tuple[int, int]]) -> None:
    assert set(reported) == {(*key, dtype) for key in BUDGETS for dtype in DTYPES.values()} - ABSENT


@pytest.mark.slow
def test_no_kernel_spills(reported: dict[tuple[str, int, str], tuple[int, int]]) -> None:
    spilling = {key for key, (_, spilled_bytes) in reported.items() if spilled_bytes > 0}
    assert not spilling


@pytest.mark.slow
def test_registers_are_within_budget(reported: dict[tuple[str, int, str], tuple[int, int]]) -> None:
    over = {
        key: registers
        for key, (registers, _) in reported.items()
        if registers > (FP32_BUDGET if key[2] == "fp32" else BUDGETS[key[:2]])
    }
    assert not over
