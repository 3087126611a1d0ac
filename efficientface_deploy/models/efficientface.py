"""EfficientFace (Zhao, Liu, Zhou, AAAI 2021): a ShuffleNetV2-like expression network.

Written from the paper's description; parameter names follow the published checkpoints so that
these load as they are. Shapes in comments are for one 224x224 image.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

STAGE_UNITS = (4, 8, 4)
STAGE_CHANNELS = (116, 232, 464)
STEM_CHANNELS = 29
FEATURES = 1024
GATE_CHANNELS = 7
GATE_DILATION = 4


class EfficientFace(nn.Module):
    """The student network, 1.28 M parameters.

    Args:
        num_classes: Width of the logits.
    """

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        width2, width3, width4 = STAGE_CHANNELS
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(STEM_CHANNELS),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stage2 = _stage(STEM_CHANNELS, width2, STAGE_UNITS[0])
        self.local = LocalFeatureExtractor(STEM_CHANNELS, width2)
        self.modulator = Modulator(width2)
        self.stage3 = _stage(width2, width3, STAGE_UNITS[1])
        self.stage4 = _stage(width3, width4, STAGE_UNITS[2])
        self.conv5 = nn.Sequential(
            nn.Conv2d(width4, FEATURES, 1, bias=False),
            nn.BatchNorm2d(FEATURES),
            nn.ReLU(inplace=True),
        )
        self.fc = nn.Linear(FEATURES, num_classes)

    @property
    def feature_size(self) -> int:
        """Length of what :meth:`features` gives for a picture."""
        return FEATURES

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits.

        Args:
            image: float (N, 3, S, S), normalised RGB; S is a multiple of 16.

        Returns:
            float (N, num_classes) logits.
        """
        logits: Tensor = self.fc(self.features(image))  # (N, num_classes)
        return logits

    def features(self, image: Tensor) -> Tensor:
        """What the last layer is given, float (N, 1024), for images as :meth:`forward` takes."""
        x = self.conv1(image)  # (N, 29, 112, 112)
        x = self.maxpool(x)  # (N, 29, 56, 56)
        x = self.modulator(self.stage2(x)) + self.local(x)  # (N, 116, 28, 28)
        x = self.stage3(x)  # (N, 232, 14, 14)
        x = self.stage4(x)  # (N, 464, 7, 7)
        x = self.conv5(x)  # (N, 1024, 7, 7)
        features: Tensor = x.mean(dim=(2, 3))  # (N, 1024)
        return features


class ShuffleUnit(nn.Module):
    """A ShuffleNetV2 unit (Ma et al. 2018, figure 3c and 3d).

    With stride 1 one half of the channels passes by; with stride 2 both branches see all of them.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1 = nn.Sequential(
                *_depthwise(in_channels, stride),
                *_pointwise(in_channels, half),
            )
        self.branch2 = nn.Sequential(
            *_pointwise(in_channels if stride == 2 else half, half),
            *_depthwise(half, stride),
            *_pointwise(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        if self.stride == 2:
            halves = (self.branch1(x), self.branch2(x))
        else:
            kept, changed = x.chunk(2, dim=1)
            halves = (kept, self.branch2(changed))
        return channel_shuffle(torch.cat(halves, dim=1))


def channel_shuffle(x: Tensor) -> Tensor:
    """Interleave the two halves of the channels: a0 a1 .. b0 b1 .. to a0 b0 a1 b1 .."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, 2, channels // 2, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


class LocalFeatureExtractor(nn.Module):
    """Depthwise convolutions of its own for each quadrant of the feature map (section 3.2).

    The published code cuts at pixel 28, which is half of the map at 224x224; cutting at half the
    height and width is the same function there and extends to other sizes.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        for quadrant in range(1, 5):
            first = nn.Conv2d(
                in_channels, out_channels, 3, stride=2, padding=1, groups=in_channels, bias=False
            )
            second = nn.Conv2d(
                out_channels, out_channels, 3, padding=1, groups=out_channels, bias=False
            )
            self.add_module(f"conv{quadrant}_1", first)
            self.add_module(f"bn{quadrant}_1", nn.BatchNorm2d(out_channels))
            self.add_module(f"conv{quadrant}_2", second)
            self.add_module(f"bn{quadrant}_2", nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 29, H, W) to (N, 116, H / 2, W / 2)."""
        half_height, half_width = x.shape[2] // 2, x.shape[3] // 2
        top, bottom = x[:, :, :half_height], x[:, :, half_height:]
        top_left = self._patch(top[:, :, :, :half_width], 1)  # (N, 116, H / 4, W / 4)
        bottom_left = self._patch(bottom[:, :, :, :half_width], 2)
        top_right = self._patch(top[:, :, :, half_width:], 3)
        bottom_right = self._patch(bottom[:, :, :, half_width:], 4)
        left = torch.cat((top_left, bottom_left), dim=2)  # (N, 116, H / 2, W / 4)
        right = torch.cat((top_right, bottom_right), dim=2)
        return torch.cat((left, right), dim=3)  # (N, 116, H / 2, W / 2)

    def _patch(self, x: Tensor, quadrant: int) -> Tensor:
        for step in (1, 2):
            conv = self.get_submodule(f"conv{quadrant}_{step}")
            norm = self.get_submodule(f"bn{quadrant}_{step}")
            x = functional.relu(norm(conv(x)))
        return x


class Modulator(nn.Module):
    """Channel-spatial modulator: scales features by sigmoid(channel gate * spatial gate)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel_att = ChannelGate(channels)
        self.spatial_att = SpatialGate(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        gate = torch.sigmoid(self.channel_att(x) * self.spatial_att(x))  # (N, C, H, W)
        return x * gate


class ChannelGate(nn.Module):
    """What is there: global average, then a bottleneck of two linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate_c = nn.Sequential(
            OrderedDict(
                gate_c_fc_0=nn.Linear(channels, GATE_CHANNELS),
                gate_c_bn_1=nn.BatchNorm1d(GATE_CHANNELS),
                gate_c_relu_1=nn.ReLU(),
                gate_c_fc_final=nn.Linear(GATE_CHANNELS, channels),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, 1, 1)."""
        gate: Tensor = self.gate_c(x.mean(dim=(2, 3)))  # (N, C)
        return gate[:, :, None, None]


class SpatialGate(nn.Module):
    """Where it is: a bottleneck of 1x1 and two dilated 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width, dilation = GATE_CHANNELS, GATE_DILATION
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["gate_s_conv_reduce0"] = nn.Conv2d(channels, width, 1)
        layers["gate_s_bn_reduce0"] = nn.BatchNorm2d(width)
        layers["gate_s_relu_reduce0"] = nn.ReLU()
        for index in range(2):
            layers[f"gate_s_conv_di_{index}"] = nn.Conv2d(
                width, width, 3, padding=dilation, dilation=dilation
            )
            layers[f"gate_s_bn_di_{index}"] = nn.BatchNorm2d(width)
            layers[f"gate_s_relu_di_{index}"] = nn.ReLU()
        layers["gate_s_conv_final"] = nn.Conv2d(width, 1, 1)
        self.gate_s = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, 1, H, W)."""
        gate: Tensor = self.gate_s(x)
        return gate


def _stage(in_channels: int, out_channels: int, units: int) -> nn.Sequential:
    first = ShuffleUnit(in_channels, out_channels, stride=2)
    rest = (ShuffleUnit(out_channels, out_channels, stride=1) for _ in range(units - 1))
    return nn.Sequential(first, *rest)


def _pointwise(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    ]
