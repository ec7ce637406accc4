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

SCHEDULES: dict[str, str] = {  # choices of `optim.sched` -> a `training.schedule.Shape`
    "cosine": "imgcls_fast.training.schedule:COSINE",
    "onecycle": "imgcls_fast.training.schedule:ONECYCLE",
    "step": "imgcls_fast.training.schedule:STEP",
    "plateau": "imgcls_fast.training.schedule:PLATEAU",
    "none": "imgcls_fast.training.schedule:NONE",
}
