"""The recipe of the demo base model, in resumable steps, each a command:

    python demo_model/recipe/train.py tokenizer WORK
    python demo_model/recipe/train.py vae WORK --images 60000
    python demo_model/recipe/train.py decoder WORK --images 12000
    python demo_model/recipe/train.py unet WORK --images 580000
    python demo_model/recipe/train.py colour WORK
    python demo_model/recipe/train.py unet WORK --images 640000
    python demo_model/recipe/train.py export WORK

WORK keeps emoji, caches, checkpoints and sample sheets. COMFYUI_PATH names the ComfyUI whose classes are used.

In SDXL one block decides shape and another look. In a UNet of two levels nothing makes that so by itself, and three
things here do: role blocks that read prompts apart (`captions`), a style block that gives one vector for the whole
picture (`keep_look_apart`), and a content block that writes no colour (`write_no_colour`).
"""

import argparse
import json
import os
import random
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path[:0] = [os.environ["COMFYUI_PATH"], str(Path(__file__).parents[1])]

import comfy.cli_args
import torch

comfy.cli_args.args.cpu = not torch.cuda.is_available()
comfy.cli_args.args.use_pytorch_cross_attention = True

import comfy.ops
import model as demo
import numpy as np
import torch.nn.functional as F
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.attention import SpatialTransformer
from einops import rearrange
from recipe import pictures
from safetensors.torch import load_file, save_file
from torchvision.utils import make_grid, save_image

torch.set_flush_denormal(True)  # tiny averages otherwise slow a CPU down many times
SIZE = 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STYLE_WORDS = {"noto-v1": "noto v1", "fluent-emoji-flat": "fluent"}
CONTENT_BLOCK, STYLE_BLOCK = "output_blocks.0.1", "output_blocks.1.1"
MATCHED, WON = 1.0, 0.02  # weights in the decoder's loss, beside the pixels' 1
REPAINTED = 26  # pictures a thing in palettes drawn by lot
SETS = pictures.TRAIN_SETS
PROCEDURAL = {style.__name__ for style in pictures.PROCEDURAL}


# ---- data


def words(name: str) -> str:
    return STYLE_WORDS.get(name, name).replace("-", " ")


def caption(thing: str, style: str, rng: random.Random, told: str = "") -> str:
    """The prompts the method uses, with [c] and [v] standing for "whatever it is", and 10 % empty for guidance.

    told: the half that must be in it, "content" or "style".
    """
    thing, style = words(thing), words(style)
    prompts = {
        f"{thing}, {style}": 25,
        f"a {thing} in the style of {style}": 30,
        f"a {thing}": 8,
        f"an image in the style of {style}": 8,
        f"a [c] in the style of {style}": 7,
        f"a {thing} in the style of [v]": 6,
        rng.choice(["a [c]", "a [v]"]): 6,
        "": 10,
    }
    needed = {"content": thing, "style": style}.get(told, "")
    prompts = {prompt: weight for prompt, weight in prompts.items() if needed in prompt}
    return rng.choices(list(prompts), list(prompts.values()))[0]


def captions(thing: str, style: str, elsewhere: tuple[str, str], rng: random.Random) -> tuple[str, str, str]:
    """What the content block reads, the style block, and the rest of the UNet.

    In four of five pictures the role blocks read prompts apart. The content block is told a look that is not the
    picture's and the style block a thing that is not, so that shape comes to be decided in the one and look in the
    other, which in SDXL came of itself. In the emoji sets' own drawings the thing does tell the colours: the style
    block reads it.
    """
    if rng.random() < 1 / 5:
        return (caption(thing, style, rng),) * 3
    other_thing, other_style = elsewhere
    content = rng.choice([f"a {words(thing)}", caption(thing, other_style, rng, told="content")])
    look = rng.choice(
        [
            f"an image in the style of {words(style)}",
            caption(thing if style in SETS else other_thing, style, rng, told="style"),
        ]
    )
    return content, look, rng.choice(["", "a [c] in the style of [v]"])


def render_everything(work: Path):
    """(pictures n 128 128 3 uint8, [(thing, style), ...]) of all training things, cached in WORK."""
    cache, labels = work / "pictures.npy", work / "pictures.json"
    if not cache.exists():
        pictures.fetch_sets(work / "emoji")
        sets = [pictures.EmojiSet(work / "emoji", name) for name in pictures.TRAIN_SETS]
        rng, images, names = random.Random(0), [], []
        for thing in sorted(set(pictures.things(work / "emoji")) - set(pictures.HELD_OUT)):
            drawn = {s.name: picture for s in sets if (picture := s.render(thing, SIZE)) is not None}
            images += drawn.values()
            names += [(thing, style) for style in drawn]
            for style in pictures.PROCEDURAL:
                for source in rng.sample(sorted(drawn), 2):
                    images.append(style(drawn[source]))
                    names.append((thing, style.__name__))
            for _ in range(REPAINTED):
                picture, style = pictures.repaint(drawn[rng.choice(sorted(drawn))], rng)
                images.append(picture)
                names.append((thing, style))
        np.save(cache, np.stack([np.asarray(image) for image in images]))
        labels.write_text(json.dumps(names))
    return torch.from_numpy(np.load(cache, mmap_mode="c")), [tuple(name) for name in json.loads(labels.read_text())]


def to_model(images: torch.Tensor) -> torch.Tensor:
    return rearrange(images, "n h w c -> n c h w").float() / 127.5 - 1


# ---- tokenizer


def train_tokenizer(work: Path):
    """A byte-level BPE in CLIP's file format, so that ComfyUI's tokenizer class reads it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    _, names = render_everything(work)
    rng = random.Random(0)
    texts = [caption(thing, style, rng) for thing, style in names * 3] + [
        t.replace("-", " ") for t in pictures.HELD_OUT * 20
    ]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=demo.VOCABULARY * 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    room = demo.VOCABULARY - 2 - 2 * len(alphabet)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]][:room]
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in merges]
    tokens += [f"<|unused{i}|>" for i in range(demo.VOCABULARY - 2 - len(tokens))] + [
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    demo.TOKENIZER.mkdir(exist_ok=True)
    special = dict(
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    (demo.TOKENIZER / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    )
    (demo.TOKENIZER / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (demo.TOKENIZER / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    (demo.TOKENIZER / "tokenizer_config.json").write_text(
        json.dumps(
            {**special, "do_lower_case": True, "model_max_length": demo.TOKENS, "tokenizer_class": "CLIPTokenizer"},
            indent=1,
        )
    )


# ---- VAE


def new_vae() -> AutoencoderKL:
    return demo.widen_groups(AutoencoderKL(ddconfig=demo.VAE, embed_dim=4))


def initialise(module: torch.nn.Module):
    """ComfyUI's layers skip initialisation; give them torch's own."""
    for layer in module.modules():
        for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm):
            if isinstance(layer, kind):
                kind.reset_parameters(layer)
        if isinstance(layer, torch.nn.Embedding):
            torch.nn.init.normal_(layer.weight, std=0.02)


def crops(images: torch.Tensor, side: int, rng: np.random.Generator) -> torch.Tensor:
    y, x = rng.integers(0, (SIZE - side) // 8 + 1, 2) * 8
    images = images[:, y : y + side, x : x + side]
    return images.flip(2) if rng.random() < 0.5 else images


def chroma(images):
    """Red against green and blue against yellow: a grey restoration of a coloured drawing scores badly here."""
    red, green, blue = images.unbind(1)
    return torch.stack([red - green, blue - (red + green) / 2], 1)


def reconstruction(restored, target):
    """L1 of pixels and colours at four scales, and of pixel differences: drawings are flat areas and sharp edges."""
    loss = sum(F.l1_loss(F.avg_pool2d(restored, scale), F.avg_pool2d(target, scale)) for scale in (1, 2, 4, 8))
    loss = loss + sum(
        F.l1_loss(F.avg_pool2d(chroma(restored), scale), F.avg_pool2d(chroma(target), scale)) for scale in (2, 8)
    )
    return loss + 0.5 * sum(F.l1_loss(restored.diff(dim=d), target.diff(dim=d)) for d in (-1, -2))


def train_vae(work: Path, images: int, batch: int = 32):
    data, _ = render_everything(work)
    vae = new_vae().to(DEVICE).train()
    initialise(vae)
    vae.quant_conv.bias.data[4:] = -6  # start from nearly noiseless latents
    run = Run(work / "vae.pt", vae, lr=2e-3, batch=batch, total=images)
    while run.seen < images:
        rng = np.random.default_rng(run.seen)
        side = SIZE if rng.random() < 0.25 else SIZE // 2
        x = to_model(crops(data[rng.integers(0, len(data), batch if side < SIZE else batch // 4)], side, rng)).to(
            DEVICE
        )
        with torch.autocast(DEVICE, torch.bfloat16):
            mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)
            logvar = logvar.clamp(-30, 20)
            restored = vae.decode(mean + torch.randn_like(mean) * (0.5 * logvar).exp()).float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        run.step(reconstruction(restored, x) + 1e-5 * kl)
        if run.due(150):
            run.save()
            with torch.no_grad():
                x = to_model(data[torch.randint(0, len(data), (24,), generator=torch.Generator().manual_seed(1))]).to(
                    DEVICE
                )
                restored = run.average.decode(run.average.quant_conv(run.average.encoder(x)).chunk(2, 1)[0])
            print("  restored L1", F.l1_loss(restored, x).item(), flush=True)
            sheet(torch.cat([x, restored]), work / "vae.png", 12)
    run.save()


def frozen_vae(work: Path) -> AutoencoderKL:
    """The trained VAE with the latents' mean and scale folded in, so that SDXL's 0.13025 makes them unit normal."""
    vae = new_vae().to(DEVICE).eval()
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    return vae


def fold_scale(work: Path):
    data, _ = render_everything(work)
    vae = new_vae().to(DEVICE).eval()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True, map_location=DEVICE)["average"])
    with torch.no_grad():
        latents = torch.cat(
            [vae.quant_conv(vae.encoder(to_model(data[i::400]).to(DEVICE))).chunk(2, 1)[0] for i in range(20)]
        )
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        scale = 1 / (0.13025 * std)  # c
        weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
        bias[:4] -= mean
        weight[:4] *= scale.view(-1, 1, 1, 1)
        bias[:4] *= scale
        bias[4:] += 2 * scale.log()
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight /= scale.view(1, -1, 1, 1)
    save_file(vae.state_dict(), work / "vae.safetensors")


def encode_everything(work: Path) -> torch.Tensor:
    """Latents (2 n) 4 16 16 fp16 in the model's space, the pictures and their mirror images, cached in WORK."""
    cache = work / "latents.safetensors"
    if not cache.exists():
        data, _ = render_everything(work)
        vae = frozen_vae(work)
        latents = torch.empty(2 * len(data), 4, SIZE // 8, SIZE // 8, dtype=torch.float16)
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            for i in range(0, len(data), 64):
                for start, part in ((i, data[i : i + 64]), (len(data) + i, data[i : i + 64].flip(2))):
                    mean, _ = vae.quant_conv(vae.encoder(to_model(part).to(DEVICE))).chunk(2, 1)
                    latents[start : start + len(part)] = 0.13025 * mean.float()
        save_file({"latents": latents}, cache)
    return load_file(cache)["latents"]


# ---- decoder


class Critic(torch.nn.Module):
    """Tells drawings from restored ones, patch by patch; gives its feature maps, the verdicts last."""

    def __init__(self, width: int = 32):
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        self.layers = torch.nn.ModuleList(
            torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(a, b, 4, 2 if b > a else 1, 1))
            for a, b in pairwise(channels)
        )
        self.verdict = torch.nn.Conv2d(channels[-1], 1, 3, padding=1)

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            maps.append(x)
        return [*maps, self.verdict(x)]


def train_decoder(work: Path, images: int, batch: int = 8):
    """The VAE's decoder once more, against a critic: the latents, and all that was learned from them, stay as they are.

    Pixel losses alone leave an edge that a latent does not place exactly as a blur, and a look is much in its edges.
    The critic's feature maps of the drawing are to be met (arXiv 1512.09300), and its verdict to be won.
    """
    data, names = render_everything(work)
    weights = np.array([4.0 if style in SETS else 1.0 for _, style in names])
    vae = frozen_vae(work).to(memory_format=torch.channels_last).requires_grad_(False)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    critic = Critic().to(DEVICE, memory_format=torch.channels_last)
    drawing = Run(work / "decoder.pt", vae, lr=1e-3, batch=batch, total=images)
    judging = Run(work / "critic.pt", critic, lr=5e-4, batch=batch, total=images)
    while drawing.seen < images:
        rng = np.random.default_rng(drawing.seen)
        picked = rng.choice(len(data), batch, p=weights / weights.sum())
        x = to_model(data[picked].flip(2) if rng.random() < 0.5 else data[picked])
        x = x.to(DEVICE, memory_format=torch.channels_last)
        with torch.autocast(DEVICE, torch.bfloat16):
            z = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)[0]
            z = z + 0.03 * torch.randn_like(z) / 0.13025  # sampled latents are not exact either
            restored = vae.decode(z).float()
            *maps, verdict = critic(restored)
            *wanted, _ = (found.detach() for found in critic(x))
        matched = sum(F.l1_loss(one.float(), other.float()) for one, other in zip(maps, wanted, strict=True))
        drawing.step(reconstruction(restored, x) + MATCHED * matched - WON * verdict.float().mean())
        with torch.autocast(DEVICE, torch.bfloat16):
            real, fake = critic(torch.cat([x, restored.detach()]))[-1].float().chunk(2)
        judging.step(F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        if drawing.due(250):
            drawing.save()
            judging.save()
            x = to_model(data[torch.randint(0, len(data), (24,), generator=torch.Generator().manual_seed(1))])
            with torch.no_grad():
                restored = drawing.average.decode(vae.quant_conv(vae.encoder(x.to(DEVICE))).chunk(2, 1)[0])
            sheet(torch.cat([x, restored.cpu()]), work / "decoder.png", 12)
    drawing.save()
    save_file(drawing.average.to(memory_format=torch.contiguous_format).state_dict(), work / "vae.safetensors")


# ---- UNet and text encoders


class TextAndUnet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.clip = demo.DemoClip(dtype=torch.float32)
        self.clip.requires_grad_(True)
        self.model = demo.build_unet(torch.float32, "cpu")
        self.tokenizer = demo.DemoTokenizer()
        self.seen_texts = {}
        self.read_apart()

    def read_apart(self):
        """Lets the role blocks read texts of their own, where there are three of them side by side."""

        def own(third):
            def hook(layer, inputs):
                x, context, *rest = inputs
                return (x, context.chunk(3, 1)[third] if context.shape[1] > demo.TOKENS else context, *rest)

            return hook

        for name, layer in self.model.diffusion_model.named_modules():
            if isinstance(layer, SpatialTransformer):
                layer.register_forward_pre_hook(own({CONTENT_BLOCK: 0, STYLE_BLOCK: 1}.get(name, 2)))

    def initialise(self):
        initialise(self)
        unet = self.model.diffusion_model
        torch.nn.init.zeros_(unet.out[2].weight)
        for block in unet.modules():
            if hasattr(block, "out_layers"):
                torch.nn.init.zeros_(block.out_layers[3].weight)
        self.keep_look_apart()
        for text in (self.clip.clip_l, self.clip.clip_g):
            torch.nn.init.eye_(text.transformer.text_projection.weight)
            torch.nn.init.normal_(text.transformer.text_model.embeddings.position_embedding.weight, std=0.01)

    def keep_look_apart(self):
        """Leaves the style block one vector for the whole picture: no self-attention, and the same words everywhere.

        In a UNet this small the block stands next to the picture, and would draw the shape itself. Weights of 0 get
        no gradient through one another and stay 0, under a LoRA as well.
        """
        for block in self.model.diffusion_model.get_submodule(STYLE_BLOCK).transformer_blocks:
            for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k"):
                torch.nn.init.zeros_(block.get_submodule(name).weight)

    @torch.no_grad()
    def write_no_colour(self, directions: torch.Tensor):
        """Takes the directions (channels n, orthonormal) from what the content block adds to the picture's features.

        Its last layer carries no LoRA, so that a content LoRA cannot write them either.
        """
        last = self.model.diffusion_model.get_submodule(CONTENT_BLOCK).proj_out
        last.weight -= directions @ (directions.T @ last.weight)
        last.bias -= directions @ (directions.T @ last.bias)

    def tokens(self, texts):
        for text in set(texts) - set(self.seen_texts):
            self.seen_texts[text] = [token[0] for token in self.tokenizer.clip_l.tokenize_with_weights(text)[0]]
        return torch.tensor([self.seen_texts[text] for text in texts], device=next(self.parameters()).device)

    def encode(self, texts):
        """What ComfyUI's CLIPTextEncode computes, without its in-place sums, which autograd refuses."""
        tokens = self.tokens(texts)
        hidden = []
        for encoder in (self.clip.clip_l, self.clip.clip_g):
            text = encoder.transformer.text_model
            x = text.embeddings.token_embedding(tokens) + text.embeddings.position_embedding.weight
            for layer in text.encoder.layers:
                x = x + causal_attention(layer.self_attn, layer.layer_norm1(x))
                x = x + layer.mlp(layer.layer_norm2(x))
                hidden.append(x)
        pooled = text.final_layer_norm(x)[torch.arange(len(x)), (tokens == demo.END).int().argmax(1)]
        return torch.cat([hidden[1], hidden[4]], -1), encoder.transformer.text_projection(pooled)

    def read(self, texts):
        """Context and pooled vector; of each picture's text, or of its three `captions`."""
        if isinstance(texts[0], str):
            return self.encode(texts)
        (content, _), (style, _), (rest, pooled) = (self.encode(third) for third in zip(*texts, strict=True))
        return torch.cat([content, style, rest], 1), pooled

    def forward(self, x, sigma, texts):
        """Raw v-prediction for x = x0 + sigma n."""
        context, pooled = self.read(texts)
        y = self.model.encode_adm(pooled_output=pooled, width=SIZE, height=SIZE).to(context.device)
        sampling = self.model.model_sampling
        return self.model.diffusion_model(
            sampling.calculate_input(sigma, x), sampling.timestep(sigma).float(), context, y=y
        )


def causal_attention(attention, x):
    q, k, v = (
        rearrange(p(x), "n t (h d) -> n h t d", h=attention.heads)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return attention.out_proj(
        rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "n h t d -> n t (h d)")
    )


def familiar(thing: str) -> int:
    """Things of one word (cat, rocket, key) are the plainest, and are shown more often."""
    return 1 if "-" in thing else 4


def train_unet(work: Path, images: int, batch: int = 32):
    latents, (_, names) = encode_everything(work), render_everything(work)
    net = TextAndUnet()
    net.initialise()
    net.to(DEVICE).train()
    measured = work / "colour.safetensors"
    colour = load_file(measured)["directions"].to(DEVICE) if measured.exists() else None
    shares = {**dict.fromkeys(SETS, 8), **dict.fromkeys(PROCEDURAL, 2)}
    weights = np.array([familiar(thing) * shares.get(style, 10) for thing, style in names])
    run = Run(work / "unet.pt", net, lr=8e-4, batch=batch, total=images)
    while run.seen < images:
        rng, python_rng = np.random.default_rng(run.seen), random.Random(run.seen)
        picked = rng.choice(len(names), batch, p=weights / weights.sum())
        z_0 = latents[picked + len(names) * rng.integers(0, 2, batch)].float().to(DEVICE)
        texts = [captions(*names[i], python_rng.choice(names), python_rng) for i in picked]
        sigma = torch.from_numpy(np.exp(rng.normal(0, 1.3, batch))).float().clamp(0.0292, 14.6146).to(DEVICE)
        noise = torch.from_numpy(rng.standard_normal(z_0.shape, np.float32)).to(DEVICE)
        s = sigma.view(-1, 1, 1, 1)
        v = (noise - s * z_0) / (1 + s**2).sqrt()
        with torch.autocast(DEVICE, torch.bfloat16):
            predicted = net(z_0 + s * noise, sigma, texts)
        run.step(F.mse_loss(predicted.float(), v))
        if colour is not None:
            net.write_no_colour(colour)
        if run.due(500):
            run.save()
            sample_sheet(run.average, frozen_vae(work), work / "unet.png")
    run.save()
    sample_sheet(run.average, frozen_vae(work), work / "unet.png")


@torch.no_grad()
def measure_colour(work: Path, sigmas=(0.3, 1.0, 2.5), directions: int = 32):
    """The directions in which the content block's features differ most between colourings of the same drawing."""
    net = TextAndUnet().to(DEVICE).eval()
    net.load_state_dict(torch.load(work / "unet.pt", weights_only=True, map_location=DEVICE)["average"])
    features = []
    block = net.model.diffusion_model.get_submodule(CONTENT_BLOCK)
    block.register_forward_hook(lambda layer, inputs, output: features.append(output))
    vae, sets = frozen_vae(work), [pictures.EmojiSet(work / "emoji", name) for name in SETS[:3]]
    spread = torch.zeros(demo.UNET["model_channels"] * demo.UNET["channel_mult"][-1], device=DEVICE).diag()
    for thing in ("cat-face", "rocket", "red-apple", "guitar", "automobile", "house", "owl", "key", "pizza", "bell"):
        for emoji in sets:
            drawing = emoji.render(thing, SIZE)
            coloured = np.stack([np.asarray(pictures.shades(drawing, c)) for c in pictures.COLOURS.values()])
            images = to_model(torch.from_numpy(coloured)).to(DEVICE)
            z_0 = 0.13025 * vae.quant_conv(vae.encoder(images)).chunk(2, 1)[0]
            for sigma in sigmas:
                noise = torch.randn(1, *z_0.shape[1:], generator=torch.Generator().manual_seed(1)).to(DEVICE)
                net(z_0 + sigma * noise, torch.full((len(z_0),), sigma, device=DEVICE), [""] * len(z_0))
                colourings = rearrange(features.pop(), "n c h w -> n (h w) c")
                off = (colourings - colourings.mean(0)).flatten(0, 1)
                spread += off.T @ off / len(off)
    save_file(
        {"directions": torch.linalg.eigh(spread)[1][:, -directions:].cpu().contiguous()}, work / "colour.safetensors"
    )


@torch.no_grad()
def sample(net, texts, steps=20, cfg=4.0, seed=0):
    """Heun steps on a Karras schedule, in the model's latent space."""
    noise = torch.randn(len(texts), 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    ramp = torch.linspace(1, 0, steps, device=DEVICE)
    sigmas = torch.cat(
        [(0.03 ** (1 / 7) + ramp * (14.6 ** (1 / 7) - 0.03 ** (1 / 7))) ** 7, torch.zeros(1, device=DEVICE)]
    )

    def denoise(x, sigma):
        s = sigma.expand(2 * len(x))
        v = net(torch.cat([x, x]), s, list(texts) + [""] * len(x))
        cond, uncond = (torch.cat([x, x]) / (sigma**2 + 1) - v * sigma / (sigma**2 + 1).sqrt()).chunk(2)
        return uncond + cfg * (cond - uncond)

    x = noise * sigmas[0]
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = (x - denoise(x, sigma)) / sigma
        euler = x + d * (following - sigma)
        x = (
            euler
            if following == 0
            else x + (d + (euler - denoise(euler, following)) / following) / 2 * (following - sigma)
        )
    return x


def sample_sheet(net, vae, path: Path):
    things = ["cat face", "rocket", "red apple", "house", "guitar", "owl", "grinning face", "automobile"]
    styles = ["twemoji", "noto", "fluent", "emojione", "fxemoji", "blueprint", "duotone", "halftone"]
    texts = [f"{thing}, {style}" for style in styles for thing in things]
    with torch.no_grad():
        sheet(vae.decode(sample(net, texts) / 0.13025), path, len(things))


def sheet(images: torch.Tensor, path: Path, columns: int):
    save_image(make_grid(images.float().cpu() / 2 + 0.5, nrow=columns, padding=2).clamp(0, 1), path)


class Run:
    """One resumable optimisation: AdamW, a learning rate that falls to 0, an average of the weights."""

    def __init__(self, path: Path, module: torch.nn.Module, lr: float, batch: int, total: int):
        self.path, self.module, self.lr, self.batch, self.total = path, module, lr, batch, total
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = torch.optim.swa_utils.AveragedModel(module).module
        self.seen, self.losses, self.started, self.reported = 0, [], time.time(), 0
        if path.exists():
            state = torch.load(path, weights_only=True, map_location=DEVICE)
            module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.seen = state["seen"]
        self.first = self.seen

    def step(self, loss):
        rate = self.lr * min((self.seen + self.batch) / (50 * self.batch), 1 - self.seen / self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.seen += self.batch
        decay = min(0.9995, 1 - 10 / (10 + self.seen / self.batch))
        for average, p in zip(self.average.parameters(), self.module.parameters(), strict=True):
            average.data.lerp_(p.data, 1 - decay)
        self.losses.append(loss.item())

    def due(self, every: int) -> bool:
        steps = self.seen // self.batch
        if steps % 50 == 0:
            speed = (self.seen - self.first) / (time.time() - self.started)
            print(f"{self.seen:8d} images  loss {np.mean(self.losses[-50:]):.4f}  {speed:.1f} images/s", flush=True)
        return steps % every == 0

    def save(self):
        state = dict(
            module=self.module.state_dict(),
            average=self.average.state_dict(),
            optimizer=self.optimizer.state_dict(),
            seen=self.seen,
        )
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)


def export(work: Path):
    """Averaged weights in fp16 under a checkpoint's usual prefixes, and the latents' preview colours."""
    net = TextAndUnet()
    net.load_state_dict(torch.load(work / "unet.pt", weights_only=True, map_location="cpu")["average"])
    parts = {
        "unet": net.model.diffusion_model.state_dict(),
        "clip": net.clip.state_dict(),
        "vae": frozen_vae(work).state_dict(),
    }
    weights = {
        demo.PREFIXES[part] + key: value.half().cpu().contiguous()
        for part, state in parts.items()
        for key, value in state.items()
    }
    demo.WEIGHTS.parent.mkdir(exist_ok=True)
    save_file(
        weights,
        demo.WEIGHTS,
        {"format": "pt", "preview_rgb": " ".join(f"{x:.4f}" for x in preview_colours(work).flatten())},
    )


def preview_colours(work: Path) -> torch.Tensor:
    """Least squares from a latent to the mean colour of its 8 x 8 pixels: 4 rows of factors, one of bias."""
    data, _ = render_everything(work)
    latents = encode_everything(work)[: len(data)]
    colours = F.avg_pool2d(to_model(data[::50]), 8)
    z = rearrange(latents[::50].float(), "n c h w -> (n h w) c")
    z = torch.cat([z, torch.ones(len(z), 1)], 1)
    return torch.linalg.lstsq(z, rearrange(colours, "n c h w -> (n h w) c")).solution


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["tokenizer", "vae", "fold", "decoder", "unet", "colour", "export"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--images", type=int, default=100_000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.step == "tokenizer":
        train_tokenizer(args.work)
    elif args.step == "vae":
        train_vae(args.work, args.images)
        fold_scale(args.work)
    elif args.step == "fold":
        fold_scale(args.work)
    elif args.step == "decoder":
        train_decoder(args.work, args.images)
    elif args.step == "unet":
        train_unet(args.work, args.images)
    elif args.step == "colour":
        measure_colour(args.work)
    else:
        export(args.work)
