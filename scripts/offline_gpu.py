#!/usr/bin/env python3
"""Makes the folder that a GPU machine without network needs for benchmarks/gpu_check.py, and installs from it there.

    python scripts/offline_gpu.py pack --python python3.12 --photos ../shared/data/photos    here: writes .carry/
    python3 scripts/offline_gpu.py install --target /tmp/site                                there: reads .carry/

`.carry/` (ignored by git) holds wheels for CPython 3.12 of what is rarely on such a machine (pydantic, rich, pybind11, with
their needs), a wheel of this project with machine code for compute capability 9.0, a few small photos, and `pack.json`. What is expected
there: torch, torchvision, timm, numpy, Pillow, scikit-learn, matplotlib, safetensors, PyYAML, huggingface-hub, pytest.

`install` puts all of it into one folder (then: export PYTHONPATH=/tmp/site). Without a wheel of ours that loads, or when
csrc/ is not the one that the wheel was built from, it builds from the sources with the machine's nvcc. The Python files are always those of
the working tree. Standard library only. Exit code 1 when the compiled half has no CUDA in the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("pydantic>=2.11,<3", "rich>=13,<16", "pybind11>=3.0,<4")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
LIMIT_MB = 60  # what the way to such a machine takes along
PHOTO_SIDE = 320  # pixels of the longer side
OURS = "imgcls_fast-*.whl"
PROBE = """import torch, json
from imgcls_fast import _C
print(json.dumps(dict(_C.build_info()), default=str))
assert _C.build_info()["cuda"]"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".carry", help="default: .carry in the repository")
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("pack", help="write the folder, on a machine with network")
    verb.set_defaults(work=pack)
    verb.add_argument("--python", help="interpreter of CPython 3.12 to build our wheel with; without it there is none")
    verb.add_argument("--wheel", type=Path, help="a wheel of ours that is ready, instead of building one")
    verb.add_argument("--archs", default="90", help="compute capabilities of that wheel (default 90)")
    verb.add_argument("--jobs", type=int, default=1, help="compilers at a time (default 1)")
    verb.add_argument("--photos", type=Path, help="folder of class folders to take a few images from")
    verb.add_argument("--count", type=int, default=200, help="how many of them (default 200)")
    verb = verbs.add_parser("install", help="install from the folder, on the machine without network")
    verb.set_defaults(work=install)
    verb.add_argument(
        "--target", type=Path, default=Path("/tmp/site"), help="folder for PYTHONPATH (default /tmp/site)"
    )
    verb.add_argument("--archs", default="90", help="compute capabilities of a build from the sources (default 90)")
    verb.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time (default: the cores)")
    options = parser.parse_args()
    return int(options.work(options))


def pack(options: argparse.Namespace) -> int:
    """Write the folder anew."""
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    words = [word for name in PLATFORMS for word in ("--platform", name)]
    _run(sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "--implementation", "cp", "--python-version", "3.12",
         "--abi", "cp312", "--abi", "abi3", "--abi", "none", *words, "-d", str(wheels), *NEEDED)  # fmt: skip
    if options.wheel:
        shutil.copy(options.wheel, wheels)
    elif options.python:
        settings = {
            "IMGCLS_CUDA": "on",
            "IMGCLS_CUDA_ARCHS": options.archs,
            "CMAKE_BUILD_PARALLEL_LEVEL": str(options.jobs),
        }
        _run(options.python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(ROOT), **settings)
    photos = _small_photos(options.photos, options.count, folder / "photos") if options.photos else 0
    facts = {"csrc": csrc_digest(), "photos": photos, "wheels": sorted(path.name for path in wheels.iterdir())}
    (folder / "pack.json").write_text(json.dumps(facts, indent=2), "utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    print(f"{folder}: {len(facts['wheels'])} wheels, {photos} photos, {size:.1f} MB")
    if size > LIMIT_MB:
        print(f"more than the {LIMIT_MB} MB that can travel", file=sys.stderr)
        return 1
    return 0


def install(options: argparse.Namespace) -> int:
    """Install everything into one folder; build from the sources where our wheel does not do."""
    began, folder, target = time.monotonic(), options.folder, options.target
    wheels = folder / "wheels"
    ours = sorted(wheels.glob(OURS))
    _pip(target, *(str(path) for path in sorted(wheels.glob("*.whl")) if path not in ours))
    facts = json.loads((folder / "pack.json").read_text("utf-8")) if (folder / "pack.json").exists() else {}
    how, built = "", None
    if ours and facts.get("csrc") == csrc_digest():
        how = "our wheel"
        built = _try(target, str(ours[-1]))
    if built is None:
        how = "built from the sources" + ("" if ours else ": no wheel") + (": the wheel did not do" if ours else "")
        settings = {
            "IMGCLS_CUDA": "on",
            "IMGCLS_CUDA_ARCHS": options.archs,
            "CMAKE_BUILD_PARALLEL_LEVEL": str(options.jobs),
        }
        built = _try(target, "--no-build-isolation", str(ROOT), **settings)
    shutil.copytree(ROOT / "python" / "imgcls_fast", target / "imgcls_fast", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("*.so", "__pycache__"))  # fmt: skip
    print(f"installed into {target} in {time.monotonic() - began:.0f} s, {how}: {built or 'NO CUDA'}")
    return 0 if built else 1


def csrc_digest() -> str:
    """SHA-256 of everything that is compiled."""
    digest = hashlib.sha256()
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.suffix != ".md")
    for path in [*files, ROOT / "CMakeLists.txt"]:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _try(target: Path, *words: str, **settings: str) -> str | None:
    """Install one thing and load the compiled half; what it holds, or None."""
    try:
        _pip(target, *words, **settings)
        probe = subprocess.run(
            [sys.executable, "-c", PROBE], env={**os.environ, "PYTHONPATH": str(target)}, cwd=target, timeout=120,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except subprocess.SubprocessError as error:
        print(f"{words[-1]}: {str(getattr(error, 'stderr', '') or error)[-600:]}", file=sys.stderr)
        return None
    return probe.stdout.strip().splitlines()[-1]


def _pip(target: Path, *words: str, **settings: str) -> None:
    if words:
        path = os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH", ""))))  # pybind11 for a build
        _run(sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade",
             "--target", str(target), *words, PYTHONPATH=path, **settings)  # fmt: skip


def _run(*words: str, **settings: str) -> None:
    subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, **settings})


def _small_photos(source: Path, count: int, target: Path) -> int:
    """Every n-th JPEG below `source`, made small, in its class folder."""
    from PIL import Image

    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    chosen = found[:: max(1, len(found) // max(1, count))][:count]
    for number, path in enumerate(chosen):
        place = target / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
            image.convert("RGB").save(place / f"{number:04}.jpg", quality=85)
    return len(chosen)


if __name__ == "__main__":
    sys.exit(main())
