"""Leaving the process as it was found: torch's settings and random numbers belong to the caller of a function."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_found() -> Iterator[None]:
    """While entered, threads, deterministic mode and random states may be changed; afterwards they are as before.

    Building a network draws random numbers although weights from a file replace them, so this holds for asking a model
    as well as for training one. May be used as a decorator.
    """
    import numpy as np
    import torch

    backend = torch.backends.cudnn
    threads, dtype, precision = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    flags = backend.enabled, backend.benchmark, backend.deterministic
    draws, numpy_draws, python_draws = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed, on_gpu = torch.initial_seed(), torch.cuda.is_initialized()
    gpu_draws = torch.cuda.get_rng_state_all() if on_gpu else []
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        if (backend.enabled, backend.benchmark, backend.deterministic) != flags:
            backend.enabled, backend.benchmark, backend.deterministic = flags
        if on_gpu:
            torch.cuda.set_rng_state_all(gpu_draws)
        elif torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)  # as the caller's own seed would have started it
        torch.set_rng_state(draws)
        np.random.set_state(numpy_draws)
        random.setstate(python_draws)
