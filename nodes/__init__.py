"""The list of nodes, in the order a user meets them."""

from .demo import LoadDemoModel
from .lora import Apply, Load, Save
from .train import TrainImage, TrainStyle

NODES = [TrainImage, TrainStyle, Save, Load, Apply, LoadDemoModel]
