"""Torch's own lines do not leak, and nothing else is kept back."""

from __future__ import annotations

import logging

import pytest

from imgcls_fast.engines.hush import hushed


def test_a_line_of_torch_about_a_missing_gpu_is_not_shown_while_code_is_compiled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("torch.utils.cpp_extension")
    with caplog.at_level(logging.WARNING), hushed():
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
        logger.warning("the compiler is too old")
        logging.getLogger("torch.other").warning("No CUDA runtime is found")
    assert [record.getMessage() for record in caplog.records] == ["the compiler is too old", "No CUDA runtime is found"]
    caplog.clear()
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
    assert len(caplog.records) == 1
    assert not logger.filters
