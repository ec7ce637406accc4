"""Decodes images in a child process of `shelter.py`, which may die of one."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, BinaryIO

import numpy as np

from . import shelter
from .decode import Undecodable, decode_bytes
from .shelter import HEAD


def serve() -> None:
    """Answer until the pipe is closed."""
    shelter.limit_this_process(int(sys.argv[1]))
    shelter.enter()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a decoder that writes to stdout must not be taken for an answer
    while head := sys.stdin.buffer.read(HEAD.size):
        words_bytes, content_bytes = HEAD.unpack(head)
        words = json.loads(sys.stdin.buffer.read(words_bytes))
        _answer(out, sys.stdin.buffer.read(content_bytes), words)


def _answer(out: BinaryIO, content: bytes, words: dict[str, Any]) -> None:
    pixels: np.ndarray | None = None
    try:
        pixels, orientation = decode_bytes(content, **words)
        answer: dict[str, Any] = {"shape": pixels.shape, "orientation": orientation}
    except Undecodable as error:
        answer = {"reason": error.reason}
    text = json.dumps(answer).encode("ascii")
    out.write(HEAD.pack(len(text), pixels.nbytes if pixels is not None else 0))
    out.write(text)
    if pixels is not None:
        out.write(pixels.tobytes())
    out.flush()


if __name__ == "__main__":
    serve()
