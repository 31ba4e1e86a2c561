"""Runs one stage and yields an event per step; can be saved and resumed exactly."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .adapters import fresh_part, inserted
from .foreach import foreach
from .lora_file import Part
from .losses import LOSSES, Draw, add_noise, draw, mask_weights
from .muon import Muon
from .recording import RecordedStep, Step
from .schedule import ADAMW, MUON, Stage

COUNT = "step"  # what an optimizer keeps of a parameter is of the parameter's shape, but for this number
KEPT = {ADAMW: (COUNT, "exp_avg", "exp_avg_sq"), MUON: ("momentum_buffer",)}


class Denoiser(NamedTuple):
    """A model as the core sees it, whichever program hosts it."""

    unet: nn.Module  # which gets the LoRA layers
    denoise: Callable[[Tensor, Tensor, Any], Tensor]  # (x b c h w, sigma b, cond) -> z_0_hat, through `unet`
    sigmas: Tensor  # the noise levels it was trained on, ascending, on the CPU
    dtype: torch.dtype = torch.float32  # that it computes in
    recordable: bool = False  # on a CUDA device, and `denoise` launches the same kernels in every step
    flow: bool = False  # trained by flow matching: x = (1 - sigma) z_0 + sigma n


class StepEvent(NamedTuple):
    """What happened in one step, yielded after the weights moved."""

    step: int  # from 1
    stage: str
    phase: str  # the loss in use: "noise" or "reconstruction"
    losses: tuple[float, ...]  # of each LoRA
    learning_rate: float
    sigma: float  # the noise level
    z_0_hat: Tensor  # x0 predictions (loras c h w) in latent space; the next step may overwrite them

    @property
    def loss(self) -> float:
        """The mean of the losses."""
        return sum(self.losses) / len(self.losses)


class RandomStep(NamedTuple):
    """The random numbers of one step, on the CPU."""

    image: int | None  # which latent of each LoRA, where there are several
    draw: Draw  # of one row
    before: Tensor  # the generator's state before they were drawn


class Trainer:
    """One stage of training, driven by iteration (arXiv 2503.10614, section 4.2):

        with Trainer(model, z_0, cond, image_stage()) as trainer:
            for event in trainer:
                ...
            parts = trainer.parts()

    z_0: clean latents (b c h w) in the model's space: of one image, of several of one subject, or of recolourings of
    one; each step draws one of them.
    cond: what `denoise` takes as its third argument.
    frozen: parts that act but do not learn, by role (stage 2: the content part of stage 1).
    loss_scale: above 1 for fp16 activations, whose small gradients would vanish; halved when they overflow.
    loras: how many to train, each as if alone with the same seed. z_0 then holds the latents of one LoRA after those
    of another, equally many; a step takes one of each, as spans of the batch. frozen holds one mapping for each LoRA.
    mask: what of each latent counts in the losses, from 0 to 1 (b 1 h w, see losses.py); None: everything.

    Raises ValueError for latents that are empty or not finite, and on entry for parts that do not fit the UNet.
    """

    def __init__(
        self,
        model: Denoiser,
        z_0: Tensor,
        cond: Any,
        stage: Stage,
        frozen: Mapping[str, Part] | Sequence[Mapping[str, Part]] | None = None,
        loss_scale: float = 1.0,
        loras: int = 1,
        mask: Tensor | None = None,
    ):
        _check_latents(z_0)
        self.model, self.cond, self.stage, self.loras = model, cond, stage, loras
        self.z_0 = self._by_lora(z_0.float())
        self.weight = None if mask is None else self._by_lora(mask_weights(mask.float()))
        self.generator = torch.Generator().manual_seed(stage.seed)
        fresh = {role: fresh_part(model.unet, role, stage.rank, self.generator) for role in stage.learns}
        frozen = [frozen or {}] if loras == 1 else frozen or [{}] * loras
        self.start = [{**parts, **fresh} for parts in frozen]  # until the UNet has them
        self.loss_scale = loss_scale
        self.step = 0
        self.drawn: RandomStep | None = None  # of the next step
        self.kind: tuple[str, float] | None = None  # the loss and scale that `work` computes
        self.random_state = self.generator.get_state()  # after the last whole step

    def _by_lora(self, batch: Tensor) -> Tensor:
        return rearrange(batch, "(lora image) c h w -> lora image c h w", lora=self.loras)

    def __enter__(self) -> "Trainer":
        with ExitStack() as stack:
            self.inserted = stack.enter_context(
                inserted(self.model.unet, self.start, self.stage.learns, self.z_0.device)
            )
            self.optimizer = self._optimizer()
            self._stack = stack.pop_all()
        del self.start  # the UNet has copies of its own now
        return self

    def _optimizer(self) -> torch.optim.Optimizer:
        stage, parameters, device = self.stage, self.inserted.parameters, self.z_0.device
        learning_rate = torch.zeros((), device=device) if self.model.recordable else 0.0
        if stage.optimizer == MUON:
            return Muon(parameters, learning_rate, weight_decay=stage.weight_decay)
        return torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            betas=stage.betas,
            eps=stage.eps,
            weight_decay=stage.weight_decay,
            fused=device.type in ("cpu", "cuda"),  # other devices may have none
            capturable=self.model.recordable,
        )

    def __exit__(self, *error) -> None:
        self.kind = self.work = None  # breaks the reference cycle, or a recording's memory would stay
        self._stack.__exit__(*error)

    def __iter__(self) -> Iterator[StepEvent]:
        while self.step < self.stage.steps:
            image, random, _ = self.drawn or self._draw()
            self.drawn = None
            # The LoRAs get the same noise, as each would alone.
            noise, sigma = (part.to(self.z_0).repeat(self.loras, 1, 1, 1) for part in random)
            weight = None if self.weight is None else self._rows(self.weight, image)
            yield self.train_step(self._rows(self.z_0, image), Draw(noise, sigma), weight)

    def _rows(self, batch: Tensor, image: int | None) -> Tensor:
        """One image of each LoRA."""
        return batch[:, 0 if image is None else image]

    def _draw(self) -> RandomStep:
        before = self.generator.get_state()
        images = self.z_0.shape[1]
        image = int(torch.randint(images, (1,), generator=self.generator)) if images > 1 else None
        like = torch.empty(1, *self.z_0.shape[2:])
        return RandomStep(image, draw(like, self.model.sigmas, self.stage.noise_offset, self.generator), before)

    def train_step(self, z_0: Tensor, random: Draw, weight: Tensor | None = None) -> StepEvent:
        """One step on given noise and noise levels. z_0, random, weight: a row for each LoRA.

        weight: of each latent pixel in the loss, from `mask_weights`; None: all weigh alike.

        Raises FloatingPointError before the weights move if the loss is not finite.
        """
        loss, learning_rate = self.stage.at(self.step)
        self._set_learning_rate(learning_rate)
        computed, losses, sigma = self._backward([z_0, *random, *([] if weight is None else [weight])], loss)
        self.work.update(*computed)
        self.step += 1
        self.random_state = self.drawn.before
        return StepEvent(self.step, self.stage.name, loss, losses, learning_rate, sigma, computed[0])

    def _set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            if self.model.recordable:
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def _update(self, z_0_hat: Tensor, numbers: Tensor, *gradients: Tensor) -> None:
        """Moves the weights; takes what `_compute_gradients` returned."""
        for parameter, gradient in zip(self.inserted.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()  # unclipped: the authors' code passes 1.0 to a clip that gets no gradients

    def _backward(self, inputs: Sequence[Tensor], loss_name: str) -> tuple[Sequence[Tensor], tuple[float, ...], float]:
        """Computes gradients; returns what `_compute_gradients` does, the loss of each LoRA and the mean sigma.

        inputs: as `_compute_gradients` takes them.
        """
        while True:
            computed = self._work(loss_name).compute(*inputs)
            self.drawn = self.drawn or self._draw()  # while a GPU computes
            *values, norm, sigma = computed[1].tolist()
            if math.isfinite(sum(values) + norm):
                return computed, tuple(values), sigma
            if self.loss_scale <= 1 or not math.isfinite(sum(values)):
                raise FloatingPointError(
                    f"The loss became {sum(values)} in step {self.step + 1} of {self.stage.steps} "
                    f"({loss_name} phase, learning rate {self.stage.at(self.step)[1]:g}). "
                    "Lower the learning rate, or choose precision bf16 or fp32."
                )
            self.loss_scale /= 2

    def _work(self, loss_name: str) -> Step | RecordedStep:
        """The step to run for this loss."""
        kind = loss_name, self.loss_scale
        if kind != self.kind:
            self.kind, self.work = kind, None  # frees the memory of an earlier recording
            step = Step(partial(self._compute_gradients, *kind), self._update)
            self.work = RecordedStep(step) if self.model.recordable else step
        return self.work

    def _compute_gradients(
        self, loss_name: str, loss_scale: float, z_0: Tensor, noise: Tensor, sigma: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Returns z_0_hat; as one tensor the LoRAs' losses, gradient norm and mean sigma; a gradient of each weight."""
        x = add_noise(z_0, noise, sigma, self.model.flow)
        self.optimizer.zero_grad()  # frees the last step's gradients
        with self.inserted.cast(self.model.dtype):
            z_0_hat = self.model.denoise(x, sigma.flatten(), self.cond)
            spans = zip(*(tensor.chunk(self.loras) for tensor in (z_0, z_0_hat, noise, sigma)), strict=True)
            weights = [None] * self.loras if weight is None else weight.chunk(self.loras)
            losses = torch.stack(
                [LOSSES[loss_name](*span, self.model.flow, part) for span, part in zip(spans, weights, strict=True)]
            )
            grads = torch.autograd.grad(losses.sum() * loss_scale, self.inserted.parameters)
        grads = [grad.contiguous() for grad in grads]  # as the weights are, or a fused AdamW mistakes them
        if loss_scale != 1:
            foreach("div_", grads, loss_scale)
        norm = torch.stack(foreach("norm", grads)).sum()
        numbers = torch.stack([*losses.detach(), norm, sigma.mean()])  # one host sync for all of them
        return z_0_hat.detach(), numbers, *grads

    def parts(self, lora: int = 0) -> dict[str, Part]:
        """The parts of one LoRA as trained so far, frozen ones included, by role, on the CPU in fp32."""
        return self.inserted.parts(lora)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a later Trainer of the same arguments needs to go on: CPU tensors as of the last whole step."""
        state = {
            "step": torch.tensor(self.step),
            "loss_scale": torch.tensor(self.loss_scale, dtype=torch.float64),
            "generator": self.random_state.clone(),
        }
        moments = self.optimizer.state_dict()["state"]  # of a parameter, by its number: empty before the first step
        for number, weight in enumerate(self.inserted.parameters):
            state[f"weights.{number}"] = weight.detach().cpu().clone()
            for name in moments.get(number, ()):
                state[f"optimizer.{number}.{name}"] = moments[number][name].detach().cpu().clone()
        return state

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of `state_dict` after the first step, by name."""
        shapes = {"step": (), "loss_scale": (), "generator": tuple(self.random_state.shape)}
        for number, weight in enumerate(self.inserted.parameters):
            shapes[f"weights.{number}"] = tuple(weight.shape)
            for name in KEPT[self.stage.optimizer]:
                shapes[f"optimizer.{number}.{name}"] = () if name == COUNT else tuple(weight.shape)
        return shapes

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues, in a new Trainer, from the `state_dict` of one of the same arguments after its first step."""
        moments, names = {}, KEPT[self.stage.optimizer]
        with torch.no_grad():
            for number, weight in enumerate(self.inserted.parameters):
                weight.copy_(state[f"weights.{number}"])
                # Clones, since the optimizer keeps the tensors and writes into them.
                moments[number] = {name: state[f"optimizer.{number}.{name}"].clone() for name in names}
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.generator.set_state(state["generator"])
        self.random_state = self.generator.get_state()
        self.step, self.loss_scale = int(state["step"]), float(state["loss_scale"])


def _check_latents(z_0: Tensor) -> None:
    if z_0.ndim != 4 or len(z_0) == 0:
        raise ValueError(
            f"latent has shape {tuple(z_0.shape)}; at least one image is needed (batch, channels, height, width)."
        )
    if not z_0.isfinite().all():
        raise ValueError(
            "latent holds values that are not numbers (NaN or infinity); the VAE that encoded it failed. "
            "Encode the image again, with the VAE in fp32 if it is SDXL's own."
        )
