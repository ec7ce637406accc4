"""A stranger's ONNX file, opened and run once in a process that may use so much memory and time, before it is opened here.

What a graph costs cannot be read from its bytes: forty nodes that each join a tensor with itself make a terabyte. A runtime
that is asked for that much ends its process, or the machine's others.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

from ..core import child
from ..core.bounds import TRIAL_BYTES, TRIAL_SECONDS
from ..core.errors import ExportError
from ..core.pixels import Pixels

_FILE_TIMES = 16  # memory per byte of the file, beside TRIAL_BYTES
_LOADED = b"loaded\n"  # the child writes it between opening the file and running it
_passed: set[tuple[str, str]] = set()  # (runtime, SHA-256 of the file)


def demand_survivable(path: Path, digest: str, runtime: str, pixels: Pixels) -> None:
    """Raise unless a process like this one survives the file. Tried once per file.

    Args:
        path: the file.
        digest: its SHA-256.
        runtime: onnx or openvino.
        pixels: what the bundle promises to give it; the batch is the graph's own, else one image.

    Raises:
        ExportError: E005 when the process died, could not run the file on such pixels, or needed more than
            `bounds.TRIAL_BYTES` or `bounds.TRIAL_SECONDS`.
    """
    if (runtime, digest) in _passed:
        return
    image = [pixels.size, pixels.size, pixels.channels]
    task = {"path": str(path), "runtime": runtime, "image": image, "bytes": TRIAL_BYTES + _FILE_TIMES * path.stat().st_size}
    try:
        ended = child.run("engines.trial", json.dumps(task), options=("-W", "ignore"), timeout=2 * TRIAL_SECONDS)
        status, words, loaded = ended.returncode, ended.stderr, ended.stdout.endswith(_LOADED)
    except TimeoutExpired:
        status, words, loaded = -24, b"", False  # as the limit on CPU time ends it
    last = next((line for line in reversed(words.decode("utf-8", "replace").splitlines()) if line.strip()), "")
    # what the runtime refuses to open, in words of its own, it refuses in this process as well
    if status == 0 or (status == 1 and not loaded and not re.search(r"alloc|MemoryError", last)):
        _passed.add((runtime, digest))
        return
    how = f"signal {-status}" if status < 0 else last[:200] or f"exit code {status}"
    raise ExportError(
        "E005",
        f"{path} was not opened: a process that tried it with {runtime} ended with {how}",
        where=str(path),
        why=f"it was not exported by this user, and one image may take {TRIAL_BYTES >> 30} GiB and {TRIAL_SECONDS} s of CPU time",
        try_="imgcls-fast export --onnx   (makes it again from the weights)",
    )


def _try(task: dict[str, Any]) -> None:
    """In the child: open and run the file, within limits."""
    import resource

    import numpy as np

    limit = int(task["bytes"])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_SECONDS, TRIAL_SECONDS))
    batch, run = (_openvino if task["runtime"] == "openvino" else _onnxruntime)(str(task["path"]))
    os.write(1, _LOADED)
    run(np.zeros([batch, *task["image"]], np.uint8))


def _openvino(path: str) -> tuple[int, Callable[[Any], Any]]:
    """The batch that a file asks for, and a function that runs it."""
    core = import_module("openvino").Core()
    model = core.read_model(path)
    first = model.input(0).get_partial_shape()[0]
    compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return 1 if first.is_dynamic else first.get_length(), lambda pixels: compiled([pixels])


def _onnxruntime(path: str) -> tuple[int, Callable[[Any], Any]]:
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    first = entry.shape[0] if entry.shape else 1
    return first if isinstance(first, int) else 1, lambda pixels: session.run(None, {entry.name: pixels})


if __name__ == "__main__":
    _try(json.loads(sys.argv[1]))
