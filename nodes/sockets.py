"""The socket types: what travels between our nodes and ComfyUI's. And what all our schemas share."""

from comfy_api.latest import io

CATEGORY = "ConsisLoRA"

ConsisLora = io.Custom("CONSISLORA")  # consislora_core.lora_file.ImageLora
CatalogJob = io.Custom("CONSISLORA_JOB")  # catalogue.plan.CatalogueJob
PictureScores = io.Custom("CONSISLORA_SCORES")  # consislora_core.metrics.Scores
LoraModel = io.Custom("LORA_MODEL")  # ComfyUI's own: LoRA tensors by key
LossMap = io.Custom("LOSS_MAP")  # ComfyUI's own: {"loss": [float, ...]}


def aliases(*words: str) -> dict[str, list[str]]:
    """For a schema: other words by which a search finds the node, where ComfyUI has such (newer than 0.3.75)."""
    return {"search_aliases": list(words)} if "search_aliases" in io.Schema.__dataclass_fields__ else {}
