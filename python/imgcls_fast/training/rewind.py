"""Undoes a batch that was begun: memory ran out, and it is done again in smaller parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rewind:
    """Keeps the buffers of a network (statistics of batch norms) and the random states, and puts them back.

    The copy of the buffers is written at each step by one fused call per dtype: PyTorch copies a list with several dtypes
    tensor by tensor (batch norms count in int64 beside their float32 statistics).

    Args:
        model: on its device; its buffers keep their identity.
    """

    def __init__(self, model: nn.Module) -> None:
        live: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for buffer in model.buffers():
            live.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        self._copies = [(buffers, [torch.empty_like(buffer) for buffer in buffers]) for buffers in live.values()]
        self._cuda = next((device for _, device in live if device.type == "cuda"), None)
        self._random: tuple[Tensor, Tensor | None] | None = None

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the present."""
        for live, kept in self._copies:
            torch._foreach_copy_(kept, live)
        self._random = (
            torch.get_rng_state(),
            torch.cuda.get_rng_state(self._cuda) if self._cuda is not None else None,
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the last `keep`."""
        assert self._random is not None, "nothing was kept"
        for live, kept in self._copies:
            torch._foreach_copy_(live, kept)
        host, device = self._random
        torch.set_rng_state(host)
        if device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(device, self._cuda)
