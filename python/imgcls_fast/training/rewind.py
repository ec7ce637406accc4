"""Undo of a batch that was begun: memory ran out, and it is done again in smaller parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rewind:
    """Buffers of a network (statistics of batch norms) and random states, as they were at `keep`.

    A second copy of the buffers, written by one fused call per step.

    Args:
        model: on its device; its buffers keep their identity.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = list(model.buffers())
        self._kept = [torch.empty_like(buffer) for buffer in self._live]
        self._cuda = next((buffer.device for buffer in self._live if buffer.device.type == "cuda"), None)
        self._random: tuple[Tensor, Tensor | None] | None = None

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the present."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)
        self._random = (
            torch.get_rng_state(),
            torch.cuda.get_rng_state(self._cuda) if self._cuda is not None else None,
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the last `keep`."""
        assert self._random is not None, "nothing was kept"
        if self._live:
            torch._foreach_copy_(self._live, self._kept)
        host, device = self._random
        torch.set_rng_state(host)
        if device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(device, self._cuda)
