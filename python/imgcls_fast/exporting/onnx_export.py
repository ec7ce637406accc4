"""Writes the ONNX file of a precision, compares it with torch, checks it against the rules for TensorRT, and judges it."""

from __future__ import annotations

from ..core import env
from ..core.errors import GateFailed
from ..core.exports import Export, choose, export_key, find_key, finish, new_export
from ..core.targets import Way
from ..graphs.half import beyond_half
from ..graphs.lint import demand_clean, lint
from ..graphs.onnx_graph import graph_facts, verify_graph
from ..graphs.quantize import autocast
from .int8 import MODEL, judged_int8
from .materials import Materials

_AUTOCAST_IMAGES = 64  # calibration images that AutoCast looks at
_RANGE_IMAGES = 128  # calibration images that are looked at for values beyond FP16


def export(materials: Materials, way: Way, *, exported_for: str = "onnx") -> Export:
    """The ONNX export of a precision: compared, linted, judged; named in index.json if it may be used.

    Args:
        exported_for: what the file is meant for: "trt" when it is only the way to an engine, and its judgement a simulation.

    Raises:
        ExportError: E001, E002, E003; GateFailed: E901, E902, E903; HardwareError: H003, H004.
    """
    make = judged_int8 if way.quantized else _judged if way.judged else _compared
    made = make(materials, way, exported_for)
    choose(made, default=way.default and exported_for == way.target)
    return made


def linted(materials: Materials, way: Way) -> Export:
    """The file that an engine in a floating-point precision is built from; nothing has judged it yet.

    Raises:
        ExportError: E001, E002; GateFailed: E901; HardwareError: H003, H004.
    """
    source = _half(materials, way) if way.reduced else materials.graph(way.precision)
    demand_clean(lint(source.path, way.precision), source.path)
    return source


def _compared(materials: Materials, way: Way, exported_for: str) -> Export:
    return linted(materials, way)


def _judged(materials: Materials, way: Way, exported_for: str) -> Export:
    made = linted(materials, way)
    engine = materials.open_onnx(made.path, way)
    gate = materials.new_gate(way)
    simulated = engine.runtime != exported_for
    judgement = gate.verdict(f"{exported_for}-{way.precision}", engine, simulated=simulated)
    digest = str(made.meta["sha256"])
    made.write_gate(materials.report(judgement, gate, engine, exported_for=exported_for, digest=digest))
    engine.close()
    materials.demand(judgement, way, exported_for)
    return made


def _half(materials: Materials, way: Way) -> Export:
    """The half model between float edges; where its ranges burst FP16, AutoCast decides what stays in float32."""
    plain = materials.graph
    burst = beyond_half(plain("fp32").path, materials.calibration[:_RANGE_IMAGES]) if way.rescued else ""
    if not burst:
        try:
            return plain(way.precision)
        except GateFailed as failed:
            if not way.rescued or not len(materials.calibration):
                raise
            burst = failed.message
    materials.say(f"{burst}; layers that need float32 keep it (AutoCast)")
    base, bundle = plain("fp32"), materials.bundle
    key = export_key(bundle, base=base.meta["sha256"], autocast=env.versions(("nvidia-modelopt",)))
    if (made := find_key(materials.exports, bundle, "onnx", way.precision, key)) is not None:
        return made
    with new_export(materials.exports, "onnx", way.precision, key) as temporary:
        path = temporary / MODEL
        facts = autocast(base.path, path, way.precision, materials.calibration[:_AUTOCAST_IMAGES])
        found = verify_graph(
            path, bundle, materials.comparison, way.precision, materials.settings.max_score_diff
        )
        meta = {**graph_facts(path, bundle, materials.settings.batch), **found, "autocast": facts}
        return finish(temporary, bundle, "onnx", way.precision, MODEL, meta)
