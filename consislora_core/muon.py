"""Muon: steps along the momentum of each weight matrix, orthogonalised (K. Jordan et al. 2024)."""

from collections import defaultdict

import torch
from torch import Tensor

from .foreach import foreach

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic a x + b x^3 + c x^5, which drives singular values towards 1
# On one square x x^T, and on the next: on a single one, the error of a product in TF32 would grow past the result.
ITERATIONS = (3, 2)


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each, nearly: its singular values come to lie between 0.7 and 1.2.

    matrices: ... rows columns, each by itself. Computed in their own dtype. The iterations multiply x from the left, by
    polynomials in its small square; of these the product is formed first.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for iterations in ITERATIONS:
        product, square = identity, x @ x.mT
        for _ in range(iterations):
            factor = a * identity + b * square + c * square @ square
            product, square = factor @ product, factor @ square @ factor
        x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with adjust_lr_fn="match_rms_adamw", for weights of shape (... rows columns).

    Leading axes count matrices that know nothing of one another, so LoRAs of several images in one tensor step as
    each alone would. Weights of one shape are orthogonalised in one product. Steps have the size of AdamW's at the
    same rate: 0.2 in root mean square, before the rate. A rate that is a tensor on the weights' device can be changed
    in steps that are recorded as a CUDA graph.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    same_shape[weight.shape].append(weight)
            for shape, weights in same_shape.items():
                self._step_together(group, shape, weights)

    def _step_together(self, group: dict, shape: torch.Size, weights: list[Tensor]) -> None:
        gradients = [weight.grad for weight in weights]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        foreach("lerp_", momenta, gradients, 1 - group["momentum"])
        ahead = foreach("lerp", gradients, momenta, group["momentum"])  # Nesterov's
        steps = orthogonalised(torch.stack(ahead)) * (0.2 * max(shape[-2:]) ** 0.5 * group["lr"])
        foreach("mul_", weights, 1 - group["lr"] * group["weight_decay"])
        foreach("sub_", weights, steps.unbind())
