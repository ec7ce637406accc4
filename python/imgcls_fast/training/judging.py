"""From the best checkpoint to a judged bundle, and from a run to an engine that can be asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.torch import save

from ..core import env
from ..core.bundle import Bundle, read_bundle, write_bundle
from ..core.errors import ConfigError, ModelError
from ..core.files import sha256_json
from ..core.manifest import Manifest
from ..core.pixels import Pixels
from ..core.predictions import Predictions
from ..core.run import Run
from ..core.runs import find_run
from ..core.settings import flatten
from ..engines.as_found import as_found
from ..engines.base import Engine
from ..engines.runtimes import open_engine
from ..engines.torch_runtime import TorchEngine
from ..evaluation.metrics import apply_temperature, fit_temperature
from ..models.build import Classifier, ModelSpec, build_model, load_weights
from ..models.kernels import use_kernels
from .checkpoint import final_state
from .progress import Progress, how_it_ended

_TINY = np.finfo(np.float32).tiny  # below it a float32 score has lost its logarithm


def best_model(run: Run) -> tuple[Classifier, dict[str, Any], Progress]:
    """The network with the weights of the best epoch, the facts of model.json, and how training went.

    Raises:
        ModelError: M005 when there is no intact best checkpoint yet.
    """
    facts = run.read_json("model.json")
    if facts is None:
        raise ModelError(
            "M005", f"{run.directory} has no model yet", try_=run.resume_command
        )
    tensors, progress = final_state(run)
    model = build_model(ModelSpec.from_dict(facts["spec"]))
    load_weights(model, tensors)
    use_kernels(model, run.config.model.kernels)
    return model.eval(), facts, progress


def make_bundle(
    run: Run, manifest: Manifest, model: Classifier, facts: dict[str, Any], progress: Progress, validation: Predictions
) -> Bundle:
    """Fit the temperature on the validation rows, and write the bundle: weights, labels, pixels, provenance."""
    config = run.config
    temperature, told = 1.0, "temperature 1: no calibration was asked for"
    if config.evaluate.calibrate and len(validation):
        temperature = fit_temperature(np.log(np.maximum(validation.scores, _TINY)), validation.truth)
        told = f"temperature {temperature:.3g}, fitted on {len(validation):,} validation images"
        if temperature == 1:
            told = f"temperature 1: {len(validation):,} validation images show no better one, so confidences are the network's own"

    def weights(file: BinaryIO) -> None:
        file.write(save({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}))

    provenance = {
        "run": run.name,
        "config": sha256_json(flatten(config)),
        "data": manifest.fingerprint,
        "source": manifest.source,
        "epoch": progress.best_epoch + 1,
        "monitor": config.train.monitor,
        "monitored": how_it_ended(config.train, progress.history)["best"],
        "start": facts["start"],
        "calibration": told,
        "machine": env.machine_facts(),
    }
    return write_bundle(
        run.bundle_path,
        weights,
        arch=facts["spec"],
        labels=manifest.labels,
        pixels=Pixels.from_dict(facts["pixels"]),
        temperature=temperature,
        provenance=provenance,
    )


def calibrated(predictions: Predictions, temperature: float) -> Predictions:
    """The same predictions as a model with this temperature gives them."""
    scores = apply_temperature(np.log(np.maximum(predictions.scores, _TINY)), temperature)
    return Predictions(
        predictions.rows, scores, predictions.targets, predictions.labels, predictions.paths, predictions.fingerprint
    )


@as_found()  # building a network draws random numbers
def run_engine(
    run: Run, runtime: str = "torch", device: str = "cpu", precision: str | None = None, trust: bool = False
) -> tuple[Engine, str]:
    """An engine for a run, and a note where it is not the judged model (training has not ended yet).

    Raises:
        ModelError: M004, M005 when there is no usable model.
        ConfigError: C004 for another runtime than torch before training has ended.
    """
    if run.finished:
        return open_engine(
            read_bundle(run.bundle_path), runtime, device=device, exports=run.exports, precision=precision, trust=trust
        ), ""
    if runtime != "torch":
        raise ConfigError(
            "C004",
            f"{run.directory} is not finished, so only the runtime torch can answer",
            try_=run.resume_command,
        )
    model, facts, progress = best_model(run)
    engine = TorchEngine(model.to(device), run.manifest.labels, Pixels.from_dict(facts["pixels"]), device=device)
    return (
        engine,
        f"{run.name} is not finished: answers come from its best checkpoint so far (epoch {progress.best_epoch + 1}), not calibrated",
    )


def bundle_folder(path: Path) -> Path | None:
    """`path` itself or its sub-folder `bundle`, whichever holds a bundle."""
    return next((folder for folder in (path, path / "bundle") if os.path.isfile(folder / "bundle.json")), None)


@as_found()
def open_model(
    run: Run | str | Path | None, runtime: str, device: str, precision: str | None, trust: bool = False
) -> tuple[Engine, str]:
    """The engine of a run (None: the last one) or of a lone bundle's folder, and a note. See `run_engine`."""
    lone = bundle_folder(Path(run)) if isinstance(run, str | Path) and str(run) != "last" else None
    if lone is not None:
        return open_engine(read_bundle(lone), runtime, device=device, precision=precision, trust=trust), ""
    return run_engine(run if isinstance(run, Run) else find_run(run), runtime, device, precision, trust)
