"""Writes python/imgcls_fast/models/parameters.txt: parameters of every classifier with 1,000 classes, counted without weights.

Takes some minutes of CPU time. Run it after a change of the pinned torchvision or timm.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import timm
import torchvision

from imgcls_fast.models.catalogue import count_parameters
from imgcls_fast.models.names import list_models

PLACE = Path(__file__).parents[1] / "python" / "imgcls_fast" / "models" / "parameters.txt"


def main() -> None:
    """Count and write."""
    lines = [f"# torchvision {torchvision.__version__.split('+')[0]}, timm {timm.__version__}; made by scripts/count_parameters.py"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines += [f"{arch} {count_parameters(arch)}" for arch in list_models()]
    PLACE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
