"""Convolutions of small maps as matrix products, for bfloat16 on CPUs.

A ResNet's last stages have many channels and few positions, and there oneDNN computes a
convolution, and above all the gradient of its weights, at a small part of the rate of its matrix
product. Taking the windows apart first (im2col, Chellapilla et al. 2006) turns all of it into
products; ``docs/training.md`` has the figures. It pays where the processor multiplies matrices of
bfloat16 itself (AMX), and brings nothing elsewhere.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

# Up to 8x8 positions the products are faster, at 12x12 no longer.
_MOST_POSITIONS = 64
_CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def has_amx() -> bool:
    """Whether this processor has AMX for bfloat16; False where the system does not say."""
    try:
        return "amx_bf16" in _CPU_INFO.read_text(encoding="utf-8").split()
    except OSError:
        return False


def use_matrix_products(model: nn.Module, device: torch.device, amp: torch.dtype | None) -> None:
    """Replace a network's dense 3x3 convolutions by :class:`SmallMapConv2d`, in place.

    The parameters stay the same objects under the same names. On a GPU, in float32 and on a CPU
    without AMX nothing is replaced.
    """
    if amp is None or device.type != "cpu" or not has_amx():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and _fits(child):
                setattr(module, name, SmallMapConv2d.like(child))


def _fits(conv: nn.Conv2d) -> bool:
    dense = conv.groups == 1 and conv.bias is None and conv.dilation == (1, 1)
    return dense and conv.kernel_size == (3, 3) and conv.padding == (1, 1)


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution that is a matrix product in bfloat16 on small maps, else the usual one."""

    @classmethod
    def like(cls, conv: nn.Conv2d) -> SmallMapConv2d:
        """The same convolution with the same weights, not a copy of them."""
        new = cls(conv.in_channels, conv.out_channels, 3, conv.stride[0], 1, bias=False)
        new.weight = conv.weight
        return new

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        stride = self.stride[0]
        positions = -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
        lower = torch.is_autocast_enabled("cpu") and x.device.type == "cpu"
        if not lower or positions > _MOST_POSITIONS:
            return super().forward(x)
        product: Tensor = _Product.apply(x, self.weight, stride)
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        x, weight = x.bfloat16(), weight.bfloat16()
        windows = _windows(x, stride)  # (N, H', W', 9 C)
        matrix = weight.permute(2, 3, 1, 0).flatten(0, 2)  # (9 C, C')
        ctx.save_for_backward(windows, x, weight)
        ctx.stride = stride
        return (windows @ matrix).permute(0, 3, 1, 2)  # (N, C', H', W'), channels last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        windows, x, weight = ctx.saved_tensors
        out_channels, channels = weight.shape[:2]
        gradient = gradients[0].bfloat16()  # (N, C', H', W')
        rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (N H' W', C')
        of_weight = windows.flatten(0, 2).t() @ rows  # (9 C, C')
        of_weight = of_weight.view(3, 3, channels, out_channels).permute(3, 2, 0, 1)
        if ctx.stride == 1:
            # The transpose of a 3x3 convolution is one with the mirrored kernel.
            mirrored = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2)  # (9 C', C)
            of_input = (_windows(gradient, 1) @ mirrored).permute(0, 3, 1, 2)
        else:
            of_input = conv2d_input(  # type: ignore[no-untyped-call]
                x.shape, weight, gradient, stride=ctx.stride, padding=1
            )
        return of_input, of_weight.float(), None


def _windows(x: Tensor, stride: int) -> Tensor:
    """The 3x3 surroundings of every position: (N, C, H, W) to (N, H', W', 9 C)."""
    x = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (N, H + 2, W + 2, C)
    windows = x.unfold(1, 3, stride).unfold(2, 3, stride)  # (N, H', W', C, 3, 3)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
