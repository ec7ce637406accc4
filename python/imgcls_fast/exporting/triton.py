"""A model repository for Triton Inference Server: the model, a decoder in front of it, and an ensemble of both.

    model_repository/
      <name>/           config.pbtxt, labels.txt, 1/model.onnx | 1/model.plan       pixels -> scores, batched across requests
      <name>_decode/    config.pbtxt, 1/model.dali, warmup/picture.jpg              encoded image -> pixels
      <name>_ensemble/  config.pbtxt, 1/                                            encoded image -> scores

A repository is checked before it is handed over (`triton_config.check_repository`), and the decoder is run and compared with
the pixel specification.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core import env
from ..core.bundle import Bundle
from ..core.errors import ConfigError, ExportError, HardwareError
from ..core.exports import GATE, Export, choose, export_key, find_key, finish, is_of, new_export, way_of
from ..core.files import explained_write, sha256_file, write_text, write_whole
from ..core.pixels import FULL_BITS
from ..core.targets import Way
from ..core.text import command
from ..loading.loader import dali_missing
from . import onnx_export, trt_export
from .materials import Materials
from .triton_config import CONFIG, PIXELS, SCORES, Word, check_repository, label_lines, score_facts, to_pbtxt
from .trt_engine import trt_missing

LABELS = "labels.txt"
REPOSITORY = "model_repository"
DECODE, ENSEMBLE = "_decode", "_ensemble"
ENCODED = "encoded"

# A name is a folder, a part of a URL and a metric's label: Triton itself refuses only "/" and ".."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PLATFORMS = {"onnx": "onnxruntime", "trt": "tensorrt_plan"}
_WARMUP = "picture.jpg"


@dataclass(frozen=True)
class TritonOptions:
    """How the models are served.

    Args:
        name: name of the model; None: the architecture's.
        gpu: run on GPUs; None: a plan does, an ONNX file does not.
        instances: copies of the model on each GPU (or on the CPU).
        max_batch: largest batch, images; None: the plan's, or 64. A model exported with a fixed batch keeps it.
        preferred: batches that are sent without waiting longer; empty: the plan's best and `max_batch`.
        queue_delay_us: how long a request waits for company, microseconds.
        warmup: run each model once before the server reports that it is ready.
        dali: put a decoder and an ensemble in front; None: where the pixels and the model allow it.
        decode_batch: images decoded together. One bad image fails all that are decoded with it, so 1 keeps strangers apart.
        decode_instances: decoders side by side; None: 4 on a CPU, 1 on a GPU.
        cuda_graphs: capture one for each preferred batch (plans).
        threads: threads of ONNX Runtime on a CPU, per instance; 0: all cores, of which a container sees the whole machine's.
    """

    name: str | None = None
    gpu: bool | None = None
    instances: int = 1
    max_batch: int | None = None
    preferred: tuple[int, ...] = ()
    queue_delay_us: int = 1000
    warmup: bool = True
    dali: bool | None = None
    decode_batch: int = 1
    decode_instances: int | None = None
    cuda_graphs: bool = False
    threads: int = 0


@dataclass(frozen=True)
class _Plan:
    """What the options come to for one export."""

    name: str
    options: TritonOptions
    platform: str
    batch: int | None  # fixed
    max_batch: int  # 0: the batch is fixed
    preferred: tuple[int, ...]
    no_decoder: str  # why there is none; "" when there is one

    @property
    def dali(self) -> bool:
        return not self.no_decoder


def export(materials: Materials, way: Way) -> Export:
    """A repository around the TensorRT engine where one can be built, else around the ONNX file.

    Raises:
        ExportError: E001 to E004; ConfigError: C003, C004; GateFailed: E901, E902, E903; HardwareError: H001, H003, H004.
    """
    missing = trt_missing()
    if missing:
        materials.say(f"{missing}: the repository holds the ONNX file")
        source = onnx_export.export(materials, way_of("onnx", way.precision))
    else:
        source = trt_export.export(materials, way_of("trt", way.precision))
    options = TritonOptions(gpu=torch.cuda.is_available(), max_batch=materials.settings.max_batch)
    return export_triton(materials.bundle, materials.exports, source, options)


def export_triton(bundle: Bundle, exports: Path, source: Export, options: TritonOptions | None = None) -> Export:
    """Write exports/triton-<precision>-<key8>/model_repository from an ONNX or TensorRT export, and name it in index.json.

    The judgement of the source (gate.json) travels along: the model's bytes are the same.

    Raises:
        ExportError: E001 when the source is damaged, of another model, or the repository would be wrong.
        ConfigError: C003 or C004 for options that cannot be.
        HardwareError: H003 when the disk refuses, H004 when DALI is asked for and not installed.
    """
    options = options or TritonOptions()
    plan = _plan(bundle, source, options)
    versions = env.versions(("nvidia-dali-cuda130", "onnx"))
    precision = str(source.meta["precision"])
    facts = {**asdict(plan.options), "name": plan.name, "dali": plan.dali, "versions": versions}
    key = export_key(bundle, source=source.meta["sha256"], **facts)
    export = find_key(exports, bundle, "triton", precision, key)
    if export is None:
        with new_export(exports, "triton", precision, key) as temporary:
            meta = write_triton(bundle, source, temporary / REPOSITORY, options)
            with explained_write(temporary):
                if (source.folder / GATE).is_file():
                    shutil.copyfile(source.folder / GATE, temporary / GATE)
            export = finish(temporary, bundle, "triton", precision, REPOSITORY, {**meta, "versions": versions})
    choose(export)
    return export


def write_triton(bundle: Bundle, export: Export, folder: Path, options: TritonOptions | None = None) -> dict[str, Any]:
    """Write a model repository into `folder`, which must not exist or be empty.

    Args:
        export: an ONNX file or a TensorRT plan of this bundle.

    Returns:
        facts for meta.json: names of the models, what they run on, what the server must be started with.

    Raises:
        ExportError: E001; the folder then holds nothing that may be used.
        ConfigError: C003 or C004 for options that cannot be.
        HardwareError: H003 when the disk refuses, H004 when DALI is asked for and not installed.
    """
    plan = _plan(bundle, export, options or TritonOptions())
    if folder.is_dir() and any(folder.iterdir()):
        raise ExportError("E001", f"{folder} is not empty, and a model repository is written whole")
    with explained_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_model(bundle, export, folder / plan.name, plan)
    facts = _facts(export, plan)
    if plan.dali:
        facts["decode_difference"] = _write_decode(bundle, folder / (plan.name + DECODE), plan)
        _write_ensemble(bundle, folder / (plan.name + ENSEMBLE), plan)
    if wrong := check_repository(folder, bundle):
        raise ExportError("E001", f"the model repository would be wrong: {'; '.join(wrong)}", where=str(folder))
    return facts


# ---------------------------------------------------------------- what is possible


def _plan(bundle: Bundle, export: Export, options: TritonOptions) -> _Plan:
    """Check everything before anything is written."""
    name = options.name if options.name is not None else _usual_name(bundle)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "C003",
            f"a Triton model's name is up to 100 letters, digits, '.', '_' or '-', and begins with a letter or digit, got {name!r}",
            why="it becomes a folder, a part of a URL and the label of a metric",
        )
    if options.gpu is None:
        options = replace(options, gpu=export.meta.get("target") == "trt")
    _check_source(bundle, export, options)
    _check_numbers(options)
    _check_labels(bundle)
    batch, largest, best = _batches(export)
    max_batch = 0 if batch else (options.max_batch or largest or 64)
    if largest and max_batch > largest:
        raise ConfigError("C004", f"max_batch is {max_batch}, and the plan was built for at most {largest}")
    usual = {min(best or max_batch // 2 or 1, max_batch), max_batch}
    preferred = () if batch else tuple(sorted(options.preferred or usual))
    if any(not 1 <= size <= max_batch for size in preferred):
        raise ConfigError("C003", f"preferred batches are 1 to {max_batch}, got {list(preferred)}")
    no_decoder = _no_decoder(bundle, batch, options)
    if not no_decoder and options.decode_batch > (batch or max_batch):
        raise ConfigError("C004", f"decode_batch is {options.decode_batch}, and the model takes {batch or max_batch}")
    return _Plan(name, options, _PLATFORMS[export.meta["target"]], batch, max_batch, preferred, no_decoder)


def _usual_name(bundle: Bundle) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(bundle.arch.get("arch") or "model")).strip("-._")[:100] or "model"


def _check_source(bundle: Bundle, export: Export, options: TritonOptions) -> None:
    target, meta = export.meta.get("target"), export.meta
    if target not in _PLATFORMS:
        raise ExportError(
            "E001",
            f"Triton is given an ONNX or a TensorRT export, got {target!r}",
            try_="imgcls-fast export RUN --triton",
        )
    again = command("export", export.folder.parent.parent, f"--{target}")
    if not is_of(meta, bundle):
        raise ExportError("E001", f"{export.path} was made from another model than {bundle.directory}", try_=again)
    if not export.path.is_file() or sha256_file(export.path) != meta.get("sha256"):
        raise ExportError("E001", f"{export.path} is missing or damaged", try_=again)
    if target == "trt" and not options.gpu:
        raise ConfigError("C004", "a TensorRT plan runs on GPUs only, and gpu is off")
    if way_of(target, meta.get("precision")).stand_in and _PLATFORMS[target] == "onnxruntime":
        raise ExportError(
            "E001",
            "ONNX Runtime has no bfloat16 for most operators, so Triton cannot serve this file",
            try_=command("export", export.folder.parent.parent, "--onnx", "--precision", "fp16"),
        )


def _check_numbers(options: TritonOptions) -> None:
    for name, least in (("instances", 1), ("queue_delay_us", 0), ("decode_batch", 1), ("threads", 0)):
        if getattr(options, name) < least:
            raise ConfigError("C003", f"{name} must be at least {least}, got {getattr(options, name)}")
    for name in ("max_batch", "decode_instances"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError("C003", f"{name} must be at least 1, got {value}")


def _check_labels(bundle: Bundle) -> None:
    """Warn about names that the label file, one line per class in UTF-8, can hold only with escapes; refuse two that become one."""
    lines, classes = label_lines(bundle.labels), bundle.labels.classes
    changed = [(line, name) for line, name in zip(lines, classes, strict=True) if line != name]
    if len(set(lines)) < len(set(classes)):
        raise ExportError(
            "E001",
            f"two of the classes {', '.join(line for line, _ in changed[:4])} would have the same line in Triton's label file",
            why="it has one line per class in UTF-8, so line breaks and bytes that are not UTF-8 are written as escapes",
        )
    if changed:
        warnings.warn(
            f"Triton's label file has one line per class in UTF-8: clients get escapes for {len(changed):,} class names, "
            f"{changed[0][0]} the first",
            stacklevel=2,
        )


def _batches(export: Export) -> tuple[int | None, int | None, int | None]:
    """(fixed batch, largest, best) of an export; None where that is not known."""
    meta = export.meta
    if export.meta["target"] == "onnx":
        return meta.get("batch"), None, None
    low, best, high = _profile(meta.get("profile"))
    if low is None or low == high:
        return (high, None, None) if high else (None, None, None)
    return None, high, best


def _profile(found: Any) -> tuple[int | None, int | None, int | None]:
    """Smallest, best and largest batch of a plan: three numbers or three shapes, in a list or named min, best or opt, max."""
    if isinstance(found, Mapping):
        found = [found.get("min"), found.get("best", found.get("opt")), found.get("max")]
    if not isinstance(found, list | tuple) or len(found) != 3 or None in found:
        return None, None, None
    low, best, high = (int(size[0]) if isinstance(size, list | tuple) else int(size) for size in found)
    return low, best, high


def _no_decoder(bundle: Bundle, batch: int | None, options: TritonOptions) -> str:
    """Why no decoder is put in front of the model; empty when one is."""
    if options.dali is False:
        return "it was not asked for"
    reason = ""
    if bundle.pixels.color == "rgba":
        reason = "DALI has no decoder that gives RGBA for every file"
    elif bundle.pixels.bits != FULL_BITS:
        reason = f"DALI scales 16-bit gray by 16 bits, and the model was trained on {bundle.pixels.bits}"
    elif batch not in (None, 1):
        reason = f"the model takes exactly {batch} images, and requests come one by one"
    if reason and options.dali:
        raise ConfigError("C004", f"no decoder can be put in front of the model: {reason}")
    if not reason and (reason := dali_missing() or "") and options.dali:
        raise HardwareError(
            "H004", f"a decoder for Triton needs DALI: {reason}", try_=env.requirement_hint("nvidia-dali-cuda130")
        )
    return reason


# ---------------------------------------------------------------- the three models


def _write_model(bundle: Bundle, export: Export, folder: Path, plan: _Plan) -> None:
    """The network itself: its file as it was judged, byte by byte."""
    name, capability = _file_name(export)
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(export.path, folder / "1" / name)
    write_text(folder / LABELS, "".join(f"{label}\n" for label in label_lines(bundle.labels)))
    write_text(folder / CONFIG, to_pbtxt(_model_config(bundle, export, plan, name, capability)))


def _file_name(export: Export) -> tuple[str, str]:
    """(file in the version folder, compute capability it is bound to or "").

    A plan that runs on one compute capability is listed under it and has no default, so that another GPU finds no file
    instead of a foreign one.
    """
    if export.meta["target"] == "onnx":
        return "model.onnx", ""
    capability = export.meta.get("compute_capability")
    if not capability or export.meta.get("hardware", "this") == "ampere+":
        return "model.plan", ""
    numbers = capability.split(".") if isinstance(capability, str) else [str(int(part)) for part in capability]
    return f"model_sm{''.join(numbers)}.plan", ".".join(numbers)


def _model_config(bundle: Bundle, export: Export, plan: _Plan, file: str, capability: str) -> dict[str, Any]:
    options = plan.options
    fixed = [plan.batch] if plan.batch else []
    dims = [*fixed, bundle.pixels.size, bundle.pixels.size, bundle.pixels.channels]
    scores = {**_tensor(SCORES, "TYPE_FP32", [*fixed, bundle.labels.size]), "label_filename": LABELS}
    kind = "backend" if plan.platform == "onnxruntime" else "platform"
    config: dict[str, Any] = {
        "name": plan.name,
        kind: plan.platform,
        "max_batch_size": plan.max_batch,
        "input": [_tensor(PIXELS, "TYPE_UINT8", dims)],
        "output": [scores],
        "instance_group": [_instances(options.instances, options.gpu)],
    }
    if plan.max_batch:
        config["dynamic_batching"] = {
            "preferred_batch_size": list(plan.preferred),
            "max_queue_delay_microseconds": options.queue_delay_us,
        }
    if capability:
        config["cc_model_filenames"] = [{"key": capability, "value": file}]
    if optimization := _optimization(export, options):
        config["optimization"] = optimization
    facts = score_facts(bundle)
    if plan.platform == "onnxruntime" and not options.gpu and options.threads:
        facts["intra_op_thread_count"] = str(options.threads)
    if facts:
        config["parameters"] = _parameters(facts)
    if options.warmup:
        sizes = sorted({1, *plan.preferred}) if plan.max_batch else [1]
        config["model_warmup"] = [
            _warmup(f"zeros_{size}", size, PIXELS, {"data_type": Word("TYPE_UINT8"), "dims": dims, "zero_data": True})
            for size in sizes
        ]
    return config


def _optimization(export: Export, options: TritonOptions) -> dict[str, Any]:
    if export.meta["target"] == "trt":
        return {"cuda": {"graphs": True}} if options.cuda_graphs else {}
    if way_of("onnx", export.meta.get("precision")).quantized:
        # ONNX Runtime's optimiser mis-evaluates FP16 Q/DQ graphs (resnet18: 10.9 dB instead of 22.2); 2 is its "disable all"
        return {"graph": {"level": 2}}
    return {}


def _write_decode(bundle: Bundle, folder: Path, plan: _Plan) -> dict[str, float]:
    """The decoder, and how far its pixels are from the specification's.

    Raises:
        ExportError: E001 when they are further than two decoders of the same pixels may be.
    """
    from .triton_decode import INPUT, LARGEST, MEAN, decode_difference, decode_pipeline, made_picture

    found = decode_difference(bundle.pixels)
    if found["largest"] > LARGEST or found["mean"] > MEAN:
        raise ExportError(
            "E001",
            f"the decoder for Triton gives other pixels than the model was trained on: largest difference {found['largest']:.0f} "
            f"levels (allowed {LARGEST}), mean {found['mean']:.3f} (allowed {MEAN})",
            try_=env.requirement_hint("nvidia-dali-cuda130"),
        )
    options, side = plan.options, bundle.pixels.size
    picture = made_picture(120, 90, "JPEG")
    config: dict[str, Any] = {
        "name": folder.name,
        "backend": "dali",
        "max_batch_size": options.decode_batch,
        "input": [{**_tensor(INPUT, "TYPE_UINT8", [-1]), "allow_ragged_batch": True}],
        "output": [_tensor(PIXELS, "TYPE_UINT8", [side, side, bundle.pixels.channels])],
        "instance_group": [_instances(options.decode_instances or (1 if options.gpu else 4), options.gpu)],
        "dynamic_batching": {},
        "parameters": _parameters({"num_threads": str(min(4, options.decode_batch))}),
    }
    if options.warmup:
        sample = {"data_type": Word("TYPE_UINT8"), "dims": [len(picture)], "input_data_file": _WARMUP}
        config["model_warmup"] = [_warmup("picture", 1, INPUT, sample)]
    with explained_write(folder):
        (folder / "1").mkdir(parents=True)
        (folder / "warmup").mkdir()
        pipeline = decode_pipeline(bundle.pixels, gpu=bool(options.gpu))
        write_whole(folder / "1" / "model.dali", lambda file: file.write(pipeline))
        write_whole(folder / "warmup" / _WARMUP, lambda file: file.write(picture))
        write_text(folder / CONFIG, to_pbtxt(config))
    return found


def _write_ensemble(bundle: Bundle, folder: Path, plan: _Plan) -> None:
    """Encoded image in, scores out; between the two models the pixels stay on the server."""
    scores = {**_tensor(SCORES, "TYPE_FP32", [bundle.labels.size]), "label_filename": LABELS}
    steps = (
        {"model_name": plan.name + DECODE, "model_version": -1, **_maps((ENCODED, ENCODED), (PIXELS, PIXELS))},
        {"model_name": plan.name, "model_version": -1, **_maps((PIXELS, PIXELS), (SCORES, SCORES))},
    )
    config = {
        "name": folder.name,
        "platform": "ensemble",
        "max_batch_size": plan.options.decode_batch,
        "input": [_tensor(ENCODED, "TYPE_UINT8", [-1])],
        "output": [scores],
        "ensemble_scheduling": {"step": list(steps)},
    }
    if facts := score_facts(bundle):
        config["parameters"] = _parameters(facts)
    with explained_write(folder):
        (folder / "1").mkdir(parents=True)
        # an empty folder is lost in buckets and in git, and without a version the ensemble is not served
        write_text(folder / "1" / ".keep", "")
        write_text(folder / LABELS, "".join(f"{label}\n" for label in label_lines(bundle.labels)))
        write_text(folder / CONFIG, to_pbtxt(config))


def _parameters(facts: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": value}} for key, value in facts.items()]


def _tensor(name: str, kind: str, dims: list[int]) -> dict[str, Any]:
    return {"name": name, "data_type": Word(kind), "dims": dims}


def _instances(count: int, gpu: bool | None) -> dict[str, Any]:
    return {"count": count, "kind": Word("KIND_GPU" if gpu else "KIND_CPU")}


def _warmup(name: str, batch: int, key: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "batch_size": batch, "inputs": [{"key": key, "value": value}]}


def _maps(takes: tuple[str, str], gives: tuple[str, str]) -> dict[str, Any]:
    return {
        side: [{"key": key, "value": value}] for side, (key, value) in (("input_map", takes), ("output_map", gives))
    }


def _facts(export: Export, plan: _Plan) -> dict[str, Any]:
    """What meta.json adds: enough for `deploy render`, and for a person who asks where this came from."""
    meta, options = export.meta, plan.options
    bound = ("tensorrt", "gpu", "compute_capability", "hardware", "version_compatible")
    models = [plan.name, *((plan.name + DECODE, plan.name + ENSEMBLE) if plan.dali else ())]
    version_compatible = meta["target"] == "trt" and bool(meta.get("version_compatible"))
    return {
        "source": {"target": meta["target"], "folder": export.folder.name, "sha256": meta["sha256"]},
        "name": plan.name,
        "models": models,
        "platform": plan.platform,
        "on_gpu": options.gpu,
        "batch": plan.batch,
        "max_batch": plan.max_batch,
        "preferred": list(plan.preferred),
        "queue_delay_us": options.queue_delay_us,
        "instances": options.instances,
        "decode": plan.dali,
        "no_decoder": plan.no_decoder,
        "server_args": ["--backend-config=tensorrt,version-compatible=true"] if version_compatible else [],
        "plan": {name: meta[name] for name in bound if name in meta} if meta["target"] == "trt" else None,
    }
