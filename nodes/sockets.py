"""The socket types: what travels between our nodes and ComfyUI's."""

from comfy_api.latest import io

CATEGORY = "ConsisLoRA"

ConsisLora = io.Custom("CONSISLORA")  # consislora_core.lora_file.ImageLora
CatalogJob = io.Custom("CONSISLORA_JOB")  # nodes.catalog.CatalogJob
PictureScores = io.Custom("CONSISLORA_SCORES")  # consislora_core.metrics.Scores
LoraModel = io.Custom("LORA_MODEL")  # ComfyUI's own: LoRA tensors by key
LossMap = io.Custom("LOSS_MAP")  # ComfyUI's own: {"loss": [float, ...]}
