"""Writes the engines of `bench` as two tables for people: how fast each is, and what its answers are worth."""

from __future__ import annotations

import math
from typing import Any

from .contenders import REFERENCE


def efficiency_tables(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How fast, and worth what: heads and rows of cells."""
    gated = any(row["gate"] for row in rows)
    speed = ["engine", "precision", "p50 ms", "p90 ms", "p99 ms", "batch", "images/s", "time/torch"]
    first = rows[0]["accuracy"] or {}
    judged = f"{first.get('figure', 'accuracy')} on {first['split']}" if first else "accuracy"
    worth = ["engine", judged, "same as torch", "MB"] + ["gate"] * gated
    return [
        {"heads": speed, "rows": [_speed(row) for row in rows]},
        {"heads": worth, "rows": [[*_worth(row), row["gate"] or "-"][: len(worth)] for row in rows]},
    ]


def _speed(row: dict[str, Any]) -> list[str]:
    took, ratio, best = row["latency"]["end_to_end"], row["ratio"], row["best"]
    against = f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "-"
    return [
        row["name"],
        row["precision"],
        *(_ms(took[name]) for name in ("p50_ms", "p90_ms", "p99_ms")),
        str(best["batch"]),
        f"{best['images_per_s']:,.0f}",
        "1" if row["name"] == REFERENCE else against,
    ]


def _worth(row: dict[str, Any]) -> list[str]:
    worth, agreed = row["accuracy"], row["agreement"]
    interval = f" [{worth['low']:.3f}, {worth['high']:.3f}]" if worth and math.isfinite(worth["low"]) else ""
    return [
        row["name"],
        f"{worth['accuracy']:.3f}{interval}" if worth else "-",
        f"{agreed['same_top1']:,} of {agreed['rows']:,}" if agreed else "-",
        f"{row['bytes'] / 1e6:.3g}" if row["bytes"] else "-",
    ]


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
