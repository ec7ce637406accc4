"""One schema for YAML files, `--set`, flags and the Python API: what may be set, its range, unit and default.

"auto" is replaced by a number in one place (`training/plan.py`) before work starts. A field marked `resume="free"` may
change when a run is resumed; every other field shapes the trajectory of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from .choices import LOSSES, OPTIMIZERS, POLICIES, SCHEDULES, TRACKERS, formats_in_words
from .config_verbs import ExportConfig
from .figures import MONITORS
from .schema import BITS, FREE, Auto, Fraction, Seconds, Section, Text, extras, flag, flag_row, listed, several
from .verbs import Group

if TYPE_CHECKING:
    LossName: TypeAlias = str
    MonitorName: TypeAlias = str
    OptimizerName: TypeAlias = str
    PolicyName: TypeAlias = str
    ScheduleName: TypeAlias = str
    TrackerName: TypeAlias = str
else:  # from tables, which a type checker cannot read
    LossName = Literal[(*LOSSES,)]
    MonitorName = Literal[("auto", *MONITORS)]
    OptimizerName = Literal[("auto", *OPTIMIZERS)]
    PolicyName = Literal[("auto", *POLICIES)]
    ScheduleName = Literal[("auto", *SCHEDULES)]
    TrackerName = Literal[(*TRACKERS,)]


def _sums_to_one(fractions: tuple[float, float, float]) -> tuple[float, float, float]:
    if abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"data.split must sum to 1, got {sum(fractions):g}")
    return fractions


class DataConfig(Section):
    """Which images, and how they are checked and divided."""

    flag_group: ClassVar[Group] = "data"
    flag_verbs: ClassVar[tuple[str, ...]] = ("train", "data check", "data split", "data stats")

    source: Text | None = Field(None, description=f"{formats_in_words()}; none: the embedded digits")
    split: Annotated[tuple[Fraction, Fraction, Fraction], BeforeValidator(listed), AfterValidator(_sums_to_one)] = (
        Field(
            (0.8, 0.1, 0.1),
            description="train, val and test fractions, for data without splits of its own",
            json_schema_extra=flag("--split-ratio", metavar="A,B,C"),
        )
    )
    split_seed: int = Field(1998, ge=0, lt=2**64, description="seed of the split; the training seed does not change it")
    group_by: Text | None = Field(
        None,
        description="regular expression that finds the group in the path; groups are never divided",
        json_schema_extra=flag("--group-by", metavar="REGEX"),
    )
    group_col: str | None = Field(
        None,
        description="column of the label file that names the group",
        json_schema_extra=flag("--group-col", metavar="NAME"),
    )
    path_col: str | None = Field(
        None,
        description="column with the image path; found by name if not given",
        json_schema_extra=flag("--path-col", metavar="NAME"),
    )
    label_col: str | None = Field(
        None,
        description="column with the class; several (A,B) are one task each; found by name if not given",
        json_schema_extra=flag("--label-col", metavar="NAME"),
    )
    label_cols: Text | None = Field(
        None,
        description="one column per class (A,B,C), with 0 and 1 or probabilities",
        json_schema_extra=flag("--label-cols", metavar="A,B"),
    )
    label_kind: Literal["auto", "one_of", "any_of"] = Field(
        "auto",
        description="classes per image: exactly one (one_of) or any number (any_of); auto: inferred from the labels",
        json_schema_extra=flag("--label-kind", metavar="KIND"),
    )
    split_col: str | None = Field(None, description="column with train, val or test; found by name if not given")
    bad_images: Literal["quarantine", "error"] = Field(
        "quarantine", description="what to do with undecodable files", json_schema_extra=flag("--bad-images")
    )
    max_bad: float = Field(
        0.2,
        ge=0,
        description="most bad images allowed: a fraction below 1, else a count",
        json_schema_extra=FREE | flag("--max-bad", metavar="X"),
    )
    max_megapixels: PositiveFloat = Field(50.0, description="larger images are refused before they are decoded")
    verify: Literal["suspect", "full"] = Field("suspect", description="full: decode every image at the scan")
    duplicates: Literal["drop", "keep", "error"] = Field("drop", description="copies of an image in two splits")
    near_duplicates: bool = Field(
        False,
        description="also treat near copies (64-bit dHash) as duplicates",
        json_schema_extra=flag("--near-duplicates"),
    )


class PixelsConfig(Section):
    """How a file becomes pixels; stored in the bundle and obeyed everywhere."""

    flag_group: ClassVar[Group] = "model"

    size: Annotated[int, Field(ge=8, le=2048)] | Auto = Field(
        "auto", description="side of the square input, pixels", json_schema_extra=flag("--img-size", metavar="N")
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] | Auto = Field(
        "auto", description="evaluation crop / resized short side"
    )
    interpolation: Literal["bilinear", "bicubic"] | Auto = Field("auto", description="resize filter, antialiased")
    color: Literal["auto", "gray", "rgb", "rgba"] = Field(
        "auto",
        description="channels of the input: 1, 3 or 4; auto: those of the starting run, else rgb",
        json_schema_extra=flag("--channels", metavar="1|3|4", values={"1": "gray", "3": "rgb", "4": "rgba"}),
    )
    exif: Literal["apply", "ignore"] = Field("apply", description="turn images by their EXIF orientation")
    bits: Annotated[int, Field(ge=8, le=16)] | Auto = Field(
        "auto",
        description="bits that 16-bit gray images use (12: 0..4095 become 0..255); auto: measured, or the starting run's",
    )
    mean: Annotated[tuple[float, ...], BeforeValidator(listed)] | Literal["auto", "data"] = Field(
        "auto",
        description="mean to subtract, per channel, 0..1 (auto: the weights' own, else ImageNet; data: measured)",
        json_schema_extra=flag("--mean", metavar="M"),
    )
    std: Annotated[tuple[PositiveFloat, ...], BeforeValidator(listed)] | Literal["auto", "data"] = Field(
        "auto",
        description="standard deviation to divide by, per channel, 0..1 (auto and data: as for the mean)",
        json_schema_extra=flag("--std", metavar="S"),
    )


class AugmentConfig(Section):
    """Random changes of training images, drawn by the sampler."""

    policy: PolicyName = Field(
        "auto",
        description="strength of the random changes, for each augment setting left at auto",
        json_schema_extra=flag("--augment"),
    )
    scale: Annotated[tuple[Fraction, Fraction], BeforeValidator(listed)] | Auto = Field(
        "auto", description="area of the random crop, as fractions of the image"
    )
    ratio: Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(listed)] | Auto = Field(
        "auto", description="aspect ratio (width / height) of the random crop"
    )
    flip: Fraction | Auto = Field("auto", description="probability of a horizontal flip")
    brightness: Annotated[float, Field(ge=0, le=1)] | Auto = Field("auto", description="factor drawn from 1 +- this")
    contrast: Annotated[float, Field(ge=0, le=1)] | Auto = Field("auto", description="factor drawn from 1 +- this")
    saturation: Annotated[float, Field(ge=0, le=1)] | Auto = Field("auto", description="factor drawn from 1 +- this")
    hue: Annotated[float, Field(ge=0, le=0.5)] | Auto = Field("auto", description="hue shift drawn from +- this, in turns")


class ModelConfig(Section):
    """Which network, and where its weights come from."""

    flag_group: ClassVar[Group] = "model"

    arch: Text = Field(
        "auto",
        description="a torchvision or timm classifier, or small-cnn",
        json_schema_extra=flag("-m", "--model", metavar="NAME"),
    )
    init: Text = Field(
        "auto",
        description="auto | scratch | pretrained (may download) | a weights file, bundle or run",
        json_schema_extra=flag("--init", metavar="FROM"),
    )
    args: dict[str, int | float | bool | str | list[int | float | bool | str]] = Field(
        default_factory=dict, description="arguments of the architecture"
    )
    attention: Annotated[tuple[str, ...], BeforeValidator(several)] = Field(
        (),
        description="attention module to insert, NAME@PLACE or NAME(key=value)@PLACE, e.g. cbam@stage4",
        json_schema_extra=flag("--attention", metavar="NAME@PLACE"),
    )
    kernels: Literal["auto", "proven", "on", "off"] = Field(
        "auto",
        description="when to use our attention kernels (proven: where measured faster; on: always, or an error)",
        json_schema_extra=BITS | flag("--kernels", metavar="MODE"),
    )
    drop_rate: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="dropout before the head; auto: the recipe's, else the architecture's own"
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="stochastic depth of the deepest block, where the family has it"
    )
    freeze: Literal["none", "backbone"] | Annotated[int, Field(ge=1, le=4)] = Field(
        "none",
        description="none | backbone | K: the network's first K stages of four keep their weights",
        json_schema_extra=flag("--freeze", metavar="PART"),
    )


class LossConfig(Section):
    """What is minimised."""

    name: LossName = Field("cross-entropy", description="loss of each task", json_schema_extra=flag("--loss"))
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="probability mass spread over all classes", json_schema_extra=flag("--label-smoothing", metavar="S")
    )
    class_weights: Annotated[
        Literal["none", "auto", "effective"] | tuple[PositiveFloat, ...] | dict[str, PositiveFloat],
        BeforeValidator(listed),
    ] = Field(
        "none",
        description="none | auto: inverse frequency | effective: effective number | cat=1,dog=2.5 | one per class",
        json_schema_extra=flag("--class-weights", metavar="W", kind="value"),
    )


class OptimConfig(Section):
    """How it is minimised."""

    opt: OptimizerName = Field("auto", description="optimizer", json_schema_extra=flag("--opt"))
    lr: Annotated[float, Field(gt=0, le=100)] | Auto = Field(
        "auto", description="peak learning rate", json_schema_extra=flag("--lr", metavar="LR")
    )
    weight_decay: Annotated[float, Field(ge=0, le=100)] | Auto = Field(
        "auto",
        description="decay of matrices and filters (none for biases, norms, scales, tokens and position tables)",
        json_schema_extra=flag("--weight-decay", metavar="W"),
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="SGD momentum (Nesterov)")
    sched: ScheduleName = Field(
        "auto", description="learning-rate schedule", json_schema_extra=flag("--sched")
    )
    warmup: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto",
        description="epochs of warm-up (onecycle: epochs of rising rate)",
        json_schema_extra=flag("--warmup", metavar="E"),
    )
    step_epochs: PositiveInt = Field(10, description="step schedule: epochs between drops")
    gamma: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="step and plateau: factor per drop")
    plateau_patience: PositiveInt = Field(5, description="plateau: epochs without improvement before a drop")
    min_lr: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="lowest learning rate, as a fraction of lr")
    clip: PositiveFloat | None = Field(
        None, description="largest norm of the whole gradient", json_schema_extra=flag("--clip", metavar="G")
    )
    ema: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="decay per step of the averaged weights (0: off)", json_schema_extra=flag("--ema", metavar="D")
    )


class TrainConfig(Section):
    """How long, how large, on what."""

    epochs: PositiveInt | Auto = Field(
        "auto", description="passes over the training images", json_schema_extra=flag("-e", "--epochs", metavar="N")
    )
    batch_size: PositiveInt | Auto = Field(
        "auto",
        description="images per optimizer step",
        json_schema_extra=flag("-b", "--batch-size", metavar="N", aliases=("--effective-batch",)),
    )
    micro_batch: PositiveInt | Auto = Field("auto", description="images per forward pass")
    accum: PositiveInt | None = Field(
        None,
        description="forward passes per optimizer step (micro_batch = ceil(batch_size / accum))",
        json_schema_extra=flag("--accum", metavar="K"),
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="precision of the forward and backward pass",
        json_schema_extra=flag("--precision", group="machine"),
    )
    compile: bool | Auto = Field(
        "auto", description="torch.compile", json_schema_extra=flag("--compile", group="machine")
    )
    memory_format: Literal["auto", "channels-last", "contiguous"] = Field(
        "auto", description="order of the network's filters and maps in memory; auto: the faster one on this machine"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to train", json_schema_extra=flag("--device", group="machine")
    )
    threads: PositiveInt | Auto = Field(
        "auto", description="CPU threads of the training process", json_schema_extra=BITS
    )
    loader: Literal["auto", "torch", "dali-cpu", "dali-gpu"] = Field(
        "auto", description="image loader to use", json_schema_extra=flag("--loader", group="machine")
    )
    workers: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto",
        description="loader processes or threads",
        json_schema_extra=FREE | flag("--workers", metavar="N", group="machine"),
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**64,
        description="seed of initial weights, data order and augmentation",
        json_schema_extra=flag("--seed", metavar="N", group="machine"),
    )
    deterministic: bool = Field(
        False,
        description="refuse operations without a deterministic form",
        json_schema_extra=flag("--deterministic", group="machine"),
    )
    monitor: MonitorName = Field(
        "auto", description="metric that picks the best checkpoint and decides on early stopping", json_schema_extra=flag("--monitor")
    )
    patience: PositiveInt | None = Field(
        None,
        description="epochs without improvement before stopping (none: never)",
        json_schema_extra=flag("--patience", metavar="K"),
    )
    baseline: bool = Field(True, description="first fit a linear probe on frozen features", json_schema_extra=FREE)
    save_every: Seconds = Field(
        600.0,
        description="time between checkpoints inside an epoch: 90s, 10m, 2h",
        json_schema_extra=FREE | flag("--save-every", metavar="T", group="machine"),
    )
    log_every: Seconds = Field(1.0, description="seconds between readings of the loss", json_schema_extra=FREE)
    track: Annotated[tuple[TrackerName, ...], BeforeValidator(several)] = Field(
        (),
        description="program that receives the figures of each epoch",
        json_schema_extra=FREE | flag("--track", group="output"),
    )

    @model_validator(mode="after")
    def _one_way_to_accumulate(self) -> TrainConfig:
        if self.accum is not None and self.micro_batch != "auto":
            raise ValueError("set train.accum or train.micro_batch, not both")
        return self


class EvaluateConfig(Section):
    """How a model is judged."""

    top_k: Annotated[tuple[PositiveInt, ...], BeforeValidator(listed)] = Field(
        (1, 5), description="also report whether the truth is among the K most probable", json_schema_extra=FREE
    )
    bootstrap: PositiveInt = Field(
        1000, description="bootstrap resamples for the interval of macro-F1", json_schema_extra=FREE
    )
    batch_size: PositiveInt | Auto = Field("auto", description="images per forward pass", json_schema_extra=FREE)
    calibrate: bool = Field(True, description="fit a temperature on the validation rows", json_schema_extra=FREE)


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
    out: Text | None = Field(
        None, description="run directory", json_schema_extra=FREE | flag("-o", "--out", metavar="DIR", group="output")
    )


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
    return {name for name in setting_names() if extras(_field(name)).get("resume") == "free"}


def bits_settings() -> set[str]:
    """The settings that may change when a run is resumed, at the price of bitwise equality."""
    return {name for name in setting_names() if extras(_field(name)).get("resume") == "bits"}


def _field(name: str) -> Any:
    section, _, key = name.partition(".")
    field = RunConfig.model_fields[section]
    return field.annotation.model_fields[key] if key else field  # type: ignore[union-attr]


def describe(name: str) -> str:
    """The one-line description of a setting."""
    return _field(name).description or ""


def flag_rows() -> list[dict[str, Any]]:
    """The flags that fields declare, as keywords of `verbs.Flag`, in the order of the schema."""
    rows = []
    for name in setting_names():
        section = RunConfig.model_fields[name.partition(".")[0]].annotation
        section = section if isinstance(section, type) and issubclass(section, Section) else RunConfig
        rows.append(flag_row(name, _field(name), section))
    return [row for row in rows if row]
