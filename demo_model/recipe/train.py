"""The recipe of the demo base model: one command, that goes on where it was stopped.

    python demo_model/recipe/train.py WORK --minutes 9

renders the drawings, trains the VAE, encodes pictures with it, trains UNet and text encoders, then the VAE's decoder
once more, and writes demo_model/weights. The minutes are shares of one clock, which counts earlier runs too; they are
meant for an H100, and a CPU gets less far in them. COMFYUI_PATH names the ComfyUI whose classes are used.

WORK/emoji keeps the drawings' sets, WORK/state all that a run on another machine needs to go on, in files of at most
15 MiB: copy it there. Sample sheets lie beside them. The rest of WORK is made again where it is missing.

    python demo_model/recipe/train.py WORK --tokenizer     # once, when prompts or drawings have changed
    python demo_model/recipe/train.py WORK --export        # only writes demo_model/weights from WORK/state
    python demo_model/recipe/train.py WORK --further       # begins a fresh clock with demo_model/weights
    python demo_model/recipe/train.py WORK --decoder       # so too, and only the VAE's decoder learns: same latents
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [os.environ["COMFYUI_PATH"], str(ROOT / "demo_model"), str(ROOT)]

import comfy.cli_args
import torch

comfy.cli_args.args.cpu = not torch.cuda.is_available()
comfy.cli_args.args.use_pytorch_cross_attention = True

import model as demo
import torch.nn.functional as F
from einops import rearrange
from recipe import autoencoder, diffusion, pool, texts
from recipe.drawings import HELD_OUT, ICON_SETS, TRAIN_SETS, fetch_sets
from recipe.run import Clock, load_shards, save_checkpoint, save_shards
from safetensors.torch import load_file, save_file

UNTIL = {"autoencoder": 0.25, "unet": 0.92, "decoder": 0.985}  # shares of the time at which the stages end


def main(args: argparse.Namespace) -> None:
    work, state = args.work, args.work / "state"
    state.mkdir(parents=True, exist_ok=True)
    fetch_sets(work / "emoji", [*TRAIN_SETS, *ICON_SETS])
    size = pool.Size(args.subjects, args.icons, args.repainted)
    if args.tokenizer:
        drawings = size.drawings(work / "emoji")
        held_out = [name.replace("-", " ") for name in HELD_OUT * 20]
        return texts.train_tokenizer(pool.sample_texts(drawings, 30_000) + held_out)
    if args.prepare:
        return pool.prepare(work, size, os.cpu_count())
    if args.compile:
        return diffusion.compile_step(args.batch)
    if (args.further or args.decoder) and not (state / "clock.json").exists():
        begin_with_weights(state, vae_is_done=args.decoder)
    if not args.export:
        learn(args, work, state, size)
    export(state, pool.Pool(work, size, "cpu"))


def learn(args: argparse.Namespace, work: Path, state: Path, size: pool.Size) -> None:
    clock = Clock(state, args.minutes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = device == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.set_flush_denormal(True)  # tiny averages otherwise slow a CPU down many times
    torch.manual_seed(int(clock.seconds()))
    if compiled and not args.decoder:
        subprocess.Popen([sys.executable, *sys.argv, "--compile"])
    without_cuda = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # it forks
    subprocess.run([sys.executable, *sys.argv, "--prepare"], check=True, env=without_cuda)
    print(f"{clock.seconds():6.0f} s  drawings and prompts are ready", flush=True)
    pictures = pool.Pool(work, size, device)
    if not (state / "vae-0.safetensors").exists():
        autoencoder.train("autoencoder", pictures, clock, state, UNTIL["autoencoder"], args.batch // 6)
    if clock.share() < UNTIL["unet"] and not args.decoder:
        vae = autoencoder.frozen_vae(state, device)
        latents = encoded(work, pictures, vae, args.batch)
        print(f"{clock.seconds():6.0f} s  latents of {len(latents)} pictures are ready", flush=True)
        diffusion.train(pictures, latents, vae, clock, state, UNTIL["unet"], args.batch, compiled)
    autoencoder.train("decoder", pictures, clock, state, UNTIL["decoder"], args.batch // 6)


def begin_with_weights(state: Path, vae_is_done: bool) -> None:
    """Makes checkpoints of the shipped weights: UNet and text encoders learn further, and the VAE if it is not done."""
    weights = load_file(demo.WEIGHTS)
    places = {"unet": "base.diffusion_model.", "clip": "clip.", "vae": ""}
    for stage, parts in (("autoencoder", ["vae"]), ("unet", ["unet", "clip"])):
        learned = {
            places[part] + key.removeprefix(demo.PREFIXES[part]): value
            for part in parts
            for key, value in weights.items()
            if key.startswith(demo.PREFIXES[part])
        }
        if stage == "autoencoder" and vae_is_done:
            save_shards(state, "vae", learned)
            continue
        average = {key: value.clone() for key, value in learned.items()}  # a file takes no tensor twice
        save_checkpoint(state, stage, learned, average, begun=None)


def encoded(work: Path, pictures: pool.Pool, vae, batch: int) -> torch.Tensor:
    file = work / "latents.safetensors"
    if not file.exists():
        latents = autoencoder.encode_everything(pictures, vae, batch)
        save_file({"latents": latents}, file)
    return load_file(file, device=pictures.device)["latents"]


def export(state: Path, pictures: pool.Pool) -> None:
    """Averaged weights in fp16 under a checkpoint's usual prefixes, and the latents' preview colours."""
    net, vae = diffusion.TextAndUnet("cpu"), autoencoder.frozen_vae(state, "cpu")
    kept = load_shards(state, "unet")
    if not kept:
        sys.exit(f"{state} holds no UNet, so {demo.WEIGHTS} stays as it is.")
    net.load_state_dict(
        {key.removeprefix("average/"): value for key, value in kept.items() if key.startswith("average/")}, strict=False
    )
    parts = {"unet": net.unet.state_dict(), "clip": net.clip.state_dict(), "vae": vae.state_dict()}
    weights = {
        demo.PREFIXES[part] + key: value.half().contiguous()
        for part, tensors in parts.items()
        for key, value in tensors.items()
    }
    preview = " ".join(f"{x:.4f}" for x in preview_colours(pictures, vae).flatten())
    demo.WEIGHTS.parent.mkdir(exist_ok=True)
    save_file(weights, demo.WEIGHTS, {"format": "pt", "preview_rgb": preview})
    print(f"{demo.WEIGHTS}: {demo.WEIGHTS.stat().st_size / 1e6:.1f} MB", flush=True)


@torch.no_grad()
def preview_colours(pictures: pool.Pool, vae, count: int = 64) -> torch.Tensor:
    """Least squares from a latent to the mean colour of its 8 x 8 pixels: 4 rows of factors, one of bias."""
    x = pictures.pictures(pictures.draw(count).tolist())
    z = rearrange(autoencoder.encode(vae, x), "n c h w -> (n h w) c")
    z = torch.cat([z, torch.ones(len(z), 1)], 1)
    return torch.linalg.lstsq(z, rearrange(F.avg_pool2d(x, 8), "n c h w -> (n h w) c")).solution


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--batch", type=int, default=384 if torch.cuda.is_available() else 24)
    parser.add_argument("--subjects", type=int, default=1000, help="emoji to learn, each in every set")
    parser.add_argument("--icons", type=int, default=2500, help="icons of each set")
    parser.add_argument("--repainted", type=int, default=160_000, help="pictures beside the drawings as they are")
    parser.add_argument("--tokenizer", action="store_true", help="trains the tokenizer, and nothing else")
    parser.add_argument("--export", action="store_true", help="writes the weights, and trains nothing")
    parser.add_argument("--prepare", action="store_true", help="renders and reads prompts, and trains nothing")
    parser.add_argument("--further", action="store_true", help="begins with the shipped weights")
    parser.add_argument("--decoder", action="store_true", help="begins with the shipped weights; UNet and latents stay")
    parser.add_argument("--compile", action="store_true", help="fills inductor's cache, and trains nothing")
    main(parser.parse_args())
