"""Distinguishes several labels in one cell ("RBC|WBC") from names of classes that hold such a sign."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SEPARATORS = "|;,"


@dataclass(frozen=True)
class Joined:
    """What was found: the sign, the classes that are several in one, and the labels that they consist of."""

    separator: str
    names: list[str]
    labels: list[str]


def joined_labels(classes: Sequence[str]) -> Joined | None:
    """Several labels in one name; None when the names seem to be names.

    A class is taken for several where each of its parts is a class, or with | and ; occurs in another class; and one of them
    is a class alone, or stands at different places, or there are more in some than in others: "Tomato|healthy", "Tomato|blight",
    "Apple|healthy" and "Apple|blight" are names of four classes.
    """
    for separator in SEPARATORS:
        parts = {name: [p.strip() for p in name.split(separator)] for name in classes if separator in name}
        parts = {name: found for name, found in parts.items() if len(set(found)) == len(found) and all(found)}
        known = {name for name in classes if separator not in name}
        if separator != ",":  # people are called "Smith, Jane" and "Smith, John"
            known |= {part for part, n in Counter(p for found in parts.values() for p in found).items() if n > 1}
        names = [name for name, found in parts.items() if known.issuperset(found)]
        if names and _vary([parts[name] for name in names], known & set(classes)):
            return Joined(separator, names, list(dict.fromkeys(part for name in names for part in parts[name])))
    return None


def _vary(found: list[list[str]], alone: set[str]) -> bool:
    """Whether parts are labels that come as they like, and not the levels of one name."""
    places = {(part, place) for parts in found for place, part in enumerate(parts)}
    labels = {part for part, _ in places}
    return bool(labels & alone) or len(places) > len(labels) or len(set(map(len, found))) > 1
