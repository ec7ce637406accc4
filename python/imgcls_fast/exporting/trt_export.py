"""Builds a TensorRT engine and judges it; without TensorRT or a GPU leaves the linted ONNX file and the command for elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..core.exports import GATE, Export, choose, common_meta, export_key, find_key, finish, new_export, way_of
from ..core.files import sha256_file, write_sealed
from ..core.targets import Way
from ..engines.agreement import compare_engines, judge_comparison
from ..engines.trt_plan import CudaDevice, machine
from ..engines.trt_runtime import TrtEngine
from ..evaluation.paired import Judgement
from ..graphs.onnx_graph import graph_facts
from . import onnx_export
from .gate import Gate, counts_as_passed
from .int8 import MODEL, int8_key, search_int8
from .materials import Materials
from .trt_engine import TrtOptions, build_plan, require_builder, timing_cache_path, trt_missing

PLAN = "model.plan"


def export(materials: Materials, way: Way) -> Export:
    """Build, compare, judge and time an engine.

    Raises:
        HardwareError: H004 or H001 where TensorRT or a GPU is missing; the ONNX file stays.
        ExportError: E004; and what `onnx_export.export` raises.
    """
    bundle, settings = materials.bundle, materials.settings
    if missing := trt_missing():
        materials.say(f"{missing}; the ONNX file for it is made all the same")
        source = onnx_export.export(materials, way_of("onnx", way.precision), exported_for=way.target)
        require_builder(source.path, source.folder / PLAN, TrtOptions.of(settings))
    options = TrtOptions.of(settings, timing_cache_path())
    base = materials.graph("fp32") if way.quantized else onnx_export.linted(materials, way)
    key = export_key(
        bundle,
        options=options.shaping(),
        machine=machine(CudaDevice()),
        base=base.meta["sha256"],
        gate=int8_key(materials, base, way.target),
    )
    made = find_key(materials.exports, bundle, way.target, way.precision, key)
    if made is None or (way.judged and not counts_as_passed(made.gate, str(made.meta["sha256"]))):
        made = _built(materials, way, base, key, options)
    choose(made)
    return made


def _built(materials: Materials, way: Way, base: Export, key: str, options: TrtOptions) -> Export:
    bundle, gate = materials.bundle, materials.new_gate(way)
    with new_export(materials.exports, way.target, way.precision, key) as temporary:
        facts: dict[str, Any] = {}
        if way.quantized:
            facts = search_int8(materials, way, base, temporary, gate, way.target)
        else:
            shutil.copyfile(base.path, temporary / MODEL)
        built = build_plan(temporary / MODEL, temporary / PLAN, options, progress=materials.progress)
        meta = {**graph_facts(temporary / MODEL, bundle, materials.settings.batch), **facts, **built}
        judgement = _judged(materials, way, temporary, gate, meta)
        export = finish(temporary, bundle, way.target, way.precision, PLAN, meta)
    if judgement is not None:
        materials.demand(judgement, way, way.target)
    return export


def _judged(materials: Materials, way: Way, folder: Path, gate: Gate, meta: dict[str, Any]) -> Judgement | None:
    """Judge the plan in `folder`, and time it; FP32 is compared on real images instead."""
    bundle, settings = materials.bundle, materials.settings
    digest = sha256_file(folder / PLAN)
    whole = {**common_meta(bundle), **meta, "sha256": digest}
    engine = TrtEngine(
        folder / PLAN, whole, bundle.labels, bundle.pixels, streams=settings.streams, thresholds=bundle.thresholds
    )
    try:
        result = compare_engines(materials.reference, engine, materials.comparison)
        meta["comparison"] = result.to_dict()
        if not way.quantized:
            judge_comparison(result, way.precision, settings.max_score_diff, "TensorRT")
        meta["latency"] = materials.timings(engine)
        if not way.judged:
            return None
        judgement = gate.verdict(f"{way.target}-{way.precision}", engine, simulated=False)
        report = materials.report(judgement, gate, engine, exported_for=way.target, digest=digest)
        write_sealed(folder / GATE, report)
        return judgement
    finally:
        engine.close()
