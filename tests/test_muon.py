"""Muon agrees with torch's own where both can run, and steps stacked matrices as it would each alone."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from consislora_core.muon import ITERATIONS, NEWTON_SCHULZ, Muon, orthogonalised


def stepped(optimizer_of, starts, gradients):
    """Weights after a step along each row of gradients. They turn, or momentum would change nothing."""
    weights = [start.clone().requires_grad_() for start in starts]
    optimizer = optimizer_of(weights)
    for row in gradients:
        for weight, gradient in zip(weights, row, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("shape", [(8, 64), (64, 8), (16, 16)])
def test_singular_values_come_to_about_1(shape):
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("decades", [0, 4, 8])
def test_only_the_singular_values_change_each_by_the_quintic(decades):
    generator = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(n, 16, generator=generator).double())[0] for n in (16, 320))
    values = torch.logspace(0, -decades, 16).double()
    a, b, c = NEWTON_SCHULZ
    expected = values / values.norm()
    for _ in range(sum(ITERATIONS)):
        expected = a * expected + b * expected**3 + c * expected**5
    found = orthogonalised((u * values @ v.mT).float())
    assert (found - u * expected @ v.mT).norm() < 1e-4 * expected.norm()


class TF32(TorchFunctionMode):
    """Products of matrices round what they multiply to 10 bits, as a GPU may when another pack allows it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            args = [((matrix.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for matrix in args]
        return function(*args, **(kwargs or {}))


def test_products_in_tf32_bring_no_singular_value_past_the_others():
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, 64, generator=generator))[0] for n in (64, 1280))
    matrix = u * torch.logspace(0, -6, 64) @ v.mT
    with TF32():
        found = orthogonalised(matrix)
    assert torch.linalg.svdvals(found).max() < 1.25
    assert (found - orthogonalised(matrix)).norm() < 0.05 * found.norm()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_it_steps_as_torchs_muon_does_within_the_bf16_that_torch_computes_in():
    settings, generator = dict(lr=0.05, weight_decay=0.1), torch.Generator().manual_seed(0)
    rows = [[torch.randn(shape, generator=generator) for shape in [(64, 32), (32, 64), (32, 64)]] for _ in range(21)]
    ours = stepped(lambda weights: Muon(weights, **settings), rows[0], rows[1:])
    theirs = stepped(
        lambda weights: torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw", **settings), rows[0], rows[1:]
    )
    for our, their, start in zip(ours, theirs, rows[0], strict=True):
        assert (our - their).norm() < 0.02 * (their - start).norm()


def test_stacked_matrices_step_as_each_alone():
    generator = torch.Generator().manual_seed(0)
    starts, gradients = torch.randn(3, 16, 8, generator=generator), torch.randn(20, 3, 16, 8, generator=generator)
    (together,) = stepped(lambda weights: Muon(weights, lr=0.05), [starts], gradients[:, None])
    for row, start in enumerate(starts):
        (alone,) = stepped(lambda weights: Muon(weights, lr=0.05), [start], gradients[:, row, None])
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-6)


def test_a_step_reads_nothing_back_from_its_device():
    """As it must not where a GPU records it: tensors on the device "meta" have no numbers to read."""
    weights = [torch.randn(shape, device="meta").requires_grad_() for shape in [(2, 8, 64), (2, 64, 8)]]
    optimizer = Muon(weights, lr=torch.zeros((), device="meta"), weight_decay=0.1)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
