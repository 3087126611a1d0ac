"""Matrix products in place of convolutions: the same numbers, the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from efficientface_deploy.models import LabelDistributionGenerator
from training.trainer import small_maps
from training.trainer.small_maps import SmallMapConv2d, use_matrix_products


def _gradients(conv: nn.Conv2d, x: Tensor, weighting: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = conv(x)
    conv.weight.grad = None
    (y * weighting).sum().backward()
    assert x.grad is not None and conv.weight.grad is not None
    return y.detach(), x.grad, conv.weight.grad


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (5, 4), (8, 8)])
def test_values_and_gradients_are_those_of_the_convolution(
    stride: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    exact = nn.Conv2d(24, 40, 3, stride, 1, bias=False).double()
    product = SmallMapConv2d.like(copy.deepcopy(exact).float())
    x = torch.randn(6, 24, *size).bfloat16()
    weighting = torch.randn(exact(x.double()).shape).bfloat16()

    wanted = _gradients(exact, x.double(), weighting.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = _gradients(product, x, weighting)

    assert found[2].dtype == torch.float32
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        # bfloat16 keeps 8 bits: one rounding of the inputs' products and one of the result.
        assert (ours.double() - theirs).abs().max() < 2e-2 * theirs.abs().max()


def test_small_maps_are_products_under_bf16_and_nothing_else_is() -> None:
    conv = SmallMapConv2d.like(nn.Conv2d(8, 8, 3, 1, 1, bias=False))
    small, large = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 9, 8)
    assert "Convolution" in str(conv(small).grad_fn)
    with torch.autocast("cpu", torch.bfloat16):
        assert "_Product" in str(conv(small).grad_fn)
        assert "Convolution" in str(conv(large).grad_fn)


@pytest.fixture
def cpu_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Pretend that the processor has these flags."""

    def set_flags(flags: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags} sse2\n")
        monkeypatch.setattr(small_maps, "_CPU_INFO", tmp_path / "cpuinfo")
        small_maps.has_amx.cache_clear()

    yield set_flags
    small_maps.has_amx.cache_clear()


@pytest.mark.parametrize(
    ("flags", "amp", "device", "used"),
    [
        ("avx512_bf16 amx_bf16 amx_tile", torch.bfloat16, "cpu", True),
        ("avx512_bf16", torch.bfloat16, "cpu", False),  # brings nothing without AMX
        ("amx_bf16", None, "cpu", False),
        ("amx_bf16", torch.bfloat16, "cuda", False),
    ],
)
def test_products_are_for_processors_with_amx(flags, amp, device, used, cpu_flags) -> None:
    cpu_flags(flags)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False))
    use_matrix_products(model, torch.device(device), amp)
    assert isinstance(model[0], SmallMapConv2d) == used


def test_a_system_that_says_nothing_of_its_processor(monkeypatch, cpu_flags) -> None:
    monkeypatch.setattr(small_maps, "_CPU_INFO", Path("/nowhere"))
    small_maps.has_amx.cache_clear()
    assert not small_maps.has_amx()


def test_a_network_keeps_its_parameters_and_their_names(cpu_flags) -> None:
    cpu_flags("amx_bf16")
    model = LabelDistributionGenerator(8, "resnet18")
    before = dict(model.named_parameters())
    keys = list(model.state_dict())

    use_matrix_products(model, torch.device("cpu"), torch.bfloat16)

    assert sum(isinstance(module, SmallMapConv2d) for module in model.modules()) == 16
    assert list(model.state_dict()) == keys
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
