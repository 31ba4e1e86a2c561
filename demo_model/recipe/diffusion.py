"""The demo model's UNet and text encoders, trained together on latents.

In SDXL one block decides shape and another style. In a UNet of two levels nothing makes that so by itself, and three
subjects here do: role blocks that read prompts apart (`texts.captions`), a style block that gives one vector for the
whole picture (`keep_style_apart`), and a content block that writes no colour (`write_no_colour`).
"""

import random
from pathlib import Path

import model as demo
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import SpatialTransformer
from einops import rearrange
from recipe import painter
from recipe.autoencoder import SCALE, encode, initialise
from recipe.pool import Pool
from recipe.run import Clock, Optimiser, Run, load_shards, save_shards, sheet
from recipe.texts import Reader
from torch import Tensor, nn

CONTENT_BLOCK, STYLE_BLOCK = "output_blocks.0.1", "output_blocks.1.1"
SIGMA_MEAN, SIGMA_STD, SIGMA_MIN, SIGMA_MAX = 0.4, 1.3, 0.0292, 14.6146  # of log sigma; the last two are SDXL's
COLOUR_FROM, COLOUR_DIRECTIONS = 0.4, 32  # the share of the stage at which colour is measured
RATE = 2e-3
NO_MAPS = ("embedding", "time_embed.0", "label_emb.0.0", "input_blocks.0.0", "unet.out.2")  # these learn by AdamW


class TextAndUnet(nn.Module):
    def __init__(self, device: str):
        super().__init__()
        self.clip = demo.DemoClip(dtype=torch.float32)
        self.base = demo.build_unet(torch.float32, "cpu")
        self.unet = self.base.diffusion_model
        sizes = self.base.encode_adm(pooled_output=torch.zeros(1, 0), width=demo.SIZE, height=demo.SIZE)
        self.register_buffer("sizes", sizes, persistent=False)  # 1 1536
        self.read_apart()
        initialise(self)
        nn.init.zeros_(self.unet.out[2].weight)
        for block in self.unet.modules():
            if hasattr(block, "out_layers"):
                nn.init.zeros_(block.out_layers[3].weight)
        self.keep_style_apart()
        for text in (self.clip.clip_l, self.clip.clip_g):
            nn.init.eye_(text.transformer.text_projection.weight)
            nn.init.normal_(text.transformer.text_model.embeddings.position_embedding.weight, std=0.01)
        self.requires_grad_(True)
        self.to(device, memory_format=torch.channels_last)

    def read_apart(self):
        """Lets the role blocks read texts of their own, where there are three of them side by side."""

        def own(third):
            def hook(layer, inputs):
                x, context, *rest = inputs
                return (x, context.chunk(3, 1)[third] if context.shape[1] > demo.TOKENS else context, *rest)

            return hook

        for name, layer in self.unet.named_modules():
            if isinstance(layer, SpatialTransformer):
                layer.register_forward_pre_hook(own({CONTENT_BLOCK: 0, STYLE_BLOCK: 1}.get(name, 2)))

    def keep_style_apart(self):
        """Leaves the style block one vector for the whole picture: no self-attention, and the same words everywhere.

        In a UNet this small the block stands next to the picture, and would draw the shape itself. Weights of 0 get
        no gradient through one another and stay 0, under a LoRA as well.
        """
        for block in self.unet.get_submodule(STYLE_BLOCK).transformer_blocks:
            for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k"):
                nn.init.zeros_(block.get_submodule(name).weight)

    @torch.no_grad()
    def write_no_colour(self, directions: Tensor):
        """Takes the directions (channels n, orthonormal) from what the content block adds to the picture's features.

        Its last layer carries no LoRA, so that a content LoRA cannot write them either.
        """
        last = self.unet.get_submodule(CONTENT_BLOCK).proj_out
        last.weight -= directions @ (directions.T @ last.weight)
        last.bias -= directions @ (directions.T @ last.bias)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What ComfyUI's CLIPTextEncode computes, without its in-place sums, which autograd refuses."""
        hidden = []
        for encoder in (self.clip.clip_l, self.clip.clip_g):
            text = encoder.transformer.text_model
            x = text.embeddings.token_embedding.weight[tokens] + text.embeddings.position_embedding.weight
            for layer in text.encoder.layers:
                x = x + causal_attention(layer.self_attn, layer.layer_norm1(x))
                x = x + layer.mlp(layer.layer_norm2(x))
                hidden.append(x)
        last = (tokens == demo.END).int().argmax(1)
        pooled = text.final_layer_norm(x)[torch.arange(len(x), device=x.device), last]
        return torch.cat([hidden[1], hidden[4]], -1), encoder.transformer.text_projection(pooled)

    def forward(self, x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Raw v-prediction for x = z_0 + sigma n. tokens: b t, or b 3 t where the role blocks read apart."""
        if tokens.ndim == 3:
            context, pooled = self.encode(rearrange(tokens, "b n t -> (b n) t"))
            context = rearrange(context, "(b n) t c -> b (n t) c", n=3)
            pooled = rearrange(pooled, "(b n) c -> b n c", n=3)[:, 2]
        else:
            context, pooled = self.encode(tokens)
        y = torch.cat([pooled, self.sizes.to(pooled).expand(len(pooled), -1)], 1)
        sampling = self.base.model_sampling
        scaled = x / (sigma.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5
        return self.unet(scaled, sampling.timestep(sigma).float(), context, y=y)


def causal_attention(attention, x: Tensor) -> Tensor:
    q, k, v = (
        rearrange(p(x), "n t (h d) -> n h t d", h=attention.heads)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return attention.out_proj(
        rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "n h t d -> n t (h d)")
    )


# ---- training


class Noised(nn.Module):
    """One step's loss, to be compiled as a whole: v-prediction at noise levels drawn by lot."""

    def __init__(self, net: TextAndUnet):
        super().__init__()
        self.net = net

    def forward(self, z_0: Tensor, tokens: Tensor) -> Tensor:
        sigma = (SIGMA_MEAN + SIGMA_STD * torch.randn(len(z_0), device=z_0.device)).exp().clamp(SIGMA_MIN, SIGMA_MAX)
        noise, s = torch.randn_like(z_0), sigma.view(-1, 1, 1, 1)
        v = (noise - s * z_0) / (1 + s**2).sqrt()
        return F.mse_loss(self.net(z_0 + s * noise, sigma, tokens).float(), v)


def train(pool: Pool, latents: Tensor, vae, clock: Clock, state: Path, until: float, batch: int, compiled: bool):
    device = pool.device
    net = TextAndUnet(device)
    loss_of = torch.compile(Noised(net), fullgraph=True) if compiled else Noised(net)
    run = Run("unet", net, Optimiser(net, RATE, NO_MAPS), clock, state, until)
    directions = load_shards(state, "colour").get("directions")
    directions = None if directions is None else directions.float().to(device)
    prompts, reader = pool.tokens.shape[1], Reader()
    with run.kept():
        while run.goes_on():
            numbers = pool.draw(batch).to(device)
            tokens = pool.tokens[numbers, torch.randint(prompts, (batch,), device=device)].long()
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(latents[numbers].float(), tokens)
            run.step(loss, batch)
            if directions is None and run.progress() > COLOUR_FROM:
                directions = measure_colour(net, pool, vae)
                save_shards(state, "colour", {"directions": directions})
            if directions is not None:
                net.write_no_colour(directions)
            run.report()
            if run.due():
                run.save()
                sample_sheet(run, net, reader, vae, state / "unet.jpg")
    sample_sheet(run, net, reader, vae, state / "unet.jpg")


@torch.no_grad()
def measure_colour(net: TextAndUnet, pool: Pool, vae, drawings: int = 24, sigmas=(0.4, 1.0, 2.5)) -> Tensor:
    """The directions in which the content block's features differ most between colourings of the same drawing."""
    hues = [tuple(c / 255 for c in rgb) for name, rgb in painter.COLOURS.items() if name not in ("white", "beige")]
    colourings = [painter.Style("", "shades", (hue,) * 3) for hue in hues]
    empty = torch.tensor([Reader().tokens("")] * len(colourings), device=pool.device)
    features, generator = [], torch.Generator().manual_seed(1)
    block = net.unet.get_submodule(CONTENT_BLOCK)
    handle = block.register_forward_hook(lambda layer, inputs, output: features.append(output.float()))
    channels = block.proj_out.weight.shape[0]
    spread = torch.zeros(channels, channels, device=pool.device)
    emoji = [i for i, drawing in enumerate(pool.drawings) if drawing.kind == "emoji"]
    for i in random.Random(0).sample(emoji, drawings):
        rgba = pool.rgba[i].float().expand(len(colourings), -1, -1, -1) / 255
        z_0 = encode(vae, painter.paint(rgba, pool.tones[i].expand(len(colourings), -1), colourings) * 2 - 1)
        for sigma in sigmas:
            noise = torch.randn(1, *z_0.shape[1:], generator=generator).to(z_0)
            with torch.autocast(pool.device, torch.bfloat16):
                net(z_0 + sigma * noise, torch.full((len(z_0),), sigma, device=pool.device), empty)
            found = rearrange(features.pop(), "n c h w -> n (h w) c")
            off = (found - found.mean(0)).flatten(0, 1)
            spread += off.T @ off / len(off)
    handle.remove()
    return torch.linalg.eigh(spread)[1][:, -COLOUR_DIRECTIONS:].contiguous()


def compile_step(batch: int) -> None:
    """Leaves the compiled step in inductor's cache, where `train` finds it."""
    net = TextAndUnet("cuda")
    z_0 = torch.randn(batch, 4, demo.SIZE // 8, demo.SIZE // 8, device="cuda")
    tokens = torch.full((batch, 3, demo.TOKENS), demo.END, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        torch.compile(Noised(net), fullgraph=True)(z_0, tokens).backward()


# ---- sampling


@torch.no_grad()
def sample(net: TextAndUnet, reader: Reader, texts: list[str], steps=16, cfg=3.0, seed=0) -> Tensor:
    """Heun steps on a Karras schedule, in the model's latent space."""
    device = net.sizes.device
    side = demo.SIZE // 8
    noise = torch.randn(len(texts), 4, side, side, generator=torch.Generator().manual_seed(seed)).to(device)
    tokens = torch.tensor([reader.tokens(text) for text in [*texts, *[""] * len(texts)]], device=device)
    ramp = torch.linspace(1, 0, steps, device=device)
    sigmas = (0.03 ** (1 / 7) + ramp * (SIGMA_MAX ** (1 / 7) - 0.03 ** (1 / 7))) ** 7
    sigmas = [*sigmas, torch.zeros((), device=device)]

    def denoise(x, sigma):
        both = torch.cat([x, x])
        with torch.autocast(device.type, torch.bfloat16):
            v = net(both, sigma.expand(len(both)), tokens).float()
        cond, uncond = (both / (sigma**2 + 1) - v * sigma / (sigma**2 + 1).sqrt()).chunk(2)
        return uncond + cfg * (cond - uncond)

    x = noise * sigmas[0]
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = (x - denoise(x, sigma)) / sigma
        euler = x + d * (following - sigma)
        if following == 0:
            return euler
        x = x + (d + (euler - denoise(euler, following)) / following) / 2 * (following - sigma)


def sample_sheet(run: Run, net: TextAndUnet, reader: Reader, vae, path: Path) -> None:
    """What the averaged weights draw: subjects in the sets' styles and in painted ones."""
    subjects = ["cat face", "rocket", "red apple", "house", "guitar", "key", "grinning face", "automobile"]
    styles = [
        "twemoji",
        "noto",
        "emojione",
        "flat black",
        "line art thin black outline",
        "blue shades thick black outline",
        "orange to violet soft 3d",
        "gold red navy palette halftone on pale teal",
    ]
    learning = {key: value.detach().clone() for key, value in run.weights.items()}
    with torch.no_grad():
        for key, value in run.weights.items():
            value.copy_(run.average[key])
        z = sample(net, reader, [f"{subject}, {style}" for style in styles for subject in subjects])
        sheet(torch.cat([vae.decode(some) for some in (z / SCALE).split(16)]), path, len(subjects))
        for key, value in run.weights.items():
            value.copy_(learning[key])
