"""Bit rot: is every damage to a checkpoint, bundle or export either found or without effect?

    python benchmarks/bitrot.py --mutations 200 [--run RUN] [--out FILE]     (out: results/<machine>/bitrot.json)

Trains a small network on the embedded digits and exports it (or takes a copy of RUN), then damages each file that is read
back: one flipped bit, a cut, and a zeroed page of 4 KiB, at random places. What its reader does then is "found" (a clear
error), "harmless" (the very content that was written), "missed" (other content, no word) or "crashed" (another exception).
Exits with 1 when anything was missed or crashed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PAGE = 4096
KINDS = ("flip", "cut", "zeros")
Reader = Callable[[], str]  # a digest of all that a reader gives back


def damaged(content: bytes, kind: str, draw: random.Random) -> bytes:
    """The content with one damage."""
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    if kind == "flip":
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    else:
        at = draw.randrange(0, len(content), PAGE)
        changed[at : at + PAGE] = bytes(len(changed[at : at + PAGE]))
    return bytes(changed)


def digest(*values: Any) -> str:
    """SHA-256 of what a reader gave: dictionaries, arrays and tensors."""
    h = hashlib.sha256()
    for value in values:
        if isinstance(value, dict) and any(hasattr(inner, "shape") for inner in value.values()):
            for name in sorted(value):
                h.update(f"{name} {value[name].dtype} {tuple(value[name].shape)} ".encode())
                h.update(value[name].numpy().tobytes() if hasattr(value[name], "numpy") else value[name].tobytes())
        else:
            h.update(json.dumps(value, sort_keys=True, default=str).encode())
    return h.hexdigest()


def readers(run: Path) -> Iterator[tuple[Path, Reader]]:
    """Each file of a run that is read back, with the reader that uses it."""
    from imgcls_fast.core.bundle import read_bundle
    from imgcls_fast.core.exports import find_export, list_exports
    from imgcls_fast.core.manifest import Manifest
    from imgcls_fast.core.predictions import Predictions

    bundle = read_bundle(run / "bundle")
    exports = [(e.folder, e.meta["target"], e.meta["precision"]) for e in list_exports(run / "exports")]

    def checkpoint(folder: Path) -> str:
        from imgcls_fast.training.checkpoint import read_checkpoint

        found = read_checkpoint(folder)
        return digest(found.tensors, vars(found.progress), found.parts, found.environment)

    def model() -> str:
        from safetensors.torch import load_file

        found = read_bundle(run / "bundle")
        return digest(load_file(found.weights), found.to_dict())

    def export(target: str, precision: str) -> str:
        found = find_export(run / "exports", bundle, target, precision)
        return digest(found.folder.name, found.meta, found.gate, hashlib.sha256(found.path.read_bytes()).hexdigest())

    def every_export() -> str:
        return digest(*[export(target, precision) for _, target, precision in exports])

    def manifest() -> str:
        found = Manifest.load(run / "manifest.npz")
        columns = {name: value for name, value in vars(found).items() if hasattr(value, "dtype")}
        return digest(
            columns, list(found.paths), found.labels.to_dict(), str(found.root), found.source, found.group_names
        )

    def predictions(folder: Path) -> str:
        found = Predictions.load(folder)
        targets = {} if found.targets is None else {"targets": found.targets}
        return digest(
            {"scores": found.scores, "rows": found.rows, **targets},
            found.paths,
            found.labels.to_dict(),
            found.fingerprint,
        )

    for folder in sorted((run / "checkpoints").glob("[!.]*/")):
        for file in sorted(folder.iterdir()):
            yield file, lambda folder=folder: checkpoint(folder)  # type: ignore[misc]
    for file in sorted((run / "bundle").iterdir()):
        yield file, model
    if exports:
        yield run / "exports" / "index.json", every_export
    for folder, target, precision in exports:
        for file in (
            folder / "meta.json",
            folder / "gate.json",
            find_export(run / "exports", bundle, target, precision).path,
        ):
            if file.is_file():
                yield file, lambda target=target, precision=precision: export(target, precision)  # type: ignore[misc]
    yield run / "manifest.npz", manifest
    for folder in sorted((run / "eval").glob("*/")):
        for name in ("scores.npy", "predictions.csv", "predictions.json"):
            yield folder / name, lambda folder=folder: predictions(folder)  # type: ignore[misc]


def judge(file: Path, read: Reader, mutations: int, draw: random.Random) -> dict[str, Any]:
    """Damage one file `mutations` times in each way; counts of what became of it, and what was missed."""
    from imgcls_fast.core.errors import ImgclsError

    content, expected = file.read_bytes(), read()
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    wrong: list[str] = []
    for kind in KINDS:
        for _ in range(mutations):
            changed = damaged(content, kind, draw)
            file.write_bytes(changed)
            try:
                became = "harmless" if read() == expected else "missed"
            except ImgclsError:
                became = "found"
            except Exception as error:  # noqa: BLE001 - every other exception is what this looks for
                became = "crashed"
                wrong.append(f"{kind}: {type(error).__name__}: {error}"[:200])
            counts[kind][became] += 1
            if became == "missed":
                at = next((k for k, (a, b) in enumerate(zip(content, changed, strict=False)) if a != b), len(changed))
                wrong.append(f"{kind} at byte {at:,} of {len(content):,}")
        file.write_bytes(content)
    return {"bytes": len(content), **{kind: dict(found) for kind, found in counts.items()}, "wrong": wrong[:10]}


def make_run(folder: Path) -> Path:
    """A run of one epoch on the digits, with an ONNX export in float32 and one in FP16 that was judged."""
    import imgcls_fast

    settings = {
        "pixels.size": 32, "model.arch": "small-cnn", "model.args": {"width": 8}, "train.epochs": 2, "train.batch_size": 64,
        "train.threads": 1, "train.workers": 1, "train.baseline": False, "evaluate.bootstrap": 50, "export.verify_images": 16,
        "train.device": "cpu",
    }  # fmt: skip
    run = imgcls_fast.train(out=str(folder / "run"), overrides=settings)
    for precision in ("fp32", "fp16"):
        imgcls_fast.export(run.directory, "onnx", precision=precision)
    return run.directory


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage every file that is read back; see the head of this file.")
    parser.add_argument("--mutations", type=int, default=200, help="damages of each kind per file")
    parser.add_argument("--run", type=Path, help="a finished run, of which a copy is damaged (default: a new one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the counts go (default: results/<machine>/bitrot.json)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bitrot-") as temporary:
        run = Path(shutil.copytree(asked.run, Path(temporary) / "run")) if asked.run else make_run(Path(temporary))
        found = {}
        for file, read in readers(run):
            name = str(file.relative_to(run))
            found[name] = judge(file, read, asked.mutations, random.Random(f"{asked.seed} {name}"))
            totals = sum((Counter(found[name][kind]) for kind in KINDS), Counter[str]())
            print(
                f"{name:52} {found[name]['bytes']:>9,} bytes  {dict(totals)}  {'; '.join(found[name]['wrong'][:2])}",
                flush=True,
            )
    whole = sum((Counter(entry[kind]) for entry in found.values() for kind in KINDS), Counter[str]())
    print(f"all: {dict(whole)}")
    from imgcls_fast.core import env

    out = asked.out or Path(__file__).parent / "results" / env.machine_slug() / "bitrot.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"mutations": asked.mutations, "seed": asked.seed, "versions": env.versions(("torch", "safetensors", "numpy"))}
    out.write_text(json.dumps({**facts, "total": dict(whole), "files": found}, indent=1) + "\n")
    return 1 if whole["missed"] or whole["crashed"] else 0


if __name__ == "__main__":
    sys.exit(main())
