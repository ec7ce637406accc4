"""`small-cnn`: the compact residual network for training from scratch, on a CPU, with little data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5, left).

    With `halve` the map is averaged over 2x2 squares first, so that no pixel is skipped on either
    path (He, T. et al., "Bag of Tricks", CVPR 2019, ResNet-D, gives the reason for the shortcut).

    The scale of the last norm starts at zero: each block begins as its shortcut
    (Goyal et al. 2017, section 5.1).
    """

    def __init__(self, inputs: int, outputs: int, *, halve: bool) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()
        self.first = nn.Sequential(*_conv_norm(inputs, outputs, 3), nn.ReLU(inplace=True))
        self.second = nn.Sequential(*_conv_norm(outputs, outputs, 3))
        self.shortcut = nn.Sequential(*_conv_norm(inputs, outputs, 1)) if inputs != outputs else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        return self.relu(self.second(self.first(x)) + self.shortcut(x))


class SmallCNN(nn.Module):
    """Stem (3x3 with stride 2, 2x2 maximum), one stage of residual blocks per entry of `depths`, mean, linear.

    Stage k (from 0) has ``width * 2**k`` channels; every stage but the first halves the map, so four
    stages see images at 1/32 of their side. 1.2 million parameters with the defaults and 10 classes. A stem
    that quarters the side costs half the time of one that halves it, and was as accurate on small photos.

    Args:
        num_classes: columns of the output.
        in_chans: channels of the input, 1, 3 or 4.
        width: channels of the first stage.
        depths: residual blocks of each stage.
        drop_rate: probability of dropping a pooled feature before the linear layer.

    Raises:
        ValueError: `width` or an entry of `depths` is below 1, or `depths` is empty.
    """

    def __init__(
        self,
        num_classes: int,
        in_chans: int = 3,
        *,
        width: int = 32,
        depths: Sequence[int] = (1, 1, 1, 1),
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if width < 1 or not depths or min(depths) < 1:
            raise ValueError(f"small-cnn needs width >= 1 and depths >= 1, got width={width}, depths={tuple(depths)}")
        self.stem = nn.Sequential(*_conv_norm(in_chans, width, 3, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        stages, channels = [], width
        for stage, depth in enumerate(depths):
            blocks = []
            for block in range(depth):
                outputs = width * 2**stage
                blocks.append(ResidualBlock(channels, outputs, halve=stage > 0 and block == 0))
                channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(channels, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ResidualBlock):
                nn.init.zeros_(module.second[1].weight)  # type: ignore[arg-type]
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) floats, H and W at least 32, to (N, num_classes) logits."""
        x = self.stages(self.stem(x))
        return self.head(self.drop(x.mean((2, 3))))
