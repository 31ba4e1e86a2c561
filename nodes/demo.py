"""The small base model that comes with the pack."""

from comfy_api.latest import io

from .sockets import CATEGORY, aliases


class LoadDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRADemoModel",
            display_name="Load Demo Model",
            category=CATEGORY,
            **aliases("tiny model", "test model"),
            description="A tiny model of SDXL's architecture that draws emoji at 256 x 256 pixels. "
            "To try every workflow on any computer; it is not for real work.",
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="To train on and to sample from."),
                io.Clip.Output(tooltip="For CLIP Text Encode; it knows the names of emoji."),
                io.Vae.Output(tooltip="For VAE Encode and VAE Decode."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..demo_model import model

        return io.NodeOutput(*model.load())
