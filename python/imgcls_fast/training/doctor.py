"""What this machine has and what that means: the answer of `imgcls-fast doctor`."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..core import env
from ..core.errors import HardwareError
from ..core.text import quoted
from ..data.loader import dali_missing

Row = tuple[str, str, bool, str]  # item, value, fine, hint


def examine_machine() -> list[tuple[str, list[Row]]]:
    """Sections of (item, value, fine, hint). Starts the GPU driver; changes nothing."""
    return [
        ("machine", _machine()),
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
        ("cpu", f"{facts['cpu']}, {facts['cpus']} usable cores", True, ""),
    ]


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
        rows.append(("CUDA half", f"not built: {info.get('why_no_cuda') or 'unknown'}", False, hint))
    return rows


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
        "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino", "nvidia-modelopt": "int8",
        "tensorrt": "trt",
    }  # fmt: skip
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
    for name, where in (("cache", env.cache_dir), ("runs", env.runs_dir)):
        try:
            place = where()
        except HardwareError as error:
            rows.append((name, error.message, False, error.hint))
            continue
        existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free / 1e9
        rows.append((name, f"{place} ({free:.0f} GB free)", free > 1, "" if free > 1 else "free some space"))
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / 1e9
        rows.append(
            (
                "/dev/shm",
                f"{free:.1f} GB free",
                free > 0.25,
                "" if free > 0.25 else "start the container with --shm-size 4g, or use --loader dali-cpu",
            )
        )
    return rows


def _weights() -> list[Row]:
    """The caches that are looked in, and which published weights lie there, whole or damaged."""
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
