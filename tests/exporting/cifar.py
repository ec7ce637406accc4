"""Rows of CIFAR-10 as image files, in the original split: batches 1 and 2 to train, 3 to judge, the test batch to test."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

PLAN = {"data_batch_1": "train", "data_batch_2": "train", "data_batch_3": "val", "test_batch": "test"}


def write_rows(cifar: Path, folder: Path, *, classes: Sequence[str], train: int, val: int, test: int) -> Path:
    """PNG files and a table with columns path, label, split.

    Args:
        cifar: the folder with the batches as lossless WebP sheets of 100 x 100 tiles, and labels.csv.
        classes: which classes.
        train, val, test: images of each class (fewer where a batch holds fewer).

    Returns:
        the table.
    """
    with open(cifar / "labels.csv", encoding="utf-8", newline="") as file:
        names = {(line["batch"], int(line["index"])): line["class"] for line in csv.DictReader(file)}
    folder.mkdir(parents=True)
    wanted = {
        (split, name): count for split, count in (("train", train), ("val", val), ("test", test)) for name in classes
    }
    lines = ["path,label,split"]
    for batch, split in PLAN.items():
        sheet = np.asarray(Image.open(cifar / f"{batch}.webp").convert("RGB"))
        tiles = sheet.reshape(100, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
        for place, tile in enumerate(tiles):
            label = names[batch, place]
            if wanted.get((split, label), 0) > 0:
                wanted[split, label] -= 1
                name = f"{batch}_{place}.png"
                Image.fromarray(tile).save(folder / name, compress_level=1)
                lines.append(f"{name},{label},{split}")
    table = folder / "rows.csv"
    table.write_text("\n".join(lines) + "\n", "utf-8")
    return table
