"""Turns every "auto" into a number, once, before work starts; each with the reason that the console shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.config import RunConfig
from ..core.labels import LabelSpace
from ..core.manifest import Manifest
from ..core.pixels import Pixels
from ..core.settings import replace_settings
from ..loading.augment import Augment
from .crowding import choose_threads
from .defaults import RECIPES, Machine, Notes, look_at_machine, text
from .plan_model import (
    Start,
    choose_attention,
    choose_memory_format,
    choose_model,
    choose_recipe,
    describe_model,
    images_needed,
    outline_model,
    starting_model,
)
from .plan_numbers import (
    choose_augment,
    choose_class_weights,
    choose_device,
    choose_lengths,
    choose_optimizer,
    choose_pixels,
    choose_speed,
    look_at_waits,
    note_labels,
)

__all__ = ["Machine", "Plan", "Start", "counted", "look_at_machine", "make_plan", "starting_model"]


@dataclass(frozen=True)
class Plan:
    """Holds a run without "auto".

    Args:
        config: the resolved configuration.
        rows: (setting, value, reason) of every decision.
        pixels, augment: resolved nouns.
        spec: the architecture, as `ModelSpec.to_dict()`.
        start: where its weights come from.
        parameters: number of parameters of the network; None before it has been counted.
        trajectory: everything that shaped the weights when the run began (`identity.trajectory`); None where that was not recorded.
    """

    config: RunConfig
    rows: tuple[tuple[str, str, str], ...]
    pixels: Pixels
    augment: Augment
    spec: dict[str, Any]
    start: Start
    parameters: int | None = None
    trajectory: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plan.json: JSON values of everything but the configuration, which the run keeps in a file of its own."""
        start = self.start
        return {
            "spec": self.spec,
            "pixels": self.pixels.to_dict(),
            "augment": dict(vars(self.augment)),
            "plan": [list(row) for row in self.rows],
            "start": str(start),
            "start_kind": start.kind,
            "start_path": str(start.path.resolve()) if start.path else None,
            "start_download": start.download,
            "parameters": self.parameters,
            **({} if self.trajectory is None else {"trajectory": self.trajectory}),
        }

    def with_changes(self, changes: Mapping[str, tuple[Any, Any]]) -> Plan:
        """Return the plan with rows of what a resumed run was given: name -> (before, now)."""
        rows = {row[0]: row for row in self.rows}
        for name, (before, now) in changes.items():
            rows[name] = (name, text(now), f"given when the run was resumed; was {text(before)}")
        return replace(self, rows=tuple(rows.values()))

    @classmethod
    def from_dict(cls, values: dict[str, Any], config: RunConfig) -> Plan:
        """Read what `to_dict` made, also in a model.json of an earlier version.

        Args:
            config: the configuration of the run.
        """
        path = values["start_path"]
        return cls(
            config,
            tuple((name, value, reason) for name, value, reason in values["plan"]),
            Pixels.from_dict(values["pixels"]),
            Augment.from_dict(values["augment"]),
            values["spec"],
            Start(values["start_kind"], Path(path) if path else None, values["start_download"], recorded=values["start"]),
            values.get("parameters"),
            values.get("trajectory"),
        )


def make_plan(
    config: RunConfig, manifest: Manifest, machine: Machine, notice: Callable[[str], None] = lambda text: None
) -> Plan:
    """Resolve a configuration for this data on this machine.

    Args:
        notice: receives what is about to take long, and what of the settings cannot be as it was asked for.

    Raises:
        ConfigError: C003 or C004 for settings that contradict each other or the data.
        HardwareError: H001 when a GPU is asked for and there is none.
        ModelError: M001, M003, M004 for a model or weights that cannot be used.
    """
    notes = Notes(config)
    note_labels(notes, manifest.labels)
    device = choose_device(notes, machine)
    arch, start = choose_model(notes, device, manifest.labels)
    choose_attention(notes, arch, start)
    outline = outline_model(notes, manifest, arch, start)
    recipe = RECIPES[choose_recipe(arch, start, outline)]
    pixels = choose_pixels(notes, manifest, arch, start, recipe)
    augment = choose_augment(notes, recipe, pixels)
    choose_lengths(notes, manifest, recipe, device, images_needed(notes, outline))
    choose_optimizer(notes, recipe)
    look_at_waits(notes)
    choose_class_weights(notes, manifest)
    choose_speed(notes, manifest, machine, device)
    spec = describe_model(notes, manifest, arch, start, pixels, recipe, outline)
    safe = "contiguous" if outline.breaks_channels_last else "channels-last"
    choose_threads(notes, machine, device, spec, safe, notice)
    choose_memory_format(notes, machine, device, spec, outline, notice)
    for line in notes.told:
        notice(line)
    resolved = replace_settings(config, notes.changes)
    return Plan(resolved, tuple(notes.rows), pixels, augment, spec, start)


def counted(plan: Plan, labels: LabelSpace) -> Plan:
    """Return the plan with the number of parameters of the network that training will build.

    Raises:
        ImgclsError: everything that is wrong with the network or the weights that it begins with.
    """
    from ..models.build import ModelSpec, sketch_model
    from ..models.kernels import use_kernels

    if plan.start.kind == "scratch":
        model = sketch_model(ModelSpec.from_dict(plan.spec))
    else:  # published weights are read, and checked
        model = starting_model(plan.spec, plan.start, labels)
    if plan.config.model.freeze != "none":
        model.freeze(plan.config.model.freeze)
    use_kernels(model, plan.config.model.kernels)
    return replace(plan, parameters=sum(p.numel() for p in model.parameters()))
