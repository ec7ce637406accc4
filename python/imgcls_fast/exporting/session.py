"""One export, from what was asked for to a file that has been compared, judged and timed; or an error, and nothing handed over."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..core import env
from ..core.bundle import Bundle, read_bundle
from ..core.config_verbs import ExportConfig
from ..core.errors import ConfigError, GateFailed
from ..core.exports import GATE, Export, choose, common_meta, export_key, find_key, finish, list_exports, new_export
from ..core.files import explained_write, plain_path, sha256_file, sync_directory, write_sealed
from ..core.manifest import Manifest
from ..core.run import Run
from ..core.settings import replace_settings
from ..core.undecoded import Undecoded
from ..data.prepare import more_rows
from ..engines.as_found import as_found
from ..engines.base import Engine
from ..engines.onnx_runtime import OnnxEngine
from ..engines.runtimes import open_engine
from ..engines.timing import best_batch, measure
from ..engines.torch_runtime import FunctionEngine, scorer_of
from ..evaluation.paired import Judgement
from ..graphs.half import beyond_half
from ..graphs.lint import demand_clean, lint
from ..graphs.onnx_graph import Precision, export_onnx, graph_facts, verify_graph
from ..graphs.quantize import autocast, calibration_facts, calibration_rows, quantize
from ..loading.loader import comparison_rows, pixels_of, read_rows
from .gate import Gate, GateData, counts_as_passed, demand, gate_data, gate_report, plain_int8_loses, rows_digest
from .pareto import search_plot

Target = Literal["onnx", "trt", "pt2", "aoti", "torchscript", "triton"]
TARGETS: tuple[Target, ...] = ("onnx", "trt", "pt2", "aoti", "torchscript", "triton")
MODEL, PLAN, PICTURE = "model.onnx", "model.plan", "pareto.png"

_LARGEST_LIST = 64  # calibration images that AutoCast and the ranking of layers look at
_RANGE_LIST = 128  # calibration images that are looked at for values beyond FP16
_SHORT = {"warmup_s": 0.2, "duration_s": 1.0}  # of a timing that goes into meta.json; `imgcls-fast bench` takes longer
_SWEPT = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Exporter:
    """Everything that the exports of one bundle share; what costs time is made when it is first needed.

    Args:
        bundle: the model.
        manifest: the images of its run.
        exports: folder of the run's exports.
        settings: of this export.
        seed: of calibration rows and of the division of gate rows.
        extra: more labelled images for the gate (`--gate-data`), scanned with the classes of the model.
        strict: also refuse FP16 and BF16 that the rows cannot prove; INT8 is always refused then.
        run: how the run is named in commands.
        say: told what happens, in whole sentences.
        progress: told how far the building of an engine is (phase, 0..1).
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

    # --- images -------------------------------------------------------------------------------------------------------

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

    def new_gate(self, fraction: float) -> Gate:
        """A gate whose verdict rows nobody has seen."""
        manifest = self.gate_data.manifest
        return Gate(
            self.gate_data,
            self.reference,
            lambda rows: read_rows(manifest, rows, self.bundle.pixels, on_bad=self.undecoded["gate"].of(manifest)),
            max_drop_pp=self.settings.max_drop,
            seed=self.seed,
            fraction=fraction,
        )

    # --- ONNX ---------------------------------------------------------------------------------------------------------

    def onnx(self, precision: str, *, exported_for: str = "onnx") -> Export:
        """The ONNX export of a precision: compared, linted, judged; named in index.json if it may be used.

        Args:
            exported_for: what the file is meant for: "trt" when it is only the way to an engine, and its judgement a simulation.

        Raises:
            ExportError: E001, E002, E003; GateFailed: E901, E902, E903; HardwareError: H003, H004.
        """
        if precision == "fp32":
            export = self._plain("fp32")
        elif precision == "int8":
            export = self._judged_int8(exported_for)
        else:
            export = self._judged_half(precision, exported_for)
        choose(export, default=exported_for == "onnx" and precision != "bf16")  # which no ONNX runtime on a CPU takes
        return export

    def _graph(self, precision: Precision) -> Export:
        return export_onnx(
            self.bundle, self.exports, self.comparison, precision=precision, settings=self.settings, name_it=False
        )

    def _judged_half(self, precision: str, exported_for: str) -> Export:
        export = self._plain(precision)
        engine = self._open_onnx(export.path, precision)
        gate = self.new_gate(0)
        simulated = engine.runtime != exported_for
        judgement = gate.verdict(f"{exported_for}-{precision}", engine, simulated=simulated)
        export.write_gate(self._report(judgement, gate, engine, exported_for, str(export.meta["sha256"])))
        engine.close()
        self._demand(judgement, exported_for, precision)
        return export

    def _half(self, precision: str) -> Export:
        """The half model between float edges; where its ranges burst FP16, AutoCast decides what stays in float32."""
        burst = beyond_half(self._graph("fp32").path, self.calibration[:_RANGE_LIST]) if precision == "fp16" else ""
        if not burst:
            try:
                return self._graph(precision)  # type: ignore[arg-type]
            except GateFailed as failed:
                if precision != "fp16" or not len(self.calibration):
                    raise
                burst = failed.message
        self.say(f"{burst}; layers that need float32 keep it (AutoCast)")
        base = self._graph("fp32")
        key = export_key(self.bundle, base=base.meta["sha256"], autocast=env.versions(("nvidia-modelopt",)))
        if (made := find_key(self.exports, self.bundle, "onnx", precision, key)) is not None:
            return made
        with new_export(self.exports, "onnx", precision, key) as temporary:
            path = temporary / MODEL
            facts = autocast(base.path, path, "fp16", self.calibration[:_LARGEST_LIST])
            found = verify_graph(path, self.bundle, self.comparison, precision, self.settings.max_score_diff)
            meta = {**graph_facts(path, self.bundle, self.settings.batch), **found, "autocast": facts}
            return finish(temporary, self.bundle, "onnx", precision, MODEL, meta)

    # --- INT8 ---------------------------------------------------------------------------------------------------------

    def _judged_int8(self, exported_for: str) -> Export:
        base = self._graph("fp32")
        key = self._int8_key(base, exported_for)
        made = find_key(self.exports, self.bundle, "onnx", "int8", key)
        if made is not None and (made.gate or {}).get("verdict") == "pass":
            return made
        with new_export(self.exports, "onnx", "int8", key) as temporary:
            gate = self.new_gate(self.settings.search_fraction)
            facts = self.quantised(base, temporary, gate, exported_for)
            engine = self._open_onnx(temporary / MODEL, "int8")
            judgement = gate.verdict(f"{exported_for}-int8", engine, simulated=engine.runtime != exported_for)
            report = self._report(judgement, gate, engine, exported_for, sha256_file(temporary / MODEL))
            write_sealed(temporary / GATE, report)
            engine.close()
            meta = {**graph_facts(temporary / MODEL, self.bundle, self.settings.batch), **facts}
            export = finish(temporary, self.bundle, "onnx", "int8", MODEL, meta)
        self._demand(judgement, exported_for, "int8")
        return export

    def _int8_key(self, base: Export, exported_for: str) -> str:
        settings = self.settings
        return export_key(
            self.bundle,
            base=base.meta["sha256"],
            calibration=rows_digest(self.manifest.digest[self.calibration_rows]),
            method=settings.calibration_method,
            quantizer=settings.quantizer,
            versions=env.versions(("nvidia-modelopt", "onnx", "onnxruntime")),
            gate=[self.gate_data.digest(), settings.max_drop, settings.search_fraction, self.seed, exported_for],
        )

    def quantised(self, base: Export, folder: Path, gate: Gate, exported_for: str) -> dict[str, Any]:
        """Write folder/model.onnx in INT8: plain if the search rows let it pass, else with the worst layers in FP16.

        Returns:
            what meta.json says about quantisation, calibration, search and latency.
        """
        from ..graphs.sensitivity import layer_sqnr, rescue

        settings = self.settings
        calibrated = calibration_facts(self.manifest, self.calibration_rows, self.seed)
        simulated = exported_for != "onnx"
        made: dict[Path, dict[str, Any]] = {}
        timings: dict[str, float] = {}

        def make(exclude: tuple[str, ...]) -> Path:
            path = folder / f"candidate{len(made)}.onnx"
            made[path] = quantize(
                base.path, path, self.calibration, method=settings.calibration_method,
                quantizer=settings.quantizer or "auto", exclude=exclude,
            )  # fmt: skip
            demand_clean(lint(path, "int8"), path)
            return path

        def look(path: Path) -> _Looked:
            engine = self._open_onnx(path, "int8")
            name = f"int8, {len(made[path]['excluded'])} layers in FP16" if made[path]["excluded"] else "int8"
            timings[name] = measure(engine, self.settings.batch or 1, **_SHORT).end_to_end.p50_ms  # type: ignore[arg-type]
            judgement = gate.look(name, engine, simulated=simulated, excluded=list(made[path]["excluded"]))
            engine.close()
            return _Looked(judgement, "pass" if promising(judgement) else judgement.verdict)

        searched: dict[str, Any] | None = None
        with explained_write(folder):
            chosen = make(())
            looked = look(chosen)
            if looked.verdict != "pass" and settings.search_s > 0:
                self.say(plain_int8_loses(looked.judgement))
                ranked = layer_sqnr(base.path, chosen, self.calibration[:_LARGEST_LIST])
                found = rescue(ranked, lambda layers: make(tuple(layers)), look, budget_s=settings.search_s)
                chosen = found.chosen.path if found.chosen else chosen
                searched = {"ended": found.ended, "candidates": len(found.history), "sqnr_db": dict(ranked)}
            facts = made[chosen]
            if facts["note"]:
                self.say(facts["note"])
            shutil.copyfile(chosen, folder / MODEL)
            for path in made:
                path.unlink(missing_ok=True)
            self._picture(folder / PICTURE, gate, timings, facts, exported_for)
            sync_directory(folder)
        left = self.undecoded["calibration"].to_list()
        return {
            "quantisation": {**facts, "calibration": {**calibrated, **facts["calibration"], "undecodable_files": left}},
            "search": searched,
            "latency": self._latency(folder / MODEL, "int8"),
        }

    def _picture(
        self, path: Path, gate: Gate, timings: dict[str, float], facts: dict[str, Any], exported_for: str
    ) -> None:
        """Accuracy on the search rows against latency, of every candidate."""
        if not gate.history or not gate.history[0]["rows"]:
            return
        batch = self.settings.batch or 1
        reference = self._open_onnx(self._graph("fp32").path, "fp32")
        took = measure(reference, batch, **_SHORT).end_to_end.p50_ms  # type: ignore[arg-type]
        reference.close()
        search_plot(path, gate.history, took, timings, facts["excluded"], exported_for=exported_for, batch=batch)

    # --- engines ------------------------------------------------------------------------------------------------------

    def trt(self, precision: str) -> Export:
        """A TensorRT engine, judged itself; without TensorRT or a GPU the linted ONNX file and how to build it elsewhere.

        Raises:
            HardwareError: H004 or H001 where TensorRT or a GPU is missing; the ONNX file stays.
            ExportError: E004; and what `onnx` raises.
        """
        from ..engines.trt_plan import CudaDevice, machine
        from .trt_engine import TrtOptions, build_plan, require_builder, timing_cache_path, trt_missing

        missing = trt_missing()
        if missing:
            self.say(f"{missing}; the ONNX file for it is made all the same")
            source = self.onnx(precision, exported_for="trt")
            require_builder(source.path, source.folder / PLAN, TrtOptions.of(self.settings))
        options = TrtOptions.of(self.settings, timing_cache_path())
        base = self._graph("fp32") if precision == "int8" else self._plain(precision)
        key = export_key(
            self.bundle, options=options.shaping(), machine=machine(CudaDevice()), base=base.meta["sha256"],
            gate=self._int8_key(base, "trt"),
        )  # fmt: skip
        made = find_key(self.exports, self.bundle, "trt", precision, key)
        if made is None or (precision != "fp32" and not counts_as_passed(made.gate, str(made.meta["sha256"]))):
            made = self._built(precision, base, key, options, build_plan)
        choose(made)
        return made

    def _plain(self, precision: str) -> Export:
        """The linted file that an engine in fp32, fp16 or bf16 is built from."""
        source = self._graph("fp32") if precision == "fp32" else self._half(precision)
        demand_clean(lint(source.path, precision), source.path)
        return source

    def _built(
        self, precision: str, base: Export, key: str, options: Any, build: Callable[..., dict[str, Any]]
    ) -> Export:
        gate = self.new_gate(self.settings.search_fraction if precision == "int8" else 0)
        with new_export(self.exports, "trt", precision, key) as temporary:
            facts: dict[str, Any] = {}
            if precision == "int8":
                facts = self.quantised(base, temporary, gate, "trt")
            else:
                shutil.copyfile(base.path, temporary / MODEL)
            built = build(temporary / MODEL, temporary / PLAN, options, progress=self.progress)
            meta = {**graph_facts(temporary / MODEL, self.bundle, self.settings.batch), **facts, **built}
            judgement = self._judge_plan(temporary, gate, meta, precision)
            export = finish(temporary, self.bundle, "trt", precision, PLAN, meta)
        if judgement is not None:
            self._demand(judgement, "trt", precision)
        return export

    def _judge_plan(self, folder: Path, gate: Gate, meta: dict[str, Any], precision: str) -> Judgement | None:
        """Judge the plan that lies in `folder`, and time it; FP32 is compared on real images instead."""
        from ..engines.agreement import compare_engines, judge_comparison
        from ..engines.trt_runtime import TrtEngine

        digest = sha256_file(folder / PLAN)
        whole = {**common_meta(self.bundle), **meta, "sha256": digest}
        engine = TrtEngine(folder / PLAN, whole, self.bundle.labels, self.bundle.pixels, streams=self.settings.streams)
        try:
            result = compare_engines(self.reference, engine, self.comparison)
            meta["comparison"] = result.to_dict()
            if precision != "int8":
                judge_comparison(result, precision, self.settings.max_score_diff, "TensorRT")
            meta["latency"] = _timings(engine, self.settings.batch)
            if precision == "fp32":
                return None
            judgement = gate.verdict(f"trt-{precision}", engine, simulated=False)
            write_sealed(folder / GATE, self._report(judgement, gate, engine, "trt", digest))
            return judgement
        finally:
            engine.close()

    def program(self, target: str, precision: str) -> Export:
        """A program of PyTorch: torch.export, AOTInductor or TorchScript."""
        from .programs import WRITERS, demand_compiler

        if target == "aoti" and not any(export.meta.get("target") == target for export in list_exports(self.exports)):
            demand_compiler("cpu")  # before images are decoded
        return WRITERS[target](self.bundle, self.exports, self.comparison, settings=self.settings, precision=precision)

    def triton(self, precision: str) -> Export:
        """A Triton repository around the TensorRT engine where one can be built, else around the ONNX file."""
        from .triton import TritonOptions, export_triton
        from .trt_engine import trt_missing

        missing = trt_missing()
        if missing:
            self.say(f"{missing}: the repository holds the ONNX file")
        source = self.onnx(precision) if missing else self.trt(precision)
        return export_triton(
            self.bundle, self.exports, source, TritonOptions(gpu=torch.cuda.is_available(), max_batch=self.settings.max_batch)
        )  # fmt: skip

    # --- parts --------------------------------------------------------------------------------------------------------

    def _open_onnx(self, path: Path, precision: str) -> Engine:
        """What computes the scores of an ONNX file here. No ONNX runtime on a CPU takes BF16, so PyTorch stands in for it."""
        if precision != "bf16":
            return OnnxEngine(path, self.bundle.labels, self.bundle.pixels)
        return FunctionEngine(
            scorer_of(self.bundle, "bf16"), self.bundle.labels, self.bundle.pixels, runtime="torch", precision="bf16"
        )

    def _latency(self, path: Path, precision: str) -> dict[str, Any]:
        engine = self._open_onnx(path, precision)
        try:
            return _timings(engine, self.settings.batch)
        finally:
            engine.close()

    def _report(
        self, judgement: Judgement, gate: Gate, engine: Engine, exported_for: str, digest: str
    ) -> dict[str, Any]:
        names = ("torch", "onnx", "onnxruntime", "nvidia-modelopt", "tensorrt")
        found = {name: version for name, version in env.versions(names).items() if version}
        return gate_report(
            judgement, gate, judge_runtime=engine.runtime, judge_precision=engine.precision,
            exported_runtime=exported_for, versions={**found, "imgcls-fast": env.package_version()},
            bundle=self.bundle.digest, engine=digest, calibration=self.manifest.digest[self.calibration_rows],
        ) | {"undecodable_files": self.undecoded["gate"].to_list()}  # fmt: skip

    def _demand(self, judgement: Judgement, target: str, precision: str) -> None:
        """INT8 has to be proven. Half precision has to be proven if a budget was asked for, else not to be disproven."""
        share = 1 - self.settings.search_fraction if precision == "int8" else 1.0
        try:
            demand(judgement, f"{target}-{precision}", run=self.run, verdict_share=share)
        except GateFailed as refused:
            if refused.code != "E903" or precision == "int8" or self.strict:
                raise
            self.say(f"not proven: {refused.message}")


@dataclass(frozen=True)
class _Looked:
    """What the search rows said: "pass" for a candidate that is worth the verdict rows."""

    judgement: Judgement
    verdict: str


def promising(judgement: Judgement) -> bool:
    """Whether a candidate that did so on the search rows is worth the verdict rows.

    It is if the search rows alone would let it pass, or if it lost no more than half of the budget: with few rows no bound can
    be within the budget, and then the verdict, not a search, has to say so.
    """
    return judgement.passed or judgement.drop <= judgement.max_drop / 2


def export_bundle(exporter: Exporter, target: str, precision: str | None = None) -> Export:
    """Make one export; see `Exporter`.

    Args:
        target: one of `TARGETS`.
        precision: fp32, fp16, bf16 or int8; None: fp16 for trt, else fp32.

    Raises:
        ConfigError: C003 for an unknown target, C004 for a precision that the target does not have.
    """
    if target not in TARGETS:
        legal = ", ".join(repr(name) for name in TARGETS)
        raise ConfigError(
            "C003", f"target must be one of {legal}, got {target!r}", try_="imgcls-fast export RUN --onnx"
        )
    precision = precision or ("fp16" if target == "trt" else "fp32")
    if target in ("pt2", "aoti", "torchscript"):
        if precision == "int8":
            raise ConfigError(
                "C004", f"--{target} has no int8; INT8 leaves through ONNX", try_="imgcls-fast export --onnx --precision int8"
            )  # fmt: skip
        return exporter.program(target, precision)
    if target == "onnx":
        return exporter.onnx(precision)
    return exporter.trt(precision) if target == "trt" else exporter.triton(precision)


@as_found()
def export_run(
    run: Run,
    target: str,
    precision: str | None,
    changes: Mapping[str, Any],
    *,
    say: Callable[[str], None],
    progress: Callable[[str, float], None] | None = None,
) -> Export:
    """Export the bundle of a run, with its settings and `changes` to them (dotted names). See `api.export`."""
    run.demand_own_places()
    bundle = read_bundle(run.bundle_path)
    config = replace_settings(run.config, dict(changes))
    source = config.export.gate_data
    extra = more_rows(config.data, Path(source), bundle, say) if source else None
    exporter = Exporter(
        bundle, run.manifest, plain_path(run.directory) / run.exports.name, config.export, seed=config.train.seed, extra=extra,
        strict="export.max_drop" in changes, run=str(run.directory), say=say, progress=progress,
    )  # fmt: skip
    try:
        made = export_bundle(exporter, target, precision)
    finally:
        for use, left in exporter.undecoded.items():
            say(f"{use} images: {left.sentence()}") if left else None
    return Export(run.exports / made.folder.name, made.meta)


def _timings(engine: Engine, batch: int | None) -> dict[str, Any]:
    """Latency of batch 1 (or of the fixed batch) and of the batch with the highest rate."""
    sizes = [batch] if batch else [size for size in _SWEPT if size <= engine.max_batch]
    sweep = best_batch(engine, sizes, budget_s=10.0, **_SHORT)
    return {"one": sweep.timings[0].to_dict(), "best": sweep.best.to_dict()}
