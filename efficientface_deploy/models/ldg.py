"""The label distribution generator: a ResNet whose softmax teaches the student."""

from __future__ import annotations

import torchvision
from torch import Tensor, nn

from efficientface_deploy.errors import ConfigError
from efficientface_deploy.models.resnet29 import ResNet29

BACKBONES = ("resnet18", "resnet29", "resnet50")


class LabelDistributionGenerator(nn.Module):
    """A ResNet with a head for expressions (section 3.3 of the paper).

    State-dict keys of ResNet-18 and -50 are torchvision's own, as in the published LDG checkpoints.

    Args:
        num_classes: Width of the logits.
        architecture: ``resnet18``, ``resnet50`` (the published choice), or ``resnet29``, for which
            there are weights in the public domain that know faces.

    Raises:
        ConfigError: Another architecture.
    """

    def __init__(self, num_classes: int = 7, architecture: str = "resnet50") -> None:
        super().__init__()
        if architecture not in BACKBONES:
            known = "one of " + ", ".join(BACKBONES)
            raise ConfigError("LDG architecture", known, repr(architecture), "choose one of these")
        make = ResNet29 if architecture == "resnet29" else getattr(torchvision.models, architecture)
        self.backbone = make(num_classes=num_classes)

    @property
    def feature_size(self) -> int:
        """Length of what :meth:`features` gives for a picture: 512, 256 or 2,048."""
        return int(self.backbone.fc.in_features)

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits; their softmax is the label distribution.

        Args:
            image: float (N, 3, S, S), normalised RGB.

        Returns:
            float (N, num_classes) logits.
        """
        logits: Tensor = self.backbone(image)
        return logits

    def features(self, image: Tensor) -> Tensor:
        """What the last layer is given, float (N, F), for images as :meth:`forward` takes."""
        *layers, _ = self.backbone.children()  # the head is the last
        for layer in layers:
            image = layer(image)
        return image.flatten(1)  # (N, F)
