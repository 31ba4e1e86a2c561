"""The demo model in a ComfyUI in this process: trains on drawings, many together, and makes pictures.

Both are cached in a folder under a hash of all that determines them.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from benchmarks.effects import WEIGHTS
from benchmarks.fidelity.judges import DRAWN, render_everything
from benchmarks.fidelity.pairs import Drawing
from benchmarks.fidelity.patches import style_patches
from benchmarks.guidance import SIZES, start_comfy
from consislora_core.colours import match_palette
from consislora_core.files import written_whole
from consislora_core.lora_file import ImageLora, from_state_dict, to_state_dict, write_tensors
from consislora_core.losses import add_noise, draw, noise_loss
from consislora_core.schedule import Stage
from consislora_core.store import METHOD, fingerprint
from consislora_core.trainer import Trainer

SAMPLER, SCHEDULER, STEPS, CFG = "dpmpp_2m", "karras", 20, 2.0  # the demo's
CHANNELS, SIDE = 4, DRAWN // 8  # of a latent
DECODER = ("first_stage_model.decoder.", "first_stage_model.post_quant_conv.")
ENDS = ("down", "up")
ATTENTION = re.compile(r".*transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)")
DEFAULTS = dict(
    content_guidance=0.0, style_guidance=0.0, content_strength=1.0, style_strength=1.0,
    start_percent=0.0, end_percent=1.0, reuse_steps=1, cfg=CFG,
)  # fmt: skip

# A LoRA of alpha = rank on all attention layers, by layer: down (loras rank in), up (loras out rank).
Everywhere = dict[str, tuple[Tensor, Tensor]]


class Own(NamedTuple):
    """What was learned from one drawing, and the name of the training."""

    name: str
    lora: ImageLora | Everywhere


class PostCfg(NamedTuple):
    """A function that ComfyUI calls after classifier-free guidance, and all that it depends on."""

    function: Callable[[dict], Tensor]
    facts: list


class Learned(NamedTuple):
    """The result of a training. state: of the trainer, from which a next phase continues."""

    owns: dict[Drawing, Own]
    state: dict[str, Tensor]


class Studio:
    """drawings: all emoji in all sets."""

    def __init__(self, work: Path):
        self.pack = start_comfy(SIZES["sdxl" if torch.cuda.is_available() else "small"])
        import comfy.utils

        comfy.utils.set_progress_bar_enabled(False)
        self.model, self.clip, self.vae = self.pack.nodes.demo.LoadDemoModel.execute().args
        self.drawings = render_everything(work)
        self.place = {drawing: i for i, drawing in enumerate(self.drawings.labels)}
        weights = {name: weight for name, weight in load_file(WEIGHTS).items() if not name.startswith(DECODER)}
        self.base = fingerprint([METHOD, save(weights)])  # what a training depends on
        self.whole = fingerprint([METHOD, WEIGHTS.read_bytes()])  # what a picture depends on
        self.loras, self.pictures = work / "fidelity" / "loras", work / "fidelity" / "pictures"
        for folder in (self.loras, self.pictures):
            folder.mkdir(parents=True, exist_ok=True)

    def drawn(self, *drawings: Drawing) -> Tensor:
        """The pictures of drawings: b 3 h w, 0 to 1."""
        return self.drawings.batch([self.place[drawing] for drawing in drawings])

    @torch.inference_mode()
    def latents(self, *drawings: Drawing, size: float = 1.0, palette: Drawing | None = None) -> dict[str, Tensor]:
        pictures = self.in_palette(*drawings, palette) if palette else self.drawn(*drawings)
        return {"samples": self.vae.encode(resized(rearrange(pictures, "b c h w -> b h w c"), size))}

    def in_palette(self, drawing: Drawing, palette: Drawing) -> Tensor:
        """A drawing (1 3 h w) in the palette of another, as the node Match Palette gives it."""
        picture, other = (rearrange(self.drawn(one), "b c h w -> b h w c") for one in (drawing, palette))
        return rearrange(match_palette(picture, other), "b h w c -> b c h w")

    @torch.inference_mode()
    def recoloured_latents(self, drawing: Drawing, count: int, size: float = 1.0) -> Tensor:
        """As the nodes Recolour and VAE Encode give them."""
        picture = rearrange(self.drawn(drawing), "b c h w -> b h w c")
        return self.vae.encode(resized(self.pack.nodes.recolour.Recolour.execute(picture, count, 0).result[0], size))

    @torch.inference_mode()
    def patched_latents(self, drawing: Drawing, count: int) -> Tensor:
        (picture,) = rearrange(self.drawn(drawing), "b c h w -> b h w c")
        return self.vae.encode(style_patches(picture, count, torch.Generator().manual_seed(0)))

    @torch.inference_mode()
    def decoded(self, latent: dict[str, Tensor]) -> Tensor:
        return rearrange(self.vae.decode(latent["samples"]), "b h w c -> b c h w").clamp(0, 1)

    @torch.inference_mode()
    def text(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def learned(
        self,
        stage: Stage,
        prompt: str,
        drawings: list[Drawing],
        frozen: Learned | None = None,
        together: bool = False,
        recolourings: int = 0,
        patches: int = 0,
        sizes: tuple[float, ...] = (),
        trainer: Callable[..., Trainer] = Trainer,
        way: str = "",
    ) -> Learned:
        """An ImageLora for each drawing, all trained as one batch; together: one LoRA for all, a drawing a step.

        frozen: a training on the same drawings, whose content parts are frozen. recolourings: of each drawing, of which
        a step takes one. patches: the same, of pictures in the drawing's place that `style_patches` makes. sizes: the
        side of all pictures in each phase, as a part of theirs. trainer: another than the pack's, which `way` names.
        Stages that begin with the same phases share them.
        """
        names = frozen and [own.name for own in frozen.owns.values()]
        facts = [self.base, stage.facts(), prompt, drawings, names, *["together"] * together]
        facts += [recolourings] * bool(recolourings) + ["patches", patches] * bool(patches)
        name = fingerprint(facts + ["sizes", sizes] * bool(sizes) + ["way", way] * bool(way))
        if kept := self._kept(name, drawings, from_state_dict):
            return kept
        *earlier, phase = stage.phases
        first = replace(stage, phases=tuple(earlier)) if earlier else None
        variant = (recolourings, patches, sizes[:-1], trainer, way)
        before = first and self.learned(first, prompt, drawings, frozen, together, *variant).state
        held = frozen and [{"content": own.lora.part("content")} for own in frozen.owns.values()]
        loras = 1 if together else len(drawings)
        what, size = f"{stage.name} stage, {phase.loss} loss", sizes[-1] if sizes else 1.0
        with (
            self._training(what, prompt, drawings, recolourings, patches, size) as (denoiser, z_0, cond),
            trainer(denoiser, z_0, cond, stage, held and held[0] if loras == 1 else held, loras=loras) as training,
        ):
            if before:
                training.load_state_dict(before)
            for _ in training:
                pass
            loras = [to_state_dict(ImageLora(training.parts(i), {})) for i in range(training.loras)]
            self._keep(name, loras, training.state_dict())
        return self._kept(name, drawings, from_state_dict)

    def learned_everywhere(self, stage: Stage, prompt: str, drawings: list[Drawing]) -> Learned:
        """An Everywhere for each drawing: the stage's first phase as a LoRA on all attention layers."""
        name = fingerprint([self.base, stage.facts() | {"optimizer": stage.optimizer}, prompt, drawings, "everywhere"])
        if kept := self._kept(name, drawings, _everywhere_of):
            return kept
        generator, phase = torch.Generator().manual_seed(stage.seed), stage.phases[0]
        with self._training("all attention layers", prompt, drawings) as (denoiser, z_0, cond):
            lora = fresh_everywhere(denoiser.unet, stage.rank, z_0, generator)
            weights = [weight for layer in lora.values() for weight in layer]
            optimizer = torch.optim.AdamW(weights, phase.learning_rate, stage.betas, stage.eps, stage.weight_decay)
            with everywhere(denoiser.unet, lora):
                for _ in range(phase.steps):
                    noise, sigma = draw(z_0[:1], denoiser.sigmas, stage.noise_offset, generator)
                    x = add_noise(z_0, noise, sigma)
                    z_0_hat = denoiser.denoise(x, sigma.flatten().expand(len(x)), cond)
                    optimizer.zero_grad()
                    (noise_loss(z_0, z_0_hat, noise, sigma) * len(x)).backward()
                    optimizer.step()
            ends = {f"{layer}.{end}": weight for layer in lora for end, weight in zip(ENDS, lora[layer], strict=True)}
            rows = range(len(drawings))
            self._keep(name, [{key: weight[[row]].detach() for key, weight in ends.items()} for row in rows], {})
        return self._kept(name, drawings, _everywhere_of)

    @contextmanager
    def _training(
        self,
        what: str,
        prompt: str,
        drawings: list[Drawing],
        recolourings: int = 0,
        patches: int = 0,
        size: float = 1.0,
    ) -> Iterator[tuple]:
        print(f"Training {len(drawings)} LoRAs, {what} ...", file=sys.stderr, flush=True)
        host, latents = self.pack.host.training_model, self.latents(*drawings, size=size)
        if recolourings:
            latents = {"samples": torch.cat([self.recoloured_latents(one, recolourings, size) for one in drawings])}
        if patches:
            latents = {"samples": torch.cat([self.patched_latents(one, patches) for one in drawings])}
        shape = (len(drawings), *latents["samples"].shape[1:])
        with host.open_for_training(self.model, shape, torch.float32) as denoiser:
            z_0 = host.clean_latents(self.model, latents)
            yield denoiser, z_0, host.encoded_conditioning(self.model, self.text(prompt), z_0)

    def _keep(self, name: str, loras: list[dict[str, Tensor]], state: dict[str, Tensor]) -> None:
        parts = {**{str(row): lora for row, lora in enumerate(loras)}, "state": state}
        tensors = {f"{part}/{key}": value.cpu().clone() for part in parts for key, value in parts[part].items()}
        write_tensors(tensors, self.loras / f"{name}.safetensors", {"format": "pt"})

    def _kept(self, name: str, drawings: list[Drawing], lora_of: Callable[[dict], Any]) -> Learned | None:
        if not (file := self.loras / f"{name}.safetensors").exists():
            return None
        parts: dict[str, dict[str, Tensor]] = {"state": {}}
        for place, tensor in load_file(file).items():
            part, key = place.split("/")
            parts.setdefault(part, {})[key] = tensor
        state = parts.pop("state")
        owns = [Own(f"{name} {row}", lora_of(parts[row])) for row in sorted(parts, key=int)]
        return Learned(dict(zip(drawings, owns if len(owns) > 1 else owns * len(drawings), strict=True)), state)

    def picture(
        self,
        content: Own | None,
        style: Own | None,
        seed: int,
        prompt: str = "a [c] in the style of [v]",
        start: Drawing | None = None,
        denoise: float = 1.0,
        locked: bool = False,
        palette: Drawing | None = None,
        variation: float = 0.0,
        size: float = 1.0,
        post_cfg: PostCfg | None = None,
        **settings,
    ) -> Tensor:
        """1 3 h w, 0 to 1. start: the drawing to noise, instead of an empty latent; with palette in that drawing's, and
        locked with its own noise, of which `variation` is the seed's. size: of the empty latent, as a part of the
        drawings'. settings: other than DEFAULTS.
        """
        settings = DEFAULTS | settings
        names = [own and own.name for own in (content, style)]
        more = (["size", size] if size != 1 else []) + (["post_cfg", *post_cfg.facts] if post_cfg else [])
        more += ["locked"] * locked + (["palette", palette] if palette else [])
        more += ["variation", variation] * bool(variation)
        name = fingerprint([self.whole, *names, seed, prompt, start, denoise, settings, *more])
        if not (file := self.pictures / f"{name}.png").exists():
            empty = {"samples": torch.zeros(1, CHANNELS, round(size * SIDE), round(size * SIDE))}
            latent = self.latents(start, palette=palette) if start else empty
            sampling = self.pack.host.sampling
            sigmas = sampling.ksampler_sigmas(self.model, STEPS, SAMPLER, SCHEDULER, denoise)
            model = self.model.clone()
            if post_cfg:
                model.set_model_sampler_post_cfg_function(post_cfg.function)
            with torch.inference_mode(), self._guider(model, content, style, self.text(prompt), settings) as guider:
                how = (latent, seed, SAMPLER, sigmas)
                if locked:
                    own = self.pack.host.guider.build_reconstruction_guider(model, self.text(""), content.lora)
                    drawn = sampling.sample_locked(guider, own, *how, variation)
                else:
                    drawn = sampling.sample(guider, *how)
                (picture,) = self.decoded(drawn)
            with written_whole(file) as unfinished:
                pixels = (255 * rearrange(picture, "c h w -> h w c")).round().byte().cpu().numpy()
                Image.fromarray(pixels).save(unfinished, "png")
        with Image.open(file) as image:
            return rearrange(torch.tensor(np.asarray(image)), "h w c -> 1 c h w") / 255

    @contextmanager
    def _guider(
        self, model: Any, content: Own | None, style: Own | None, positive: list, settings: dict
    ) -> Iterator[Any]:
        import comfy.samplers

        owns = {role: own.lora for role, own in (("content", content), ("style", style)) if own}
        if any(isinstance(lora, ImageLora) for lora in owns.values()):
            guider = self.pack.nodes.guide.Guider
            yield guider.execute(model, positive, self.text(""), **owns, **settings).result[0]
            return
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, self.text(""))
        guider.set_cfg(settings["cfg"])
        with ExitStack() as stack:
            for lora in owns.values():
                stack.enter_context(everywhere(model.model.diffusion_model, lora))
            yield guider


def resized(pictures: Tensor, size: float) -> Tensor:
    """Pictures (b h w c) with both sides times `size`."""
    if size == 1:
        return pictures
    smaller = F.interpolate(
        rearrange(pictures, "b h w c -> b c h w"), scale_factor=size, mode="bicubic", antialias=True
    )
    return rearrange(smaller.clamp(0, 1), "b c h w -> b h w c")


def _everywhere_of(ends: dict[str, Tensor]) -> Everywhere:
    layers = dict.fromkeys(key.rpartition(".")[0] for key in ends)
    return {layer: tuple(ends[f"{layer}.{end}"] for end in ENDS) for layer in layers}


def fresh_everywhere(unet: nn.Module, rank: int, z_0: Tensor, generator: torch.Generator) -> Everywhere:
    """As `fresh_part`, but on all attention layers, and the same for each latent of z_0."""
    lora = {}
    for name, layer in unet.named_modules():
        if ATTENTION.fullmatch(name):
            down = torch.randn(rank, layer.in_features, generator=generator) / rank
            weights = down.repeat(len(z_0), 1, 1), torch.zeros(len(z_0), layer.out_features, rank)
            lora[name] = tuple(weight.to(z_0.device).requires_grad_() for weight in weights)
    return lora


@contextmanager
def everywhere(unet: nn.Module, lora: Everywhere) -> Iterator[None]:
    """Within the context LoRAs act: one on the whole batch, or each on one row."""

    def add(down, up, layer, inputs, output):
        return output + inputs[0] @ down.to(output).mT @ up.to(output).mT

    with ExitStack() as stack:
        for name, weights in lora.items():
            stack.callback(unet.get_submodule(name).register_forward_hook(partial(add, *weights)).remove)
        yield
