"""ConsisLoRA (arXiv 2503.10614): content and style of one image, learned as two small LoRAs of an SDXL UNet."""

__version__ = "0.2.0"

# Raise this whenever the same inputs train to other numbers than before, here or in host/: the store then trains anew
# what an earlier version has trained. tests/test_method_version.py fails when the numbers move.
METHOD_VERSION = 1
