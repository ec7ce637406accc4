"""One schema for YAML files, `--set`, flags and the Python API: what may be set, its range, unit and default.

"auto" is replaced by a number in one place (`training/plan.py`) before work starts. A field marked `resume="free"` may
change when a run is resumed; every other field shapes the trajectory of the weights.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, le=1)]
FREE: dict[str, Any] = {"resume": "free"}
BITS: dict[str, Any] = {"resume": "bits"}  # may change, and the result then differs in its last bits

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}
_OUTSIDE_BRACKETS = re.compile(r",(?![^()]*\))")


def parse_seconds(value: Any) -> Any:
    """Turn "90", "90s", "10m" or "2h" into seconds; anything else is left for the schema to refuse."""
    if isinstance(value, str):
        text = value.strip().lower()
        unit = _UNITS_S.get(text[-1:], 0)
        number = text[:-1] if unit else text
        try:
            return float(number) * (unit or 1)
        except ValueError:
            return value
    return value


def _listed(value: Any) -> Any:
    """Accept "0.8,0.1,0.1" for lists and "cat=1,dog=2.5" for tables, as a command line writes them."""
    if isinstance(value, dict):  # in YAML the classes of digits are numbers
        return {str(key) if type(key) is int else key: inner for key, inner in value.items()}
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    if "=" in value:
        return {key.strip(): number for key, _, number in (part.partition("=") for part in parts)}
    return parts if len(parts) > 1 else value


def _several(value: Any) -> Any:
    """Accept "a@x, b(k=1, l=2)@y" for a list: commas between brackets do not separate."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        return value
    parts = [part.strip() for text in value for part in _OUTSIDE_BRACKETS.split(text)]
    return [part for part in parts if part]


def _sums_to_one(fractions: tuple[float, float, float]) -> tuple[float, float, float]:
    if abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"data.split must sum to 1, got {sum(fractions):g}")
    return fractions


def _named(text: str) -> str:
    if not text:
        raise ValueError("must be a name, got ''")
    return text


# an empty name is a mistake in a script; a length in the schema would refuse file names that are not UTF-8
Text = Annotated[str, AfterValidator(_named)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0)]


class Section(BaseModel):
    """A frozen group of settings; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """Which images, and how they are checked and divided."""

    source: Text | None = Field(None, description="folder, CSV, JSONL, zip or tar; none: the embedded digits")
    split: Annotated[tuple[Fraction, Fraction, Fraction], BeforeValidator(_listed), AfterValidator(_sums_to_one)] = (
        Field((0.8, 0.1, 0.1), description="train, val and test fractions, where the data has no splits of its own")
    )
    split_seed: int = Field(1998, ge=0, lt=2**64, description="seed of the split; the training seed does not move it")
    group_by: Text | None = Field(None, description="regular expression on the path; rows of one group never part")
    group_col: str | None = Field(None, description="column of the label file that names the group")
    path_col: str | None = Field(None, description="column with the image path; found by name if not given")
    label_col: str | None = Field(None, description="column with the class; found by name if not given")
    split_col: str | None = Field(None, description="column with train, val or test; found by name if not given")
    bad_images: Literal["quarantine", "error"] = Field("quarantine", description="what to do with undecodable files")
    max_bad: float = Field(
        0.2, ge=0, description="most bad images: a fraction below 1, else a count", json_schema_extra=FREE
    )
    max_megapixels: PositiveFloat = Field(50.0, description="larger images are refused before they are decoded")
    verify: Literal["suspect", "full"] = Field("suspect", description="full: decode every image at the scan")
    duplicates: Literal["drop", "keep", "error"] = Field("drop", description="copies of an image in two splits")
    near_duplicates: bool = Field(False, description="also treat near copies (64-bit dHash) as duplicates")


class PixelsConfig(Section):
    """How a file becomes pixels; stored in the bundle and obeyed everywhere."""

    size: Annotated[int, Field(ge=8, le=2048)] | Auto = Field("auto", description="side of the square input, pixels")
    crop_pct: Annotated[float, Field(gt=0, le=1)] | Auto = Field(
        "auto", description="evaluation crop / resized short side"
    )
    interpolation: Literal["bilinear", "bicubic"] | Auto = Field("auto", description="resize filter, antialiased")
    color: Literal["auto", "gray", "rgb", "rgba"] = Field(
        "auto", description="channels of the input: 1, 3 or 4; auto: those of the starting run, else rgb"
    )
    exif: Literal["apply", "ignore"] = Field("apply", description="turn images as their EXIF orientation says")
    bits: Annotated[int, Field(ge=8, le=16)] | Auto = Field(
        "auto", description="bits that 16-bit gray images use (12: 0..4095 become 0..255); auto: measured, or the starting run's"
    )
    mean: Annotated[tuple[float, ...], BeforeValidator(_listed)] | Literal["auto", "data"] = Field(
        "auto", description="per channel, 0..1; auto: the weights' own, else ImageNet; data: measured"
    )
    std: Annotated[tuple[PositiveFloat, ...], BeforeValidator(_listed)] | Literal["auto", "data"] = Field(
        "auto", description="per channel, 0..1"
    )


class AugmentConfig(Section):
    """Random changes of training images, drawn by the sampler."""

    policy: Literal["auto", "none", "light", "medium", "heavy"] = Field("auto", description="sets what is 'auto' below")
    scale: Annotated[tuple[Fraction, Fraction], BeforeValidator(_listed)] | Auto = Field(
        "auto", description="area of the random crop, as fractions of the image"
    )
    ratio: Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(_listed)] | Auto = Field(
        "auto", description="aspect ratio (width / height) of the random crop"
    )
    flip: Fraction | Auto = Field("auto", description="probability of a horizontal flip")
    brightness: Annotated[float, Field(ge=0, le=1)] | Auto = Field("auto", description="factor drawn from 1 +- this")
    contrast: Annotated[float, Field(ge=0, le=1)] | Auto = Field("auto", description="factor drawn from 1 +- this")
    saturation: Annotated[float, Field(ge=0, le=1)] | Auto = Field("auto", description="factor drawn from 1 +- this")
    hue: Annotated[float, Field(ge=0, le=0.5)] | Auto = Field("auto", description="turn drawn from +- this, in turns")


class ModelConfig(Section):
    """Which network, and where its weights come from."""

    arch: Text = Field("auto", description="a torchvision or timm classifier, or small-cnn")
    init: Text = Field("auto", description="auto | scratch | pretrained (may download) | a weights file, bundle or run")
    args: dict[str, int | float | bool | str | list[int | float | bool | str]] = Field(
        default_factory=dict, description="arguments of the architecture"
    )
    attention: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(
        (), description="attention modules to insert, each NAME@PLACE or NAME(key=value)@PLACE, e.g. cbam@stage4"
    )
    kernels: Literal["auto", "proven", "on", "off"] = Field(
        "auto",
        description="our attention kernels: where a benchmark shows them faster, always (or an error), never",
        json_schema_extra=BITS,
    )
    drop_rate: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="dropout before the head; auto: the recipe's, else the architecture's own"
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="stochastic depth of the deepest block, where the family has it"
    )
    freeze: Literal["none", "backbone"] | Annotated[int, Field(ge=1, le=4)] = Field(
        "none", description="backbone, or the first K of its four stages"
    )


class LossConfig(Section):
    """What is minimised."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="mass spread over all classes"
    )
    class_weights: Annotated[
        Literal["none", "auto", "effective"] | tuple[PositiveFloat, ...] | dict[str, PositiveFloat],
        BeforeValidator(_listed),
    ] = Field("none", description="auto: inverse frequency; effective: effective number; cat=1,dog=2.5; or one per class")


class OptimConfig(Section):
    """How it is minimised."""

    opt: Literal["auto", "sgd", "adamw"] = Field("auto", description="optimizer")
    lr: Annotated[float, Field(gt=0, le=100)] | Auto = Field("auto", description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0, le=100)] | Auto = Field(
        "auto", description="of matrices and filters; not of biases, norms, scales, tokens and position tables"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="SGD momentum (Nesterov)")
    sched: Literal["auto", "cosine", "onecycle", "step", "plateau", "none"] = Field("auto", description="schedule")
    warmup: Annotated[float, Field(ge=0)] | Auto = Field("auto", description="warm-up, epochs; onecycle: of its rise")
    step_epochs: PositiveInt = Field(10, description="step schedule: epochs between drops")
    gamma: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="step and plateau: factor of a drop")
    plateau_patience: PositiveInt = Field(5, description="plateau: epochs without improvement before a drop")
    min_lr: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="floor, as a fraction of lr")
    clip: PositiveFloat | None = Field(None, description="largest norm of the whole gradient")
    ema: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="decay per step of averaged weights; 0: off"
    )


class TrainConfig(Section):
    """How long, how large, on what."""

    epochs: PositiveInt | Auto = Field("auto", description="passes over the training images")
    batch_size: PositiveInt | Auto = Field("auto", description="images per optimizer step")
    micro_batch: PositiveInt | Auto = Field("auto", description="images per forward pass")
    accum: PositiveInt | None = Field(None, description="micro_batch = ceil(batch_size / accum)")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="precision of the forward and backward pass")
    compile: bool | Auto = Field("auto", description="torch.compile")
    memory_format: Literal["auto", "channels-last", "contiguous"] = Field(
        "auto", description="order of the network's filters and maps in memory; auto: the faster one on this machine"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")
    threads: PositiveInt | Auto = Field(
        "auto", description="CPU threads of the training process", json_schema_extra=BITS
    )
    loader: Literal["auto", "torch", "dali-cpu", "dali-gpu"] = Field("auto", description="image loader to use")
    workers: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="loader processes or threads", json_schema_extra=FREE
    )
    seed: int = Field(0, ge=0, lt=2**64, description="seed of initial weights, data order and augmentation")
    deterministic: bool = Field(False, description="refuse operations without a deterministic form")
    monitor: Literal["auto", "val/accuracy", "val/macro_f1", "val/balanced_accuracy", "val/loss"] = Field(
        "auto", description="picks the best checkpoint, and stops early"
    )
    patience: PositiveInt | None = Field(None, description="epochs without improvement before stopping; none: never")
    baseline: bool = Field(True, description="first fit a linear probe on frozen features", json_schema_extra=FREE)
    save_every: Seconds = Field(
        600.0, description="seconds between checkpoints inside an epoch", json_schema_extra=FREE
    )
    log_every: Seconds = Field(1.0, description="seconds between looks at the loss", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _one_way_to_accumulate(self) -> TrainConfig:
        if self.accum is not None and self.micro_batch != "auto":
            raise ValueError("set train.accum or train.micro_batch, not both")
        return self


class EvaluateConfig(Section):
    """How a model is judged."""

    top_k: Annotated[tuple[PositiveInt, ...], BeforeValidator(_listed)] = Field(
        (1, 5), description="also report whether the truth is among the K most probable", json_schema_extra=FREE
    )
    bootstrap: PositiveInt = Field(
        1000, description="resamples behind the interval of macro-F1", json_schema_extra=FREE
    )
    batch_size: PositiveInt | Auto = Field("auto", description="images per forward pass", json_schema_extra=FREE)
    calibrate: bool = Field(True, description="fit a temperature on the validation rows", json_schema_extra=FREE)


class ExportConfig(Section):
    """How a model leaves."""

    opset: Annotated[int, Field(ge=18, le=25)] = Field(
        20, description="ONNX operator set; from 23 on attention is one operator", json_schema_extra=FREE
    )
    verify_images: PositiveInt = Field(200, description="real images compared with torch", json_schema_extra=FREE)
    max_score_diff: PositiveFloat = Field(1e-4, description="largest score difference allowed", json_schema_extra=FREE)
    batch: PositiveInt | None = Field(None, description="fixed batch size; none: dynamic", json_schema_extra=FREE)
    max_batch: PositiveInt = Field(64, description="largest batch of a TensorRT engine", json_schema_extra=FREE)
    best_batch: PositiveInt | None = Field(
        None, description="batch that TensorRT tunes for; none: max_batch", json_schema_extra=FREE
    )
    calibration_images: PositiveInt = Field(
        512, description="training images that set the INT8 ranges", json_schema_extra=FREE
    )
    calibration_method: Literal["max", "entropy"] = Field(
        "max", description="how ranges are taken", json_schema_extra=FREE
    )
    quantizer: Literal["modelopt", "onnxruntime"] | None = Field(
        None, description="who inserts Q/DQ; none: ModelOpt if installed", json_schema_extra=FREE
    )
    max_drop: Annotated[float, Field(gt=0, le=100)] = Field(
        0.5, description="largest loss of accuracy, percentage points", json_schema_extra=FREE
    )
    gate_rows: Literal["val", "test", "val+test"] = Field(
        "val", description="rows of the run that judge an engine", json_schema_extra=FREE
    )
    gate_data: Text | None = Field(
        None, description="more labelled images that judge an engine", json_schema_extra=FREE
    )
    search_s: Seconds = Field(
        600.0, description="time for finding the layers that INT8 harms; 0: no search", json_schema_extra=FREE
    )
    search_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="part of the gate rows that the search may look at", json_schema_extra=FREE
    )
    trt_level: Annotated[int, Field(ge=0, le=5)] = Field(
        3, description="TensorRT's optimisation level", json_schema_extra=FREE
    )
    trt_workspace_gb: PositiveFloat = Field(4.0, description="memory for TensorRT's tactics", json_schema_extra=FREE)
    trt_hardware: Literal["this", "same-cc", "ampere+"] = Field(
        "this", description="GPUs that the engine runs on", json_schema_extra=FREE
    )
    trt_version_compatible: bool = Field(
        False, description="engine for later TensorRT versions too", json_schema_extra=FREE
    )
    trt_refit: bool = Field(False, description="weights can be replaced later", json_schema_extra=FREE)
    streams: PositiveInt = Field(1, description="batches in flight on a GPU", json_schema_extra=FREE)


class RunConfig(Section):
    """Everything that a run was asked to do."""

    data: DataConfig = Field(default_factory=DataConfig)  # type: ignore[arg-type]
    pixels: PixelsConfig = Field(default_factory=PixelsConfig)  # type: ignore[arg-type]
    augment: AugmentConfig = Field(default_factory=AugmentConfig)  # type: ignore[arg-type]
    model: ModelConfig = Field(default_factory=ModelConfig)  # type: ignore[arg-type]
    loss: LossConfig = Field(default_factory=LossConfig)  # type: ignore[arg-type]
    optim: OptimConfig = Field(default_factory=OptimConfig)  # type: ignore[arg-type]
    train: TrainConfig = Field(default_factory=TrainConfig)  # type: ignore[arg-type]
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)  # type: ignore[arg-type]
    export: ExportConfig = Field(default_factory=ExportConfig)  # type: ignore[arg-type]
    out: Text | None = Field(None, description="run directory", json_schema_extra=FREE)


def setting_names() -> list[str]:
    """Every `section.field` of the schema, in order."""
    names = []
    for section, field in RunConfig.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            names += [f"{section}.{name}" for name in inner.model_fields]
        else:
            names.append(section)
    return names


def free_settings() -> set[str]:
    """The settings that may change when a run is resumed."""
    return {name for name in setting_names() if (_field(name).json_schema_extra or {}) == FREE}


def bits_settings() -> set[str]:
    """The settings that may change when a run is resumed, at the price of bitwise equality."""
    return {name for name in setting_names() if (_field(name).json_schema_extra or {}) == BITS}


def _field(name: str) -> Any:
    section, _, key = name.partition(".")
    field = RunConfig.model_fields[section]
    return field.annotation.model_fields[key] if key else field  # type: ignore[union-attr]


def describe(name: str) -> str:
    """The one-line description of a setting."""
    return _field(name).description or ""
