"""Holds a resumed run to what it was begun with: settings, files, what shapes its weights, and what computes them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core import env
from ..core.config import RunConfig, bits_settings, free_settings
from ..core.errors import DataError, ModelError
from ..core.manifest import Manifest
from ..core.run import PLAN, Run
from ..core.settings import flatten, replace_settings
from ..core.text import command, some
from ..data import reach
from ..data.prepare import changed_files
from ..loading.augment import LAYOUT as AUGMENT_LAYOUT
from ..loading.draws import DRAW_LAYOUT
from ..loading.sampler import LAYOUT as SAMPLER_LAYOUT
from .checkpoint import STATE
from .quarantined import Quarantined

if TYPE_CHECKING:
    from .plan import Plan

_DRAWS = "layout of the draws"


def changed_config(run: Run, changes: dict[str, Any]) -> RunConfig:
    """Return the run's configuration with the changes that resume allows.

    Raises:
        ModelError: M006 for a setting that would make it another run.
    """
    stored = run.config
    found = differing(stored, replace_settings(stored, changes))
    refused = [name for name in found if name not in free_settings() | bits_settings()]
    if refused:
        name = refused[0]
        raise ModelError(
            "M006",
            f"{name} is {found[name][0]} in {run.name} and cannot become {found[name][1]}: it would not be the same run"
            + (f" (also: {', '.join(refused[1:])})" if refused[1:] else ""),
            try_=f"{command('train', 'DATA', '--init', run.directory)}   (a new run that begins with these weights)",
        )
    # a run stays where it is
    return replace_settings(stored, {name: now for name, (_, now) in found.items() if name != "out"})


def differing(before: RunConfig, after: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ: name -> (before, after)."""
    old, new = flatten(before), flatten(after)
    return {name: (old[name], new[name]) for name in new if new[name] != old[name]}


def require_same_files(run: Run, manifest: Manifest) -> None:
    """Refuse other files than those that the run began with; quarantined ones are left out, whatever has become of them.

    Raises:
        DataError: D015 when files are missing and the others are as they were, D010 when there are changed ones.
    """
    late = Quarantined(run, manifest, run.config.data.max_bad).rows()
    found = changed_files(manifest, env.usable_cpus(), without=late)
    if found.missing and not found.changed:  # a disk that is not there, much rather than as many deleted files
        missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        first, others = manifest.root / found.missing[0], len(found.missing) - 1
        error = reach.unreachable(first, missing, sum(reach.WAITS_S), others=others)
        error.try_ = (
            f"bring the files back, then {run.resume_command}"
            f"   (gone for good: {command('train', manifest.source, '--init', run.directory)})"
        )
        raise error
    if found.changed:
        raise DataError(
            "D010",
            f"{len(found.all)} of {len(manifest)} images changed or vanished since {run.name} began",
            where=some(found.all),
            try_=f"restore the files, or begin a new run: {command('train', manifest.source, '--init', run.directory)}",
        )


LABELS = "labels"  # in a trajectory; one-label data have no such entry


def trajectory(plan: Plan, manifest: Manifest) -> dict[str, Any]:
    """Return everything that shapes the weights, by name: settings, the plan, the data, and how random numbers are laid out."""
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
    data = {"data": manifest.fingerprint}
    if not manifest.labels.is_single:
        data[LABELS] = "; ".join(f"{task.name} ({task.kind}): {', '.join(task.classes)}" for task in manifest.labels.tasks)
    plain: dict[str, Any] = json.loads(json.dumps(everything | data, default=str))
    return plain


def environment_key(threads: int, kernels: str, device: str = "cpu") -> dict[str, Any]:
    """Return what must be equal, beside the trajectory, for a resumed run to be bitwise equal."""
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
    """Name what two environment keys disagree on, one text each; only what both hold or `now` adds to a key that has it."""
    flat = [{**{k: v for k, v in key.items() if k != "versions"}, **key.get("versions", {})} for key in (before, now)]
    recorded = flat[0]  # by an earlier version, perhaps, that recorded less
    return [
        f"{name} was {recorded.get(name)}, is {flat[1].get(name)}"
        for name in dict.fromkeys([*flat[1], *recorded])
        if name in recorded and recorded.get(name) != flat[1].get(name)
    ]


LOST = "the result will not be bitwise equal to an uninterrupted run"


def what_differs(environment: dict[str, Any], identity: dict[str, Any], run: Run, path: Path) -> list[str]:
    """Name what keeps a resumed run from being bitwise equal, one text each; what would make it another run is an error.

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
    if LABELS in before or LABELS in now:
        before, now = ({LABELS: "one class per image"} | shape for shape in (before, now))
    every = flatten(RunConfig.model_validate({})).items()
    # what is still "auto" now was no setting when the run was planned
    defaults = {name: value for name, value in every if value != "auto" or now.get(name) == "auto"}
    defaults[_DRAWS] = 1  # recorded since the columns have names; their layout was the first one until then
    unknown = [name for name in now if name not in before and name not in defaults]
    before = {name: defaults[name] for name in now if name in defaults} | before
    changed = [name for name in {**before, **now} if name not in unknown and before.get(name) != now.get(name)]
    if not changed:
        return [f"{name} was not recorded, is {now[name]}" for name in unknown]
    texts = [f"{name} was {before.get(name)} and is now {now.get(name)}" for name in changed]
    raise ModelError(
        "M006",
        f"{run.name} would not be the same run: {texts[0]}" + (f" (also: {'; '.join(texts[1:])})" if texts[1:] else ""),
        where=f"recorded in {where}",
        why=f"what shapes the weights has changed since: {run.config_path.name}, {PLAN}, or this program",
        try_=f"put it back, or begin a new run: {command('train', 'DATA', '--init', run.directory)}",
    )
