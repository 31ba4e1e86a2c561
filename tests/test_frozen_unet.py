"""The frozen UNet's own ways to compute a layer: what torch's layers give, and their gradients; on a GPU where there is
one."""

import pytest
import torch
from torch import nn

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]

pytestmark = pytest.mark.usefixtures("in_full_fp32")


@pytest.fixture
def ops(comfy):
    import comfy.ops

    return comfy.ops.disable_weight_init


def random_case(layer, *shape, device):
    """The layer with random weights that do not learn, an input, and a gradient for what comes out."""
    torch.manual_seed(0)
    for parameter in layer.to(device).requires_grad_(False).parameters():
        parameter.normal_()
    x = (3 * torch.randn(*shape) + 1).to(device).requires_grad_()
    return layer, x, torch.randn_like(layer(x))


def check_alike(ours, theirs, x, grad):
    """Same output and same gradient of x, from two functions."""
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (back,), (expected_back,) = (torch.autograd.grad(out, x, grad) for out in (y, expected))
    torch.testing.assert_close(back, expected_back, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_group_norm_of_shared_out_groups_is_torchs(pack, ops, device, rows):
    layer, x, grad = random_case(ops.GroupNorm(32, 64), rows, 64, 16, 8, device=device)
    check_alike(
        lambda x: pack.host.frozen_unet._SplitGroupNorm.apply(x, layer), type(layer).forward.__get__(layer), x, grad
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_single_pixels_is_a_product(pack, ops, device, bias):
    layer, x, grad = random_case(ops.Conv2d(24, 16, 1, bias=bias), 3, 24, 16, 8, device=device)
    conv_1x1, weight = pack.host.frozen_unet._conv_1x1, layer.weight.flatten(1)
    torch.testing.assert_close(conv_1x1(x, weight, layer.bias), layer(x), rtol=1e-4, atol=1e-4)
    back = nn.grad.conv2d_input(x.shape, layer.weight, grad)
    torch.testing.assert_close(conv_1x1(grad, weight.T), back, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gate_of_two_products_is_comfyuis_geglu(pack, comfy, ops, device):
    from comfy.ldm.modules.attention import GEGLU

    layer, x, grad = random_case(GEGLU(32, 48, operations=ops), 2, 10, 32, device=device)
    check_alike(lambda x: pack.host.frozen_unet._Geglu.apply(x, layer.proj), layer, x, grad)
