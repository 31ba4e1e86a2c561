"""The list of nodes, in the order a user meets them."""

from .catalog import CatalogLoad, CatalogSave
from .demo import LoadDemoModel
from .evaluate import Evaluate, Gate
from .guide import Guider, Sampler, StrengthGrid
from .lora import Apply, Load, Save
from .sign import SaveSigned
from .train import TrainImage, TrainImages, TrainStyle

NODES = [
    TrainImage,
    TrainStyle,
    TrainImages,
    Save,
    Load,
    Apply,
    Guider,
    Sampler,
    StrengthGrid,
    Evaluate,
    Gate,
    SaveSigned,
    CatalogLoad,
    CatalogSave,
    LoadDemoModel,
]
