"""Refuses before the scan, which may take long, mistakes that the settings and the machine alone show."""

from __future__ import annotations

from pathlib import Path

from ..core import env
from ..core.config import RunConfig
from ..core.labels import LabelSpace
from ..core.outputs import demand_room, demand_vacant
from ..core.pixels import CHANNELS
from ..loading.loader import require_loader
from ..models.build import ModelSpec, outline_of
from ..tracking.trackers import require_trackers
from .defaults import Machine, Notes
from .plan_model import choose_attention, choose_model
from .plan_numbers import choose_device, require_compiler, require_device_for

_ANY_TWO = LabelSpace.single(("one", "another"))  # the classes are not known yet, and matter to nothing that is asked here


def refuse_early(config: RunConfig, machine: Machine) -> None:
    """Look at the settings of a new run before its data.

    Raises:
        UsageError, HardwareError: U002 or H003 for an `out` that is taken or cannot be written.
        HardwareError: H001 for a GPU that is not there, H004 for a missing compiler or library: DALI, those of trackers.
        ConfigError: C004 for a precision, a loader or an attention module that does not go with device or model.
        ModelError: M001, M003, M004 for a model or weights that cannot be used.
    """
    if config.out is None:
        demand_room(env.runs_dir())
    else:
        demand_vacant(Path(config.out))
    notes = Notes(config)  # of its own: nothing that is found here goes into the plan
    device = choose_device(notes, machine)
    require_device_for(config, device)
    if config.train.loader != "auto":
        require_loader(config.train.loader, config.pixels.color, device)
    require_compiler(config, machine)
    require_trackers(config.train.track)
    arch, start = choose_model(notes, device, _ANY_TWO)
    if config.model.attention or config.model.args:
        choose_attention(notes, arch, start)
        channels = CHANNELS.get(config.pixels.color, 3)
        middle = (0.5,) * channels
        outline_of(
            ModelSpec(
                arch,
                num_outputs=_ANY_TWO.size,
                channels=channels,
                mean=middle,
                std=middle,
                arch_args=config.model.args,
                attention=tuple(notes.value("model.attention")),
            )
        )
