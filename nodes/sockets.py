"""The socket types: what travels between our nodes and ComfyUI's. And how nodes are found."""

from comfy_api.latest import io

CATEGORY = "ConsisLoRA"

ConsisLora = io.Custom("CONSISLORA")  # consislora_core.lora_file.ImageLora
CatalogJob = io.Custom("CONSISLORA_JOB")  # nodes.catalog.CatalogJob
PictureScores = io.Custom("CONSISLORA_SCORES")  # consislora_core.metrics.Scores
LoraModel = io.Custom("LORA_MODEL")  # ComfyUI's own: LoRA tensors by key
LossMap = io.Custom("LOSS_MAP")  # ComfyUI's own: {"loss": [float, ...]}


def aliases(*words: str) -> dict[str, list[str]]:
    """For a schema: other words under which a node is found, where ComfyUI knows such (newer than 0.3.75)."""
    return {"search_aliases": list(words)} if "search_aliases" in io.Schema.__dataclass_fields__ else {}
