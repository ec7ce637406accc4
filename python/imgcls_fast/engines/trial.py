"""A stranger's ONNX file, opened and run once in a process that may use so much memory and time, before it is opened here.

What a graph costs cannot be read from its bytes: forty nodes that each join a tensor with itself make a terabyte. A runtime
that is asked for that much ends its process, or the machine's others.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path
from subprocess import TimeoutExpired

from ..core import child
from ..core.bounds import TRIAL_BYTES, TRIAL_SECONDS
from ..core.errors import ExportError
from ..core.pixels import Pixels

_FILE_TIMES = 16  # memory per byte of the file, beside TRIAL_BYTES
_passed: set[tuple[str, str]] = set()  # (runtime, SHA-256 of the file)


def demand_survivable(path: Path, digest: str, runtime: str, pixels: Pixels, batch: int | None = None) -> None:
    """Go on only with a file that a process like this one survives; once per file.

    Args:
        path: the file.
        digest: its SHA-256.
        runtime: onnx or openvino.
        batch: the fixed batch of the file; None: it is tried with one image.

    Raises:
        ExportError: E005 when the process died, or needed more than `bounds.TRIAL_BYTES` or `bounds.TRIAL_SECONDS`.
    """
    if (runtime, digest) in _passed:
        return
    shape = [batch or 1, pixels.size, pixels.size, pixels.channels]
    task = {"path": str(path), "runtime": runtime, "shape": shape, "bytes": TRIAL_BYTES + _FILE_TIMES * path.stat().st_size}
    try:
        ended = child.run("engines.trial", json.dumps(task), options=("-W", "ignore"), timeout=2 * TRIAL_SECONDS)
        status, words = ended.returncode, ended.stderr
    except TimeoutExpired:
        status, words = -24, b""  # as the limit on CPU time ends it
    last = next((line for line in reversed(words.decode("utf-8", "replace").splitlines()) if line.strip()), "")
    if status == 0 or (status == 1 and not re.search(r"alloc|MemoryError", last)):  # 1: refused in the runtime's own words
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


def _try(task: dict[str, object]) -> None:
    """In the child: open and run the file, within limits."""
    import resource

    import numpy as np

    limit = int(str(task["bytes"]))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_SECONDS, TRIAL_SECONDS))
    shape = task["shape"]
    pixels = np.zeros(shape, np.uint8)  # type: ignore[call-overload]
    if task["runtime"] == "openvino":
        core = import_module("openvino").Core()
        core.compile_model(core.read_model(str(task["path"])), "CPU", {"INFERENCE_NUM_THREADS": 1})([pixels])
        return
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(task["path"]), options, providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: pixels})


if __name__ == "__main__":
    _try(json.loads(sys.argv[1]))
