"""What is refused before the scan, which may take long: mistakes that the settings and the machine alone show."""

from __future__ import annotations

from ..core.config import RunConfig
from ..models.build import resolve_arch
from .defaults import Machine
from .plan_numbers import require_compiler


def refuse_early(config: RunConfig, machine: Machine) -> None:
    """Look at the settings of a new run before its data.

    Raises:
        ModelError: M001 for a model that does not exist.
        HardwareError: H004 for `--compile` without a compiler.
    """
    if config.model.arch != "auto":
        resolve_arch(config.model.arch)  # a typing mistake should not cost the scan of a million files
    require_compiler(config, machine)
