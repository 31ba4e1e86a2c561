"""The trainers that training.py and memory.py measure, and a UNet of SDXL's shape for each."""

import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from benchmarks.common import ROOT

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
SDXL_UNET = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=320, channel_mult=[1, 2, 4], num_res_blocks=[2, 2, 2],
    transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], context_dim=2048, adm_in_channels=2816,
    num_classes="sequential", use_spatial_transformer=True, use_linear_in_transformer=True,
    use_temporal_attention=False, legacy=False,
)  # fmt: skip


class Size(NamedTuple):
    """The sizes of a UNet with SDXL's layers, of the latent and of the LoRA."""

    channels: int  # of the first level
    side: int  # of the latent
    rank: int
    dtype: str  # of the weights and the computation


SIZES = {
    "sdxl": Size(320, 128, 64, "bfloat16"),
    "narrow": Size(96, 64, 64, "float32"),  # about 1 GB: 304 million parameters instead of 2567
    "growing": Size(64, 16, 16, "float32"),
}


@contextmanager
def host(device: str) -> Iterator[ModuleType]:
    """The pack in a ComfyUI of its own."""
    sys.path.append(str(ROOT / "tests"))
    from in_process import load_comfy, load_pack

    with tempfile.TemporaryDirectory() as base:
        load_comfy(Path(base), cpu=device == "cpu")
        yield load_pack()


def random_model(size: Size, device: str):
    """A MODEL of random weights. Call in inference mode, as a loader node would."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    torch.manual_seed(0)
    config = comfy.supported_models.SDXL(dict(SDXL_UNET, model_channels=size.channels))
    config.set_inference_dtype(getattr(torch, size.dtype), torch.float32)
    with torch.device(device):
        model = config.get_model({})
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), torch.device("cpu"))


def diffusers_unet(size: Size):
    """A UNet of SDXL's shape with LoRA in the two role blocks."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    widths = [size.channels, 2 * size.channels, 4 * size.channels]
    unet = UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=[width // 64 for width in widths],
        cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, use_linear_projection=True,
    ).requires_grad_(False)  # fmt: skip
    layers = r"up_blocks\.0\.attentions\.[01]\..*\.(to_q|to_k|to_v|to_out\.0)"
    unet.add_adapter(LoraConfig(r=size.rank, lora_alpha=size.rank, init_lora_weights="gaussian", target_modules=layers))
    return unet


def plain_unet(size: Size, device: str):
    """A diffusers UNet on the device in the size's precision, its LoRA in fp32."""
    import torch

    unet = diffusers_unet(size).to(device, getattr(torch, size.dtype))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return unet


def plain_recipe(unet, size: Size, steps: int, device: str) -> None:
    """The loop of the published scripts: frozen weights in the precision, LoRA in fp32, autocast, AdamW."""
    import torch

    side, dtype = size.side, getattr(torch, size.dtype)
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=2e-4, weight_decay=1e-4)
    z_0, text, pooled = (torch.randn(shape, device=device) for shape in ((1, 4, side, side), (1, 77, 2048), (1, 1280)))
    conditions = {"text_embeds": pooled.to(dtype), "time_ids": torch.full((1, 6), 8.0 * side, device=device)}
    alpha_bar = torch.linspace(0.999, 0.005, 1000, device=device)
    for _ in range(steps):
        noise, t = torch.randn_like(z_0), torch.randint(0, 1000, (1,), device=device)
        z_t = alpha_bar[t].sqrt() * z_0 + (1 - alpha_bar[t]).sqrt() * noise
        with torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext():
            n_hat = unet(z_t.to(dtype), t, text.to(dtype), added_cond_kwargs=conditions).sample
        loss = torch.nn.functional.mse_loss(n_hat.float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.detach().item()  # for the log


def fast(pack, model, latent, positive, steps, rank, precision, memory="fast", preset="paper"):
    """ConsisLoRATrainImage."""
    pack.nodes.train.TrainImage.execute(
        model, latent, positive, steps=steps, transition_step=0, learning_rate=2e-4,
        reconstruction_learning_rate=1e-4, rank=rank, seed=0, precision=precision, memory=memory, preset=preset,
    )  # fmt: skip


def lean(*inputs):
    fast(*inputs, memory="lean")


def muon(*inputs):
    fast(*inputs, preset="quality")


def train_lora_node(pack, model, latent, positive, steps, rank, precision):
    """TrainLoraNode with the same rank and precision, else its defaults."""
    from comfy_extras.nodes_train import TrainLoraNode

    inputs = dict(
        model=model, positive=positive, steps=steps, rank=rank, seed=0, training_dtype=precision, lora_dtype="fp32",
        batch_size=1, grad_accumulation_steps=1, learning_rate=2e-4, optimizer="AdamW", loss_function="MSE",
        algorithm="LoRA", gradient_checkpointing=True, existing_lora="[None]",
    )  # fmt: skip
    # Given one latent alone it fails in ComfyUI 0.3.75; with two it still trains on one of them a step.
    TrainLoraNode.execute(latents=[latent, latent], **{name: [value] for name, value in inputs.items()})


TRAINERS = {"fast": fast, "Muon": muon, "lean": lean, "TrainLoraNode": train_lora_node}


def random_inputs(side: int, images: int = 1):
    """A latent and the conditioning of a prompt, both random."""
    import torch

    torch.manual_seed(0)
    positive = [[torch.randn(1, 77, 2048), {"pooled_output": torch.randn(1, 1280)}]]
    return {"samples": torch.randn(images, 4, side, side)}, positive


@contextmanager
def peak_growth(device: str = "cpu", pid: int | None = None) -> Iterator[list[int]]:
    """The growth in bytes of memory from its start to its peak; on a CPU sampled every 2 ms.

    pid: of the process whose memory it is, on a CPU; without one this process.
    """
    growth = [0]
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield growth
        growth[0] = torch.cuda.max_memory_allocated() - start
        return
    import psutil

    process, over = psutil.Process(pid), threading.Event()
    start = process.memory_info().rss

    def watch():
        while not over.wait(0.002):
            growth[0] = max(growth[0], process.memory_info().rss - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield growth
    finally:
        over.set()
        watcher.join()


@contextmanager
def saved_for_backward() -> Iterator[dict[int, int]]:
    """The storages that autograd saves for backward: size in bytes by address."""
    import torch

    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved
