"""What the exports of one bundle share: its images, the model in FP32, the gate, and how files are opened, timed and judged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core import env
from ..core.bundle import Bundle
from ..core.config_verbs import ExportConfig
from ..core.errors import GateFailed
from ..core.exports import Export
from ..core.manifest import Manifest
from ..core.targets import Way
from ..core.undecoded import Undecoded
from ..engines.base import Engine
from ..engines.onnx_runtime import OnnxEngine
from ..engines.runtimes import open_engine
from ..engines.timing import best_batch, measure
from ..engines.torch_runtime import FunctionEngine, scorer_of
from ..evaluation.paired import Judgement
from ..graphs.onnx_graph import export_onnx
from ..graphs.quantize import calibration_rows
from ..loading.loader import comparison_rows, pixels_of, read_rows
from .gate import Gate, GateData, demand, gate_data, gate_report

_SHORT = {"warmup_s": 0.2, "duration_s": 1.0}  # of a timing that goes into meta.json; `imgcls-fast bench` takes longer
_SWEPT = (1, 2, 4, 8, 16, 32, 64)
_VERSIONS = ("torch", "onnx", "onnxruntime", "nvidia-modelopt", "tensorrt")  # libraries that shape scores


@dataclass
class Materials:
    """Everything that the exports of one bundle share; what costs time is made when it is first needed.

    Args:
        bundle: the model.
        manifest: the images of its run.
        exports: folder of the run's exports.
        settings: the section `export` of the configuration.
        seed: seed for calibration rows and for the division of gate rows.
        extra: more labelled images for the gate (`--gate-data`), scanned with the classes of the model.
        strict: also refuse FP16 and BF16 that the rows cannot prove; INT8 is always refused then.
        run: how the run is named in commands.
        say: receives what happens, in whole sentences.
        progress: receives how far the building of an engine is (phase, 0..1).
    """

    bundle: Bundle
    manifest: Manifest
    exports: Path
    settings: ExportConfig
    seed: int = 0
    extra: Manifest | None = None
    strict: bool = False
    run: str = "RUN"
    say: Callable[[str], None] = field(default=lambda sentence: None)
    progress: Callable[[str, float], None] | None = None
    undecoded: dict[str, Undecoded] = field(default_factory=lambda: defaultdict(Undecoded))  # by use

    @cached_property
    def comparison(self) -> list[np.ndarray]:
        """Real images for comparing a file with its original, (n, S, S, C) uint8 each."""
        rows = comparison_rows(self.manifest, self.settings.verify_images)
        return pixels_of(self.bundle, self.manifest, rows, self.undecoded["comparison"])

    @cached_property
    def calibration_rows(self) -> np.ndarray:
        """Rows of the training split that set INT8 ranges."""
        return calibration_rows(self.manifest, self.settings.calibration_images, self.seed)

    @cached_property
    def calibration(self) -> np.ndarray:
        """(N, S, S, C) uint8."""
        parts = pixels_of(self.bundle, self.manifest, self.calibration_rows, self.undecoded["calibration"])
        side, channels = self.bundle.pixels.size, self.bundle.pixels.channels
        return np.concatenate(parts) if parts else np.zeros((0, side, side, channels), np.uint8)

    @cached_property
    def gate_data(self) -> GateData:
        """Labelled images that may judge."""
        digests = self.manifest.digest[self.calibration_rows]
        data = gate_data(self.manifest, self.settings.gate_rows, calibration=digests, extra=self.extra)
        if data.left_out:
            left = ", ".join(f"{count:,} {reason}" for reason, count in data.left_out.items())
            self.say(f"{len(data):,} gate rows; left out: {left}")
        return data

    @cached_property
    def reference(self) -> Engine:
        """The model in FP32."""
        return open_engine(self.bundle, "torch")

    def graph(self, precision: str) -> Export:
        """The ONNX file of a floating-point precision, compared with torch and named nowhere yet."""
        return export_onnx(
            self.bundle, self.exports, self.comparison, precision=precision, settings=self.settings, name_it=False
        )

    def open_onnx(self, path: Path, way: Way) -> Engine:
        """What computes the scores of an ONNX file on this machine."""
        labels, pixels, least = self.bundle.labels, self.bundle.pixels, self.bundle.thresholds
        if not way.stand_in:
            return OnnxEngine(path, labels, pixels, thresholds=least)
        scorer = scorer_of(self.bundle, way.precision)
        return FunctionEngine(scorer, labels, pixels, runtime="torch", precision=way.precision, thresholds=least)

    # --- the gate -----------------------------------------------------------------------------------------------------

    def new_gate(self, way: Way) -> Gate:
        """A gate whose verdict rows nobody has seen; part of its rows serve the search where there is one."""
        manifest = self.gate_data.manifest
        return Gate(
            self.gate_data,
            self.reference,
            lambda rows: read_rows(manifest, rows, self.bundle.pixels, on_bad=self.undecoded["gate"].of(manifest)),
            max_drop_pp=self.settings.max_drop,
            seed=self.seed,
            fraction=self.settings.search_fraction if way.quantized else 0,
        )

    def report(
        self, judgement: Judgement, gate: Gate, engine: Engine, *, exported_for: str, digest: str
    ) -> dict[str, Any]:
        """Content of gate.json for the file with this SHA-256."""
        found = {name: version for name, version in env.versions(_VERSIONS).items() if version}
        report = gate_report(
            judgement,
            gate,
            judge_runtime=engine.runtime,
            judge_precision=engine.precision,
            exported_runtime=exported_for,
            versions={**found, "imgcls-fast": env.package_version()},
            bundle=self.bundle.digest,
            engine=digest,
            calibration=self.manifest.digest[self.calibration_rows],
        )
        return report | {"undecodable_files": self.undecoded["gate"].to_list()}

    def demand(self, judgement: Judgement, way: Way, exported_for: str) -> None:
        """Raise unless the judgement lets the file go: INT8 has to be proven; half precision if a budget was asked for.

        Raises:
            GateFailed: E902, E903.
        """
        share = 1 - self.settings.search_fraction if way.quantized else 1.0
        try:
            demand(judgement, way._replace(target=exported_for), run=self.run, verdict_share=share)
        except GateFailed as refused:
            if refused.code != "E903" or way.proven or self.strict:
                raise
            self.say(f"not proven: {refused.message}")

    # --- time ---------------------------------------------------------------------------------------------------------

    def latency(self, path: Path, way: Way) -> dict[str, Any]:
        """`timings` of an ONNX file."""
        engine = self.open_onnx(path, way)
        try:
            return self.timings(engine)
        finally:
            engine.close()

    def timings(self, engine: Engine) -> dict[str, Any]:
        """Latency of batch 1 (or of the fixed batch) and of the batch with the highest rate."""
        fixed = self.settings.batch
        sizes = [fixed] if fixed else [size for size in _SWEPT if size <= engine.max_batch]
        sweep = best_batch(engine, sizes, budget_s=10.0, **_SHORT)
        return {"one": sweep.timings[0].to_dict(), "best": sweep.best.to_dict()}

    def median_ms(self, engine: Engine) -> float:
        """Median latency of batch 1 (or of the fixed batch), milliseconds."""
        return measure(engine, self.settings.batch or 1, **_SHORT).end_to_end.p50_ms  # type: ignore[arg-type]
