"""What makes a resumed run the same run: what shapes its weights, and where and by what it is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core import env
from ..core.config import RunConfig, bits_settings, free_settings
from ..core.errors import ModelError
from ..core.manifest import Manifest
from ..core.settings import flatten
from ..core.text import command
from ..loading.augment import LAYOUT as AUGMENT_LAYOUT
from ..loading.draws import DRAW_LAYOUT
from ..loading.sampler import LAYOUT as SAMPLER_LAYOUT
from .checkpoint import STATE

if TYPE_CHECKING:
    from ..core.run import Run
    from .plan import Plan

_DRAWS = "layout of the draws"


def trajectory(plan: Plan, manifest: Manifest) -> dict[str, Any]:
    """Everything that shapes the weights, by name: settings, the plan, the data, and how random numbers are laid out."""
    settings = {
        name: value
        for name, value in flatten(plan.config).items()
        if name not in free_settings() | bits_settings() and name != "out"
    }
    facts = plan.to_dict()
    planned = {f"{part}.{key}": value for part in ("spec", "pixels", "augment") for key, value in facts[part].items()}
    layouts = {
        "layout of the sampler": SAMPLER_LAYOUT,
        _DRAWS: DRAW_LAYOUT,
        "layout of the augmentation": AUGMENT_LAYOUT,
    }
    everything = {**settings, **{f"plan {name}": value for name, value in planned.items()}, **layouts}
    plain: dict[str, Any] = json.loads(json.dumps(everything | {"data": manifest.fingerprint}, default=str))
    return plain


def environment_key(threads: int, kernels: str, device: str = "cpu") -> dict[str, Any]:
    """What must be equal, beside the trajectory, for a resumed run to be bitwise equal."""
    key: dict[str, Any] = {
        "cpu": env.cpu_name(),
        "threads": threads,
        "kernels": kernels,
        "versions": {"imgcls-fast": env.package_version(), **env.versions(env.NUMERIC_LIBRARIES)},
    }
    if device.startswith("cuda") and torch.cuda.is_available():
        cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        key |= {
            "GPU": torch.cuda.get_device_name(torch.device(device)),
            "driver": env.gpu_driver(),
            "CUDA": torch.version.cuda,
            "cuDNN": cudnn,
        }
    return key


def environment_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What two environment keys disagree on, one text each; only what both hold or `now` adds to a key that has it."""
    flat = [{**{k: v for k, v in key.items() if k != "versions"}, **key.get("versions", {})} for key in (before, now)]
    recorded = flat[0]  # by an earlier version, perhaps, that recorded less
    return [
        f"{name} was {recorded.get(name)}, is {flat[1].get(name)}"
        for name in dict.fromkeys([*flat[1], *recorded])
        if name in recorded and recorded.get(name) != flat[1].get(name)
    ]


LOST = "the result will not be bitwise equal to an uninterrupted run"


def what_differs(environment: dict[str, Any], identity: dict[str, Any], run: Run, path: Path) -> list[str]:
    """What keeps a resumed run from being bitwise equal, one text each; what would make it another run is an error.

    Args:
        environment: what the checkpoint recorded beside its tensors.
        identity: the same of this process: `environment_key` with the trajectory.
        path: the checkpoint.

    Raises:
        ModelError: M006, naming each difference of the trajectory.
    """
    before, now = dict(environment), dict(identity)
    shape = before.pop("trajectory", None)
    if shape is None:
        return [f"{path.name} is of an earlier version, which did not record what shapes the weights"]
    unknown = require_same_trajectory(shape, now.pop("trajectory"), run, path / STATE)
    return unknown + environment_differences(before, now)


def require_same_trajectory(before: dict[str, Any], now: dict[str, Any], run: Run, where: Path) -> list[str]:
    """Raise unless `now` would go on as `before` had begun; returns what cannot be known, one text each.

    An earlier version recorded fewer names: a setting that it did not have counts as left at its default.

    Args:
        before, now: of `trajectory`.
        where: the file that recorded `before`.

    Raises:
        ModelError: M006, naming each difference.
    """
    every = flatten(RunConfig.model_validate({})).items()
    # what is still "auto" now was no setting when the run was planned
    defaults = {name: value for name, value in every if value != "auto" or now.get(name) == "auto"}
    defaults[_DRAWS] = 1  # recorded since the columns have names; their layout was the first one until then
    unknown = [name for name in now if name not in before and name not in defaults]
    before = {name: defaults[name] for name in now if name in defaults} | before
    differing = [name for name in {**before, **now} if name not in unknown and before.get(name) != now.get(name)]
    if not differing:
        return [f"{name} was not recorded, is {now[name]}" for name in unknown]
    texts = [f"{name} was {before.get(name)} and is now {now.get(name)}" for name in differing]
    raise ModelError(
        "M006",
        f"{run.name} would not be the same run: {texts[0]}" + (f" (also: {'; '.join(texts[1:])})" if texts[1:] else ""),
        where=f"recorded in {where}",
        why=f"what shapes the weights has changed since: {run.config_path.name}, model.json, or this program",
        try_=f"put it back, or begin a new run: {command('train', 'DATA', '--init', run.directory)}",
    )
