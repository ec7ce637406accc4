"""`Classifier`: uint8 pixels in, logits out, whatever network is inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.errors import ConfigError
from ..core.labels import LabelSpace
from .backbones import (
    INCEPTION_AUX_SIDE,
    ModelSpec,
    head_modules,
    is_auxiliary,
    own_image_size,
)
from .placement import is_attention
from .stages import STAGES, module_stages, stage_of

# Weight of each auxiliary loss. GoogLeNet: Szegedy et al. 2015, section 5. Inception v3: the paper (Szegedy
# et al. 2016) gives no number; 0.4 is the one of the authors' training code (TensorFlow-Slim).
_AUX_WEIGHTS = {"torchvision/googlenet": 0.3, "torchvision/inception_v3": 0.4}


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor, by its name within the backbone.

    Args:
        loaded: copied from the file, adapted ones included.
        fresh: tensors of the model that stay as initialised.
        ignored: tensors of the file that are not used.
        adapted: loaded in another shape than the file's (input channels, position embeddings).
    """

    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    ignored: tuple[str, ...]
    adapted: tuple[str, ...]


class Classifier(nn.Module):
    """A network with its normalisation: (N, H, W, C) uint8 pixels to (N, K) logits.

    Parameters are named ``backbone.<the library's own name>``; the normalisation is derived from the
    spec and is not part of the state.

    Args:
        spec: what was built.
        backbone: the network (`backbones.make_backbone`); its weights are laid out channels-last (`lay_out`).
        head: names within `backbone` of the tensors whose shape depends on the number of outputs.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, spec: ModelSpec, backbone: nn.Module, head: frozenset[str]) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.head_keys = head
        self.aux_weights = self._aux_weights()
        self.report: LoadReport | None = None  # of the weights that it was built with
        self._frozen_norms: tuple[str, ...] = ()
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (spec.mean, spec.std))
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)
        self.lay_out("channels-last")

    def lay_out(self, memory_format: str) -> None:
        """Keep filters and maps as "channels-last" (as it is after building), or "contiguous" (N, C, H, W).

        Results are equal up to rounding. Which is faster depends on the network and the machine; one layer must not
        run backwards in channels-last on a CPU (`outline.breaks_channels_last`).

        Raises:
            ValueError: another format.
        """
        form = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}.get(memory_format)
        if form is None:
            raise ValueError(f"the memory format is channels-last or contiguous, not {memory_format!r}")
        self.memory_format = memory_format
        for parameter in self.backbone.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=form)

    def _aux_weights(self) -> tuple[float, ...]:
        heads = {key.split(".")[0] for key in self.head_keys if is_auxiliary(key)}
        return (_AUX_WEIGHTS.get(self.spec.arch, 0.0),) * len(heads)

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits of a batch.

        Args:
            pixels: (N, H, W, C) uint8, on the model's device.

        Returns:
            (N, K) logits in the model's dtype, or autocast's. In training mode an architecture with
            auxiliary heads returns (logits, auxiliary logits, ...), to be weighted by `aux_weights`.

        Raises:
            ConfigError: C004, an Inception v3 with its auxiliary head is trained on images below 299 pixels.
        """
        logits = self.backbone(self.normalise(pixels))
        if isinstance(logits, tuple):
            return tuple(logits)
        return logits

    def normalise(self, pixels: Tensor) -> Tensor:
        """``(pixels / 255 - mean) / std`` as (N, C, H, W) floats in the format of `lay_out`.

        The bytes become floats before anything else happens to them: TensorRT takes no other first layer on uint8.
        """
        if self.training and self.aux_weights and self.spec.arch == "torchvision/inception_v3":
            self._check_aux_side(min(pixels.shape[1:3]))
        maps = pixels.to(self.scale.dtype).permute(0, 3, 1, 2) * self.scale + self.shift
        return maps if self.memory_format == "channels-last" else maps.contiguous()

    def _check_aux_side(self, side: int) -> None:
        if side < INCEPTION_AUX_SIDE:
            raise ConfigError(
                "C004",
                f"the auxiliary head of {self.spec.arch} needs images of {INCEPTION_AUX_SIDE} pixels, got {side}",
                why="the model was built without an image size",
                try_=f"--img-size {INCEPTION_AUX_SIDE}, or state the size when building: the head is then left out",
            )

    def features(self, pixels: Tensor) -> Tensor:
        """What the last layer sees, for a linear probe or nearest neighbours.

        The head's input is caught on its way in, and averaged over positions where the head is a
        convolution or acts on tokens. Several heads (distilled transformers) give their inputs side by side.
        Not for `torch.compile`, and not for two threads at once: it hooks the head for one call.

        Args:
            pixels: (N, H, W, C) uint8.

        Returns:
            (N, F) floats. Dropout and batch statistics follow the mode: call `eval()` first for a probe.
        """
        caught: dict[str, Tensor] = {}

        def catch(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda module, inputs: caught.update({name: _pooled(module, inputs[0])})

        heads = [(name, self.backbone.get_submodule(name)) for name in head_modules(self.head_keys)]
        hooks = [m.register_forward_pre_hook(catch(name), prepend=True) for name, m in heads]
        try:
            self.backbone(self.normalise(pixels))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([caught[name] for name, _ in heads if name in caught], dim=1)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters whose shape depends on the number of outputs, auxiliary heads included."""
        return (p for name, p in self.backbone.named_parameters() if name in self.head_keys)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """All other parameters."""
        return (p for name, p in self.backbone.named_parameters() if name not in self.head_keys)

    def freeze(self, what: Literal["backbone"] | int) -> int:
        """Freeze a part, and make everything else trainable.

        Batch norms of the frozen part keep their statistics: they stay in eval mode after `train()`.

        Args:
            what: "backbone" (all but the head), or the first n of the four stages (see `stages`);
                0 makes everything trainable, as it is after building.

        Returns:
            The number of frozen parameter tensors.

        Raises:
            ConfigError: C003, neither "backbone" nor 0..4.
        """
        if what != "backbone" and (isinstance(what, bool) or what not in range(STAGES + 1)):
            raise ConfigError("C003", f"freeze must be 'backbone' or a number of stages 0..{STAGES}, got {what!r}")
        stage = dict.fromkeys((n for n, _ in self.backbone.named_parameters() if n not in self.head_keys), 1)
        if what != "backbone" and what:
            stage = self.stages()
        last = STAGES if what == "backbone" else int(what)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(stage.get(name, STAGES + 1) > last)
        self._frozen_norms = tuple(
            name
            for name, module in self.backbone.named_modules()
            if isinstance(module, _BatchNorm) and _all_frozen(module) and last
        )
        self.train(self.training)
        return sum(not p.requires_grad for p in self.backbone.parameters())

    def train(self, mode: bool = True) -> Classifier:
        """As `nn.Module.train`, but batch norms of a frozen part stay in eval mode."""
        super().train(mode)
        for name in self._frozen_norms:
            self.backbone.get_submodule(name).eval()
        return self

    @property
    def images_needed(self) -> int:
        """The fewest images of a forward pass in training: 2 where batch norms take statistics over them, else 1."""
        norms = {name for name, module in self.backbone.named_modules() if isinstance(module, _BatchNorm)}
        return 2 if norms - set(self._frozen_norms) else 1

    def stages(self) -> dict[str, int]:
        """The stage 1..4 of every backbone parameter, from the sizes of the maps that flow through the network.

        The four smallest map sizes are the stages 4, 3, 2, 1; larger maps, and what comes before them, are
        stage 1. Networks with fewer sizes (plain transformers) are cut into quarters in the order of execution.
        Parameters of auxiliary heads, which do not run in eval mode, count as stage 4; those of attention modules belong
        to what runs before them.

        Raises:
            ConfigError: C004, the network does not run without memory; only "backbone" can be frozen then.
        """
        names = [name for name, _ in self.backbone.named_parameters() if name not in self.head_keys]
        own = own_image_size(self.spec.arch)
        sizes = (max(self.spec.image_size or own, own), self.spec.image_size or own)
        training, failure = self.training, ""
        self.eval()
        try:
            for size in dict.fromkeys(sizes):
                try:
                    known = module_stages(self.backbone, self.spec.channels, size, is_attention)
                    return {n: STAGES if is_auxiliary(n) else stage_of(n, known) for n in names}
                except (RuntimeError, ValueError, AssertionError) as error:
                    failure = str(error)
        finally:
            self.train(training)
        raise ConfigError(
            "C004", f"the stages of {self.spec.arch} cannot be told apart: {failure}", try_="--freeze backbone"
        )


def probabilities(logits: Tensor, labels: LabelSpace, temperature: float | Sequence[float]) -> Tensor:
    """(N, K) float32 scores of (N, K) logits: per task softmax (one_of) or sigmoid (any_of) of logits / temperature.

    Args:
        temperature: one for all tasks, or one per task.
    """
    sizes = [len(task.classes) for task in labels.tasks]
    several = [temperature] * len(sizes) if isinstance(temperature, int | float) else temperature
    logits = logits.float()
    columns = logits.split(sizes, 1) if len(sizes) > 1 else (logits,)
    parts = [
        torch.softmax(part / heat, 1) if task.kind == "one_of" else torch.sigmoid(part / heat)
        for task, part, heat in zip(labels.tasks, columns, several, strict=True)
    ]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _all_frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters(recurse=False))


def _pooled(module: nn.Module, inputs: Tensor) -> Tensor:
    """(N, F) from the input of a linear layer (N, ..., F) or of a convolution (N, F, H, W)."""
    if isinstance(module, nn.Conv2d):
        return inputs.mean((2, 3))
    return inputs.flatten(1, -2).mean(1) if inputs.dim() > 2 else inputs
