"""Train ConsisLoRA: one image to a content part and a style part, then the style part again."""

from comfy_api.latest import io

from ..consislora_core import lora_file
from ..consislora_core.schedule import PRESETS, image_stage, style_stage
from ..host.model_inputs import check_weights
from ..host.progress import loss_curve
from ..host.training_key import TrainingRequest
from ..host.training_model import MEMORY, PRECISIONS
from ..host.training_run import train, train_each
from .sockets import CATEGORY, ConsisLora, LoraModel, LossMap, aliases
from .widget_values import checked

RANK = io.Int.Input(
    "rank",
    default=64,
    min=1,
    max=1024,
    tooltip="Size of the LoRA. 64 is the paper's; 16 to 32 make smaller files that hold less detail.",
)
SEED = io.Int.Input(
    "seed",
    default=0,
    min=0,
    max=2**64 - 1,
    control_after_generate=False,
    tooltip="Fixes the first weights and all noise: the same seed and inputs train the same LoRA.",
)
PRECISION = io.Combo.Input(
    "precision",
    options=["auto", *PRECISIONS],
    default="auto",
    tooltip="What the model computes in; LoRA weights are always fp32. "
    "auto: what the model samples in, but bf16 or fp32 instead of fp16.",
)
MEMORY_CHOICE = io.Combo.Input(
    "memory",
    options=list(MEMORY),
    default=MEMORY[0],
    optional=True,
    tooltip="fast keeps all activations of a step; lean recomputes part of them in the backward pass, which takes less "
    "memory and some more time. Both give the same LoRA. auto: fast where it fits; the log says which.",
)
PRESET = io.Combo.Input(
    "preset",
    options=list(PRESETS),
    default=PRESETS[0],
    optional=True,
    tooltip="paper: the schedule as set here. quality: stage 1 learns by the optimizer Muon instead of AdamW, and "
    "the learning rate falls to 0 towards the end. fast: quality in a fifth of the steps, of 1500 enough for "
    "a style image; a content image then needs structure_lock. draft: in a sixteenth, to try prompts and strengths.",
)
MASK = io.Mask.Input(
    "mask",
    optional=True,
    tooltip="Only what is inside (1) is learned, such as the product without the table, or a style image without its "
    "watermark. One for all images, or one for each. Load Catalogue and Remove Background give such masks; behind the "
    "one of Load Image, which is 1 where a picture is transparent, put Invert Mask.",
)
OUTPUTS = [
    ConsisLora.Output(display_name="consislora", tooltip="The trained content and style parts."),
    LossMap.Output(display_name="loss_map", tooltip="The loss of every step, for Plot Loss Graph."),
    LoraModel.Output(
        display_name="lora_model", tooltip="The same LoRA for ComfyUI's own Save LoRA and Load LoRA Model nodes."
    ),
]


def learning_rate(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=1e-7, max=1.0, step=1e-7, round=False, tooltip=tooltip)


class TrainImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRATrainImage",
            display_name="Train ConsisLoRA (image)",
            category=CATEGORY,
            **aliases("train lora", "b-lora", "style transfer"),
            description="Learns one image as a content LoRA and a style LoRA (stage 1 of ConsisLoRA). "
            "Use it for the content image, and as the first step for the style image.",
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model. It is only read: after training it is as it was."),
                io.Latent.Input(
                    "latent",
                    tooltip="The image, from VAE Encode. 1024 x 1024 pixels suit SDXL; other sizes and shapes work.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip='The prompt: "A [c]" for a content image, "A [v]" for a style image.'
                ),
                io.Int.Input("steps", default=1500, min=1, max=100_000, tooltip="Training steps in all."),
                io.Int.Input(
                    "transition_step",
                    default=500,
                    min=0,
                    max=100_000,
                    tooltip="From this step on the loss compares the x0 prediction (the restored image) instead of "
                    "noise. 0: always; equal to steps, the maximum: never (B-LoRA).",
                ),
                learning_rate("learning_rate", 2e-4, "Learning rate before the transition."),
                learning_rate("reconstruction_learning_rate", 1e-4, "Learning rate after the transition."),
                RANK,
                SEED,
                PRECISION,
                MEMORY_CHOICE,
                PRESET,
                MASK,
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls, model, latent, positive, steps, transition_step, learning_rate, reconstruction_learning_rate, rank, seed,
        precision, memory=MEMORY[0], preset=PRESETS[0], mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        rates = learning_rate, reconstruction_learning_rate
        stage = image_stage(steps, transition_step, *rates, preset, rank=rank, seed=seed)
        request = TrainingRequest.from_inputs(model, latent, positive, stage, precision, mask=mask)
        return trained_output(request, memory, cls.hidden)


class TrainStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRATrainStyle",
            display_name="Train ConsisLoRA (style, stage 2)",
            category=CATEGORY,
            **aliases("train style lora", "b-lora", "style transfer"),
            description="Learns the style of an image again, while its frozen content LoRA from stage 1 "
            "accounts for the content.",
            inputs=[
                io.Model.Input("model", tooltip="The SDXL model that stage 1 was trained on."),
                io.Latent.Input("latent", tooltip="The style image, from VAE Encode, in its own colours."),
                io.Conditioning.Input("positive", tooltip='The prompt: "An image in the style of [v]".'),
                ConsisLora.Input(
                    "content_lora", tooltip="What stage 1 learned from this style image. Its content part is frozen."
                ),
                io.Int.Input("steps", default=1000, min=1, max=100_000, tooltip="Training steps."),
                learning_rate("reconstruction_learning_rate", 1e-4, "Learning rate."),
                io.Float.Input(
                    "noise_offset",
                    default=0.03,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Moves whole channels of the noise a little, "
                    "so that overall brightness and colour are learned too.",
                ),
                RANK,
                SEED,
                PRECISION,
                MEMORY_CHOICE,
                PRESET,
                MASK,
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls, model, latent, positive, content_lora, steps, reconstruction_learning_rate, noise_offset, rank, seed,
        precision, memory=MEMORY[0], preset=PRESETS[0], mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        check_weights(content_lora, "content_lora")
        frozen = {"content": content_lora.part("content")}
        stage = style_stage(steps, reconstruction_learning_rate, noise_offset, preset, rank=rank, seed=seed)
        request = TrainingRequest.from_inputs(model, latent, positive, stage, precision, frozen, mask)
        return trained_output(request, memory, cls.hidden)


class TrainImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        single = TrainImage.define_schema()
        latent = io.Latent.Input(
            "latent", tooltip="The images, from VAE Encode, in one batch: all of one size. Each gets a LoRA of its own."
        )
        at_once = io.Int.Input(
            "at_once",
            default=4,
            min=1,
            max=64,
            tooltip="How many images train side by side. More go faster together, and take more memory.",
        )
        return io.Schema(
            node_id="ConsisLoRATrainImages",
            display_name="Train ConsisLoRA (each image)",
            category=CATEGORY,
            **aliases("train lora", "batch training"),
            description="Learns each image of a batch as a content LoRA and a style LoRA of its own, several at once. "
            "The LoRAs are the same as those of Train ConsisLoRA (image), and neither node trains again what the other "
            "has trained.",
            inputs=[latent if shared.id == "latent" else shared for shared in single.inputs[:-3]]
            + [at_once, MEMORY_CHOICE, PRESET, MASK],
            outputs=[
                ConsisLora.Output(
                    display_name="consislora", is_output_list=True, tooltip="The LoRAs, in the order of the images."
                )
            ],
            hidden=single.hidden,
        )

    @classmethod
    @checked
    def execute(
        cls, model, latent, positive, steps, transition_step, learning_rate, reconstruction_learning_rate, rank, seed,
        precision, at_once, memory=MEMORY[0], preset=PRESETS[0], mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        rates = learning_rate, reconstruction_learning_rate
        stage = image_stage(steps, transition_step, *rates, preset, rank=rank, seed=seed)
        request = TrainingRequest.from_inputs(model, latent, positive, stage, precision, mask=mask)
        return io.NodeOutput(train_each(request, memory, at_once, cls.hidden))


def trained_output(request: TrainingRequest, memory: str, hidden: io.HiddenHolder | None) -> io.NodeOutput:
    """The outputs of a node that trains one LoRA, and its loss curve."""
    trained = train(request, memory, hidden)
    caption = "trained before" if trained.from_store else None
    curve = loss_curve(request.stage, trained.losses, caption=caption)
    lora_model = lora_file.to_state_dict(trained.lora)
    return io.NodeOutput(trained.lora, {"loss": trained.losses}, lora_model, ui={"consislora_loss": [curve]})
