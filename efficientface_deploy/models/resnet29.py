"""dlib's face recognition network, as the backbone of an LDG that knows faces from the start."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

_STAGES = ((32, 3), (64, 4), (128, 3), (256, 3), (256, 1))  # channels and blocks of each


class ResNet29(nn.Module):
    """The residual network of 29 convolutions by King (``dlib_face_recognition_resnet_model_v1``).

    A ResNet-34 with some layers left out and half the channels (He et al. 2016, by dlib's
    ``examples/dnn_metric_learning_on_images_ex.cpp``, ``anet_type``). Unlike torchvision's: stem
    and steps pad nothing, a step's shortcut is a mean of 2x2 with new channels of zeros, and
    there is a fourth step. 5.6 million parameters. dlib's affine layers are batch norms here.

    Args:
        num_classes: Width of the logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2)
        before, stages = 32, []
        for number, (channels, blocks) in enumerate(_STAGES):
            layers = [Block(before, channels, steps=number > 0)]
            layers += [Block(channels, channels, steps=False) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*layers))
            before = channels
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits.

        Args:
            image: float (N, 3, S, S), normalised RGB.

        Returns:
            float (N, num_classes) logits.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))  # (N, 32, S / 4, S / 4)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 128, S / 16, S / 16)
        x = self.layer5(self.layer4(x))  # (N, 256, S / 64, S / 64)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class Block(nn.Module):
    """Two convolutions and a shortcut; ``steps`` to half the resolution, without padding."""

    def __init__(self, before: int, channels: int, *, steps: bool) -> None:
        super().__init__()
        stride, padding = (2, 0) if steps else (1, 1)
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.new_channels = channels - before
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        """From float (N, before, H, W) to (N, channels, H, W), or half of H and W."""
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.steps:
            x = functional.avg_pool2d(x, 2)
            x = functional.pad(x, (0, 0, 0, 0, 0, self.new_channels))
            # Of an even side the mean has a row and a column more than the convolution.
            (height, width), (rows, columns) = x.shape[2:], out.shape[2:]
            out = functional.pad(out, (0, width - columns, 0, height - rows))
        added: Tensor = self.relu(out + x)
        return added
