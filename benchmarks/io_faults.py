"""One system call on the run folder fails, once, at each place in turn: is the run as it would have been, or resumed to it?

    python benchmarks/io_faults.py [--places N] [--out FILE]     (out: results/<machine>/io_faults.json)

Network file systems answer EIO, ESTALE, EXDEV, ENOTEMPTY and ENOSPC where a disk would not. A tiny run is first traced:
every os.open, fsync, rename, replace, link, symlink, mkdir, rmdir and unlink, and every open() for writing, on a path of
the run folder, by the line of ours that asked. Then each of these places fails once, in a fork, with each error that fits.
The run either ends as if nothing had been, or with a clear error, after which it is resumed (or begun anew, where it had
not got as far as a run) without the fault. Right: final bits as those of the undisturbed run, and nothing left over.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "model.arch": "small-cnn", "model.args": {"width": 8}, "pixels.size": 32, "train.epochs": 2, "train.batch_size": 32,
    "train.threads": 1, "train.workers": 0, "train.loader": "torch", "train.save_every": 0, "train.baseline": False,
    "train.precision": "fp32", "train.device": "cpu", "evaluate.bootstrap": 20, "optim.ema": 0.9,
}  # fmt: skip
STATE = "checkpoints/last/tensors.safetensors", "checkpoints/best/tensors.safetensors", "bundle/weights.safetensors"
ERRORS = {
    "open": ("EIO", "ESTALE"), "write": ("ENOSPC", "EIO"), "fsync": ("EIO", "ENOSPC"), "rename": ("EXDEV", "ENOTEMPTY"),
    "replace": ("EXDEV", "ESTALE"), "link": ("EXDEV",), "symlink": ("EIO",), "mkdir": ("ENOSPC",), "rmdir": ("ENOTEMPTY",),
    "unlink": ("EIO",),
}  # fmt: skip
Place = tuple[str, str]  # (call, the line of ours that made it)


class Faults:
    """Counts calls on the paths of one folder, and lets one of them fail."""

    def __init__(self, folder: Path, fail: tuple[Place, int, str] | None = None) -> None:
        self.folder, self.fail, self.seen, self.happened = str(folder), fail, Counter[Place](), False

    def check(self, call: str, path: Any) -> None:
        """Count a call; raise where it is the one that has to fail."""
        if isinstance(path, int):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{path}")
        if not isinstance(path, str | os.PathLike) or not os.path.abspath(os.fspath(path)).startswith(self.folder):
            return
        place = (call, asker())
        self.seen[place] += 1
        if self.fail and self.fail[:2] == (place, self.seen[place]):
            self.happened = True
            number = getattr(errno, self.fail[2])
            raise OSError(number, os.strerror(number), os.fspath(path))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put the counting functions in the place of those of `os`, and of open()."""
        real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in ERRORS if name != "write"}
        real_open = builtins.open

        def counted(name: str) -> Callable[..., Any]:
            def call(path: Any, *arguments: Any, **more: Any) -> Any:
                if not any(key in more for key in ("dir_fd", "src_dir_fd")):
                    self.check(name, path)
                return real[name](path, *arguments, **more)

            return call

        def opened(path: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            if set(mode) & set("wax+"):
                self.check("write", path)
            return real_open(path, mode, *arguments, **more)

        try:
            for name in real:
                setattr(os, name, counted(name))
            builtins.open = opened  # type: ignore[assignment]
            yield
        finally:
            for name, function in real.items():
                setattr(os, name, function)
            builtins.open = real_open


def asker() -> str:
    """The innermost line of this package in the stack: "core/files.py:write_whole:71"."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "imgcls_fast" in name:
            return f"{name.rpartition('imgcls_fast/')[2]}:{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def write_images(folder: Path) -> Path:
    """Three classes of noisy 40 x 32 JPEGs: 64 for training, 24 for validation, 12 to test."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 24), ("test", 12)):
        for k in range(count):
            image = draw.integers(0, 120, (32, 40, 3))
            image[..., k % 3] += 90
            place = folder / split / "abc"[k % 3]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype("uint8")).save(place / f"{k:03}.jpg", quality=90)
    return folder


def attempt(data: Path, run: Path, fail: tuple[Place, int, str] | None, *, resume: bool) -> dict[str, Any]:
    """Train or resume in a fork; how it ended, what was called, and whether the fault came."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        signal.alarm(300)
        faults, ended = Faults(run, fail), ""
        try:
            import imgcls_fast

            with faults.installed():
                if resume:
                    imgcls_fast.train(resume=str(run))
                else:
                    imgcls_fast.train(str(data), out=str(run), overrides=SETTINGS)
            ended = "finished"
        except BaseException as error:  # noqa: BLE001 - what it was is the result
            code = getattr(error, "code", None)
            ended = str(code) if code else f"raw {type(error).__name__}: {error} {traceback.format_exc()[-600:]}"
        seen = [[*place, count] for place, count in faults.seen.items()]
        with os.fdopen(writing, "w") as pipe:
            json.dump({"ended": ended, "seen": seen, "happened": faults.happened}, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(answer) if answer else {"ended": f"raw signal {status}", "seen": [], "happened": True}  # type: ignore[no-any-return]


def fingerprints(run: Path) -> list[str]:
    """SHA-256 of the tensors of the last and best checkpoint, and of the bundle's weights; "" for what is not there."""
    return [hashlib.sha256((run / n).read_bytes()).hexdigest() if (run / n).is_file() else "" for n in STATE]


def litter(run: Path) -> list[str]:
    """Hidden files that a finished run should not have, in it and beside it."""
    inside = [p for p in run.rglob(".*") if p.name != ".lock"]
    return sorted(str(p.relative_to(run.parent)) for p in [*inside, *run.parent.glob(".*")])


def trial(data: Path, work: Path, fail: tuple[Place, int, str], expected: list[str]) -> dict[str, Any]:
    """One fault; then the run without it, until it is finished."""
    run = work / "run"
    first = attempt(data, run, fail, resume=False)
    found: dict[str, Any] = {"call": fail[0][0], "place": fail[0][1], "error": fail[2], "ended": first["ended"]}
    wrong = []
    if not first["happened"]:
        wrong.append("the fault did not come")
    if first["ended"].startswith(("raw", "X")):
        wrong.append(first["ended"])
    if first["ended"] != "finished":
        again = (run / "config.yaml").is_file() and (run / "manifest.npz").is_file()
        found["then"] = "resumed" if again else "begun anew"
        second = attempt(data, run, None, resume=again)
        if second["ended"] != "finished":
            wrong.append(f"{found['then']}: {second['ended']}")
    if not wrong:
        wrong += [f"other {name}" for name, a, b in zip(STATE, fingerprints(run), expected, strict=True) if a != b]
        wrong += [f"left: {name}" for name in litter(run)]
    shutil.rmtree(work)
    return {**found, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Let each system call on the run folder fail once; see the head of this file."
    )
    parser.add_argument("--places", type=int, help="how many of them, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the results go (default: results/<machine>/io_faults.json)")
    asked = parser.parse_args()
    import torch

    import imgcls_fast.training.session  # noqa: F401 - once, before the forks
    from imgcls_fast.core import env

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = Path(temporary)
        data = write_images(folder / "data")
        os.environ["IMGCLS_RUNS"] = str(folder / "runs")
        whole = attempt(data, folder / "reference" / "run", None, resume=False)
        if whole["ended"] != "finished":
            raise SystemExit(f"the undisturbed run failed: {whole['ended']}")
        expected = fingerprints(folder / "reference" / "run")
        cases = [
            ((call, line), which, error)
            for call, line, count in whole["seen"]
            for which in sorted({1, (count + 1) // 2})  # the first time, and in the middle of the run
            for error in ERRORS[call]
        ]
        if asked.places:
            cases = random.Random(asked.seed).sample(cases, min(asked.places, len(cases)))
        results = []
        for k, case in enumerate(cases):
            results.append(trial(data, folder / f"case{k}", case, expected))
            r = results[-1]
            print(f"{k + 1}/{len(cases)} {r['call']} {r['error']} in {r['place']} ({case[1]}): {r['ended'][:60]}"
                  f"{', ' + r['then'] if 'then' in r else ''} {'WRONG ' + str(r['wrong']) if r['wrong'] else ''}", flush=True)  # fmt: skip
    bad = [r for r in results if r["wrong"]]
    ends = Counter("finished" if r["ended"] == "finished" else f"{r['ended'][:4]}, {r['then']}" for r in results)
    print(f"{len(results)} faults: {dict(ends)}; wrong: {len(bad)}")
    if asked.out or not asked.places:
        out = asked.out or Path(__file__).parent / "results" / env.machine_slug() / "io_faults.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"faults": len(results), "ends": dict(ends), "wrong": bad, "versions": env.versions(("torch",))}
        places = sorted({f"{r['call']} {r['place'].rpartition(':')[0]}" for r in results})
        out.write_text(json.dumps({**facts, "places": places}, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
