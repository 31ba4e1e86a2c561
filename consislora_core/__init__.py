"""ConsisLoRA (arXiv 2503.10614): content and style of one image, learned as two small LoRAs of an SDXL UNet."""

__version__ = "0.1.0"
