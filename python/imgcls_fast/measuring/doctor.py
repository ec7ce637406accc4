"""Finds out what this machine has and what that means: the answer of `imgcls-fast doctor`."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ..core import cpus, env
from ..core.errors import HardwareError
from ..core.text import quoted
from ..loading.loader import dali_missing

Row = tuple[str, str, bool | None, str]  # item, value, fine (None: good to know), hint
_FREE_BYTES, _SHARED_BYTES = 1e9, 250e6  # from which on a place is fine


def examine_machine() -> list[tuple[str, list[Row]]]:
    """Sections of (item, value, fine, hint). Starts the GPU driver; changes nothing."""
    return [
        ("machine", _machine()),
        ("cores", _cores()),
        ("compilers", _compilers()),
        ("compiled extension", _extension()),
        ("GPU", _gpu()),
        ("loaders", _loaders()),
        ("libraries", _libraries()),
        ("places", _places()),
        ("published weights", _weights()),
    ]


def _machine() -> list[Row]:
    facts = env.machine_facts()
    return [
        ("imgcls-fast", facts["imgcls_fast"], True, ""),
        ("python", facts["python"], True, ""),
        ("system", facts["system"], True, ""),
        ("cpu", facts["cpu"], True, ""),
    ]


def _cores() -> list[Row]:
    """Number of threads that are started, what it is counted from, and whether other processes leave the cores for them."""
    counted, free = env.cpus(), cpus.free_cores()
    quota = "none" if counted.quota is None else f"{counted.quota:.3g} cores' worth of time"
    rows: list[Row] = [
        ("threads", f"{counted.threads}: {counted.reason}", True, ""),
        ("affinity mask", f"{counted.affinity} of {counted.machine} cores", True, ""),
        ("CPU quota", quota, True, ""),
        ("OMP_NUM_THREADS", "not set" if counted.asked is None else str(counted.asked), True, ""),
    ]
    if free is not None:
        fine = free > counted.threads - cpus.BUSY or counted.threads == 1
        hint = "" if fine else "on busy cores one thread is often faster: --set train.threads=1 (a plan on a CPU times both)"
        rows.append(("load", f"other processes leave {free:.1f} of {counted.affinity} cores idle", fine or None, hint))
    return rows


def _compilers() -> list[Row]:
    """What compiles a network for each device; without it training goes on eagerly."""
    import torch

    wanted = [("torch.compile, CPU", "cpu", False), ("export --aoti", "cpu", True)]
    if torch.cuda.is_available():
        wanted.insert(0, ("torch.compile, GPU", "cuda", False))
    rows: list[Row] = []
    for name, device, package in wanted:
        lack = env.lacks_compiler(device, package=package)
        where = (env.cxx_compiler() or "ready") if device == "cpu" else "ready"
        missing = False if device == "cuda" else None  # which a GPU uses by default, and a CPU when it is asked for
        rows.append((name, lack.what if lack else where, missing if lack else True, lack.remedy if lack else ""))
    return rows


def _extension() -> list[Row]:
    try:
        info = env.build_info()
    except HardwareError as error:
        return [("imgcls_fast._C", error.message, False, error.hint)]
    rows: list[Row] = [
        (name, str(value), True, "") for name, value in info.items() if name not in ("cuda", "why_no_cuda")
    ]
    if info.get("cuda"):
        rows.append(("CUDA half", "built", True, ""))
    else:
        hint = "install the CUDA toolkit and build again with IMGCLS_CUDA=on"
        missing = False if _has_gpu() else None  # nothing here could run it
        rows.append(("CUDA half", f"not built: {info.get('why_no_cuda') or 'unknown'}", missing, hint))
    return rows


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _gpu() -> list[Row]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "torch sees no usable GPU" if built else "this torch was built without CUDA"
        return [("GPU", f"none: {why}", True, "training runs on the CPU")]
    rows: list[Row] = [("CUDA of torch", str(torch.version.cuda), True, "")]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"GPU {index}",
                f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, sm_{facts.major}{facts.minor}",
                True,
                "",
            )
        )
    return rows


def _loaders() -> list[Row]:
    missing = dali_missing()
    if missing:
        return [
            ("dali", missing, False, f"{env.requirement_hint('nvidia-dali-cuda130')}   (Linux x86-64)"),
            ("torch", "ready", True, ""),
        ]
    import torch

    gpu = torch.cuda.is_available()
    return [
        ("dali-cpu", "ready", True, ""),
        ("dali-gpu", "ready" if gpu else "needs a GPU", True, ""),
        ("torch", "ready", True, ""),
    ]


def _libraries() -> list[Row]:
    extras = {
        "onnx": "onnx",
        "onnxscript": "onnx",
        "onnxruntime": "onnx",
        "openvino": "openvino",
        "nvidia-modelopt": "int8",
        "tensorrt": "trt",
        "tensorboard": "tensorboard",
    }
    rows: list[Row] = []
    for name, version in env.versions().items():
        if version is None:
            hint = env.install_hint(extras[name]) if name in extras else env.requirement_hint(name)
            rows.append((name, "not installed", name in extras, hint))
        else:
            rows.append((name, version, True, ""))
    return rows


def _places() -> list[Row]:
    rows: list[Row] = []
    for name, where, variable in (
        ("cache", env.cache_dir, "IMGCLS_CACHE"),
        ("runs", env.runs_dir, "IMGCLS_RUNS"),
        ("temporary files", _temporary, "TMPDIR"),
    ):
        try:
            rows.append(_place(name, where(), f"name another folder: {variable}=FOLDER"))
        except HardwareError as error:
            rows.append((name, error.message, False, error.try_))
    shared = Path("/dev/shm")
    if shared.is_dir():
        use = shutil.disk_usage(shared)
        fine = use.free > _SHARED_BYTES
        hint = "" if fine else "start the container with --shm-size 4g, or use --loader dali-cpu"
        rows.append(("/dev/shm", f"{_size(use.free)} of {_size(use.total)} free", fine, hint))
    return rows


def _place(name: str, place: Path, elsewhere: str) -> Row:
    """Whether files can be made in a folder, which need not exist yet; nothing is made."""
    existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if os.path.exists(folder))
    if not os.path.isdir(existing):
        return (name, f"{place}: {existing} is a file", False, elsewhere)
    if not os.access(existing, os.W_OK | os.X_OK):
        return (name, f"{place}: {existing} cannot be written", False, elsewhere)
    free = shutil.disk_usage(existing).free
    fine = free > _FREE_BYTES
    return (name, f"{place} ({_size(free)} free)", fine, "" if fine else f"free some space, or {elsewhere}")


def _temporary() -> Path:
    """The folder of temporary files.

    Raises:
        HardwareError: H003 where there is none that can be written.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise HardwareError("H003", str(error), try_="name a folder: TMPDIR=FOLDER") from error


def _size(count: float) -> str:
    """Bytes in a unit with a figure before the point."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _weights() -> list[Row]:
    """The caches that are looked in, and the published weights in them, whole or damaged."""
    from huggingface_hub import constants
    from torch.hub import get_dir

    torch_cache, hub_cache = Path(get_dir()) / "checkpoints", Path(constants.HF_HUB_CACHE)
    rows: list[Row] = [
        ("torch's cache", str(torch_cache), True, ""),
        ("Hugging Face's cache", str(hub_cache), True, ""),
    ]
    found: list[Row] = []
    if any(torch_cache.glob("*.*")) or any(hub_cache.glob("models--*")):
        from ..models.build import list_models, published_weights

        here = [weights for arch in list_models() if (weights := published_weights(arch)).path is not None]
        found = [
            (weights.arch, weights.damage or str(weights.path), not weights.damage, weights.damage and f"rm {quoted(str(weights.path))}")
            for weights in here
        ]
    where = "imgcls-fast models list NAME   (names the file, its place, its address and its licence)"
    return rows + (found or [("weights", "none here; `--init pretrained` would fetch them", True, where)])
