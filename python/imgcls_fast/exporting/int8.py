"""Quantises a model to INT8 and judges it; where plain INT8 loses too much, searches for the layers that have to keep FP16."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import env
from ..core.exports import GATE, Export, export_key, find_key, finish, new_export, way_of
from ..core.files import explained_write, sha256_file, sync_directory, write_sealed
from ..core.targets import Way
from ..evaluation.paired import Judgement
from ..graphs.lint import demand_clean, lint
from ..graphs.onnx_graph import graph_facts
from ..graphs.quantize import calibration_facts, quantize
from ..graphs.sensitivity import layer_sqnr, rescue
from .gate import Gate, figures_of, plain_int8_loses, rows_digest
from .materials import Materials
from .pareto import search_plot

MODEL = "model.onnx"
_PICTURE = "pareto.png"
_RANKING_IMAGES = 64  # calibration images that the ranking of layers looks at


def judged_int8(materials: Materials, way: Way, exported_for: str) -> Export:
    """The INT8 file of a bundle, with the verdict on it; one that passed is not made again.

    Raises:
        ExportError: E001, E002, E003; GateFailed: E901, E902, E903; HardwareError: H003, H004.
    """
    base, bundle = materials.graph("fp32"), materials.bundle
    key = int8_key(materials, base, exported_for)
    made = find_key(materials.exports, bundle, "onnx", way.precision, key)
    if made is not None and (made.gate or {}).get("verdict") == "pass":
        return made
    with new_export(materials.exports, "onnx", way.precision, key) as temporary:
        gate = materials.new_gate(way)
        facts = search_int8(materials, way, base, temporary, gate, exported_for)
        engine = materials.open_onnx(temporary / MODEL, way)
        simulated = engine.runtime != exported_for
        judgement = gate.verdict(f"{exported_for}-{way.precision}", engine, simulated=simulated)
        digest = sha256_file(temporary / MODEL)
        report = materials.report(judgement, gate, engine, exported_for=exported_for, digest=digest)
        write_sealed(temporary / GATE, report)
        engine.close()
        meta = {**graph_facts(temporary / MODEL, bundle, materials.settings.batch), **facts}
        export = finish(temporary, bundle, "onnx", way.precision, MODEL, meta)
    materials.demand(judgement, way, exported_for)
    return export


def int8_key(materials: Materials, base: Export, exported_for: str) -> str:
    """The key of an INT8 file: what it is made from, how, and who judges it."""
    settings, least = materials.settings, materials.bundle.thresholds or ()  # they shape the answers that are judged
    return export_key(
        materials.bundle,
        base=base.meta["sha256"],
        calibration=rows_digest(materials.manifest.digest[materials.calibration_rows]),
        method=settings.calibration_method,
        quantizer=settings.quantizer,
        versions=env.versions(("nvidia-modelopt", "onnx", "onnxruntime")),
        gate=[materials.gate_data.digest(), settings.max_drop, settings.search_fraction, materials.seed, exported_for, *least],
    )


def search_int8(
    materials: Materials, way: Way, base: Export, folder: Path, gate: Gate, exported_for: str
) -> dict[str, Any]:
    """Write folder/model.onnx in INT8: plain if the search rows let it pass, else with the worst layers in FP16.

    Returns:
        quantisation (with calibration), search and latency, for meta.json.
    """
    settings = materials.settings
    calibrated = calibration_facts(materials.manifest, materials.calibration_rows, materials.seed)
    candidates = _Candidates(materials, way, base, folder, gate, exported_for)
    searched: dict[str, Any] | None = None
    with explained_write(folder):
        chosen = candidates.make(())
        looked = candidates.look(chosen)
        if looked.verdict != "pass" and settings.search_s > 0:
            materials.say(plain_int8_loses(looked.judgement))
            ranked = layer_sqnr(base.path, chosen, materials.calibration[:_RANKING_IMAGES])
            found = rescue(
                ranked,
                lambda layers: candidates.make(tuple(layers)),
                candidates.look,
                budget_s=settings.search_s,
            )
            chosen = found.chosen.path if found.chosen else chosen
            searched = {"ended": found.ended, "candidates": len(found.history), "sqnr_db": dict(ranked)}
        facts = candidates.made[chosen]
        if facts["note"]:
            materials.say(facts["note"])
        shutil.copyfile(chosen, folder / MODEL)
        for path in candidates.made:
            path.unlink(missing_ok=True)
        candidates.draw(folder / _PICTURE, facts["excluded"])
        sync_directory(folder)
    left = materials.undecoded["calibration"].to_list()
    return {
        "quantisation": {**facts, "calibration": {**calibrated, **facts["calibration"], "undecodable_files": left}},
        "search": searched,
        "latency": materials.latency(folder / MODEL, way),
    }


@dataclass(frozen=True)
class _Looked:
    """The result of a candidate on the search rows: "pass" for one that is worth the verdict rows."""

    judgement: Judgement
    verdict: str


class _Candidates:
    """The INT8 files that a search makes, looks at and times.

    Args:
        folder: where they are written.
        gate: its search rows are looked at.
    """

    def __init__(
        self, materials: Materials, way: Way, base: Export, folder: Path, gate: Gate, exported_for: str
    ) -> None:
        self.materials, self.way, self.base, self.folder = materials, way, base, folder
        self.gate, self.exported_for = gate, exported_for
        self.made: dict[Path, dict[str, Any]] = {}  # facts for meta.json
        self.timings: dict[str, float] = {}

    def make(self, exclude: tuple[str, ...]) -> Path:
        """Write one file with these layers in FP16."""
        path, settings = self.folder / f"candidate{len(self.made)}.onnx", self.materials.settings
        self.made[path] = quantize(
            self.base.path,
            path,
            self.materials.calibration,
            method=settings.calibration_method,
            quantizer=settings.quantizer or "auto",
            exclude=exclude,
        )
        demand_clean(lint(path, self.way.precision), path)
        return path

    def look(self, path: Path) -> _Looked:
        """Judge one file on the search rows."""
        engine = self.materials.open_onnx(path, self.way)
        excluded = list(self.made[path]["excluded"])
        name = f"int8, {len(excluded)} layers in FP16" if excluded else "int8"
        self.timings[name] = self.materials.median_ms(engine)
        judgement = self.gate.look(name, engine, simulated=self.exported_for != "onnx", excluded=excluded)
        engine.close()
        return _Looked(judgement, "pass" if promising(judgement) else judgement.verdict)

    def draw(self, path: Path, excluded: list[str]) -> None:
        """Draw accuracy on the search rows against latency, of every candidate."""
        if not self.gate.history or not self.gate.history[0]["rows"]:
            return
        exact = way_of("onnx", "fp32")
        reference = self.materials.open_onnx(self.materials.graph("fp32").path, exact)
        took = self.materials.median_ms(reference)
        reference.close()
        search_plot(
            path,
            self.gate.history,
            took,
            self.timings,
            excluded,
            exported_for=self.exported_for,
            batch=self.materials.settings.batch or 1,
        )


def promising(judgement: Judgement) -> bool:
    """Whether a candidate with this result on the search rows is worth the verdict rows.

    It is if the search rows alone would let it pass, or if no figure lost more than half of the budget: with few rows no bound
    can be within the budget, and then the verdict, not a search, has to report it.
    """
    return judgement.passed or all(figure.drop <= judgement.max_drop / 2 for figure in figures_of(judgement))
