"""Settings of verbs that work on a finished run."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from .schema import FREE, Seconds, Section, Text, flag
from .verbs import Group


class ExportConfig(Section):
    """How a model leaves."""

    flag_group: ClassVar[Group] = "target"
    flag_verbs: ClassVar[tuple[str, ...]] = ("export",)

    opset: Annotated[int, Field(ge=18, le=25)] = Field(
        20,
        description="ONNX operator set; from 23 on attention is one operator",
        json_schema_extra=FREE | flag("--opset", metavar="N"),
    )
    verify_images: PositiveInt = Field(200, description="real images compared with torch", json_schema_extra=FREE)
    max_score_diff: PositiveFloat = Field(1e-4, description="largest score difference allowed", json_schema_extra=FREE)
    batch: PositiveInt | None = Field(
        None, description="fixed batch size (none: dynamic)", json_schema_extra=FREE | flag("--batch", metavar="N")
    )
    max_batch: PositiveInt = Field(
        64, description="largest batch of a TensorRT engine", json_schema_extra=FREE | flag("--max-batch", metavar="N")
    )
    best_batch: PositiveInt | None = Field(
        None, description="batch that TensorRT tunes for; none: max_batch", json_schema_extra=FREE
    )
    calibration_images: PositiveInt = Field(
        512,
        description="training images that set the INT8 ranges",
        json_schema_extra=FREE | flag("--calibration-images", metavar="N", group="INT8 and gate"),
    )
    calibration_method: Literal["max", "entropy"] = Field(
        "max", description="method that sets the ranges", json_schema_extra=FREE
    )
    quantizer: Literal["modelopt", "onnxruntime"] | None = Field(
        None, description="library that inserts Q/DQ; none: ModelOpt if installed", json_schema_extra=FREE
    )
    max_drop: Annotated[float, Field(gt=0, le=100)] = Field(
        0.5,
        description="largest loss of accuracy allowed, percentage points",
        json_schema_extra=FREE | flag("--max-drop", metavar="PP", group="INT8 and gate"),
    )
    gate_rows: Literal["val", "test", "val+test"] = Field(
        "val", description="rows of the run on which an engine is judged", json_schema_extra=FREE
    )
    gate_data: Text | None = Field(
        None,
        description="more labelled images on which an engine is judged",
        json_schema_extra=FREE | flag("--gate-data", metavar="DATA", group="INT8 and gate"),
    )
    search_s: Seconds = Field(
        600.0,
        description="time limit of the search for layers that INT8 harms: 90s, 10m (0: no search)",
        json_schema_extra=FREE | flag("--search", metavar="T", group="INT8 and gate"),
    )
    search_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of the gate rows that the search may use", json_schema_extra=FREE
    )
    trt_level: Annotated[int, Field(ge=0, le=5)] = Field(
        3, description="TensorRT's optimisation level", json_schema_extra=FREE
    )
    trt_workspace_gb: PositiveFloat = Field(4.0, description="GPU memory for TensorRT's tactics, GiB", json_schema_extra=FREE)
    trt_hardware: Literal["this", "same-cc", "ampere+"] = Field(
        "this", description="GPUs that the engine runs on", json_schema_extra=FREE
    )
    trt_version_compatible: bool = Field(
        False, description="let later TensorRT versions load the engine too", json_schema_extra=FREE
    )
    trt_refit: bool = Field(False, description="allow the weights to be replaced later", json_schema_extra=FREE)
    streams: PositiveInt = Field(1, description="batches in flight on a GPU", json_schema_extra=FREE)
