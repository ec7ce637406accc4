"""Images that a verb had to leave out because they cannot be decoded: which, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .manifest import Manifest

_NAMED = 3  # files that the sentence names; lists hold all


@dataclass
class Undecoded:
    """Collects files with the reason against each, every file once."""

    files: dict[str, str] = field(default_factory=dict)  # path -> reason

    def __bool__(self) -> bool:
        return bool(self.files)

    def of(self, manifest: Manifest) -> Callable[[int, str, int], None]:
        """What a loader is to call for each bad row of `manifest`."""

        def collect(row: int, reason: str, epoch: int) -> None:
            self.files[manifest.paths[row]] = reason

        return collect

    def sentence(self) -> str:
        """How many were left out, and the first of them; empty where none was."""
        if not self.files:
            return ""
        count = len(self.files)
        named = ", ".join(f"{path} ({reason})" for path, reason in list(self.files.items())[:_NAMED])
        more = f", +{count - _NAMED:,} more" if count > _NAMED else ""
        return f"{count:,} image{'s' * (count > 1)} cannot be decoded and {'were' if count > 1 else 'was'} left out: {named}{more}"

    def to_list(self) -> list[dict[str, str]]:
        """All of them, for JSON."""
        return [{"path": path, "reason": reason} for path, reason in self.files.items()]
