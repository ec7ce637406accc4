"""Packages that AOTInductor compiled, as Engines; and which machine may run which."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ExportError
from ..core.labels import LabelSpace
from ..core.pixels import Pixels
from .torch_runtime import MAX_BATCH, FunctionEngine, first_line


class AotiEngine(FunctionEngine):
    """A package that AOTInductor compiled for this kind of machine. See `base.Engine`.

    The package is native code, and runs when it is opened: `runtimes.open_export` opens only those that this user has made or
    vouches for.

    Args:
        path: the .pt2 package: uint8 pixels -> scores.
        meta: content of its meta.json: "host" as `aoti_host` gives it, "effective_precision", "batch".

    Raises:
        ExportError: E005 when it was made by another torch, or for another device or processor, or is damaged.
    """

    def __init__(
        self,
        path: Path,
        meta: dict[str, Any],
        labels: LabelSpace,
        pixels: Pixels,
        *,
        device: str | torch.device = "cpu",
        max_batch: int = MAX_BATCH,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        device = torch.device(device)
        foreign = foreign_host(meta.get("host") or {}, aoti_host(device))
        again = "imgcls-fast export --aoti   (on this machine)"
        if foreign:
            raise ExportError("E005", f"{path} cannot run here: {foreign}", where=str(path), try_=again)
        index = (device.index or 0) if device.type == "cuda" else -1
        batch = meta.get("batch")
        try:
            package = torch._inductor.aoti_load_package(str(path), device_index=index)
        except (RuntimeError, OSError) as error:
            raise ExportError("E005", f"{path} cannot be loaded: {first_line(error)}", try_=again) from error
        super().__init__(
            package,
            labels,
            pixels,
            runtime="aoti",
            device=device,
            precision=str(meta["effective_precision"]),
            max_batch=batch or max_batch,
            fixed=batch is not None,
            thresholds=thresholds,
        )
        self._host = dict(meta["host"])

    def facts(self) -> dict[str, Any]:
        """Version of torch, threads, and the machine that the package was compiled for."""
        return super().facts() | {"host": self._host}


def aoti_host(device: str | torch.device) -> dict[str, Any]:
    """What a package of AOTInductor depends on: it is compiled with this torch, for this processor, for this GPU."""
    device = torch.device(device)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "system": sys.platform,
        "machine": platform.machine(),
        "device": device.type,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "instructions": sorted(name for name, value in capabilities.items() if value is True),
    }
    if device.type == "cuda":
        known = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else ("none",)
        facts["compute_capability"] = ".".join(map(str, known))
    return facts


def foreign_host(made: dict[str, Any], here: dict[str, Any]) -> str:
    """Why a package that was made on one host cannot run on another; empty when it can."""
    if not made:
        return "its meta.json does not say what it was made for"
    for name in ("torch", "system", "machine", "device", "compute_capability", "isa"):
        if made.get(name) != here.get(name):
            return f"it was made for {name} {made.get(name)}, and here it is {here.get(name)}"
    missing = sorted(set(made.get("instructions", ())) - set(here["instructions"]))
    return f"it uses processor instructions that are missing here: {', '.join(missing)}" if missing else ""
