"""Tables of what a setting may name: one entry adds a choice to the schema, `--help`, the documentation and the errors.

Objects are written as "module:object" and imported by whoever uses them, so that reading a table imports nothing. After a new
entry run `python scripts/make_docs.py`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Optimizer(NamedTuple):
    """One choice of `optim.opt`.

    Attributes:
        make: a class with the signature of `torch.optim.Optimizer` and a keyword lr.
        takes: further keywords that it knows, of momentum, nesterov and fused.
        like: the optimizer whose rates and decay in the recipes hold for it: sgd scales with the batch, adamw with its root.
    """

    make: str
    takes: tuple[str, ...] = ()
    like: Literal["sgd", "adamw"] = "adamw"


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer("torch.optim:SGD", ("momentum", "nesterov", "fused"), like="sgd"),
    "adamw": Optimizer("torch.optim:AdamW", ("fused",)),
}



class Loss(NamedTuple):
    """One choice of `loss.name`: what it is for each kind of task, from float32 logits and probabilities (n, C).

    Attributes:
        one_of: a function that returns the loss of each row, (n,).
        any_of: a function that returns the loss of each answer, (n, C).
    """

    one_of: str
    any_of: str


LOSSES: dict[str, Loss] = {
    "cross-entropy": Loss(
        "imgcls_fast.training.objectives:cross_entropy", "imgcls_fast.training.objectives:binary_cross_entropy"
    ),
}


class Policy(NamedTuple):
    """One choice of `augment.policy`: the strengths of `loading.augment.Augment`, under the same names.

    Attributes:
        scale: area of the random crop, as fractions of the image.
        ratio: width / height of the crop.
        flip: probability of a horizontal flip.
        brightness, contrast, saturation: factors are drawn from 1 +- this.
        hue: drawn from +- this, in turns.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


_ASPECTS = (0.75, 1.3333)  # of torchvision's RandomResizedCrop
POLICIES: dict[str, Policy] = {
    "none": Policy(),
    "light": Policy(scale=(0.7, 1.0), ratio=(0.85, 1.18), brightness=0.1, contrast=0.1),
    "medium": Policy((0.25, 1.0), _ASPECTS, flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4),
    "heavy": Policy((0.08, 1.0), _ASPECTS, flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
}

SCHEDULES: dict[str, str] = {  # choices of `optim.sched` -> a `training.schedule.Shape`
    "cosine": "imgcls_fast.training.schedule:COSINE",
    "onecycle": "imgcls_fast.training.schedule:ONECYCLE",
    "step": "imgcls_fast.training.schedule:STEP",
    "plateau": "imgcls_fast.training.schedule:PLATEAU",
    "none": "imgcls_fast.training.schedule:NONE",
}


class Tracker(NamedTuple):
    """One choice of `train.track`.

    Attributes:
        make: a function or class that makes a `tracking.events.Sink` of a run.
        needs: the library that it imports, which is also the name of the extra that installs it; empty for none.
    """

    make: str
    needs: str = ""


TRACKERS: dict[str, Tracker] = {
    "tensorboard": Tracker("imgcls_fast.tracking.trackers:TensorBoard", needs="tensorboard"),
}

FORMATS: dict[str, str] = {  # what a source may be, in the order in which it is tried -> a `data.sources.Format`
    "folder": "imgcls_fast.data.sources:FOLDER",
    "CSV": "imgcls_fast.data.sources:TABLE",
    "JSONL": "imgcls_fast.data.sources:TABLE",
    "zip": "imgcls_fast.data.sources:ARCHIVE",
    "tar": "imgcls_fast.data.sources:ARCHIVE",
}


def formats_in_words() -> str:
    """What a source may be: "folder, CSV or zip"."""
    *names, last = FORMATS
    return f"{', '.join(names)} or {last}"
