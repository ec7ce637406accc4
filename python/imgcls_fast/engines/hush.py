"""Lines that torch logs about itself and that are no news to a user: each by its logger and its beginning, nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_NO_NEWS = {  # logger -> beginnings of messages
    "torch.utils.cpp_extension": ("No CUDA runtime is found",),  # a toolkit without a GPU, while code for the CPU is compiled
}


@contextmanager
def hushed() -> Iterator[None]:
    """While entered, such lines are not logged; every other one is."""
    added = []
    for name, beginnings in _NO_NEWS.items():

        def news(record: logging.LogRecord, beginnings: tuple[str, ...] = beginnings) -> bool:
            return not record.getMessage().startswith(beginnings)

        logger = logging.getLogger(name)
        logger.addFilter(news)
        added.append((logger, news))
    try:
        yield
    finally:
        for logger, news in added:
            logger.removeFilter(news)
