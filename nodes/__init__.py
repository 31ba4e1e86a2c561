"""The list of nodes, in the order a user meets them."""

from .catalogue import CatalogLoad, CatalogSave
from .demo import LoadDemoModel
from .evaluate import Evaluate, Gate
from .guide import Guider, Sampler
from .keep_colours import KeepColours
from .lora import Apply, Load, Save
from .recolour import Recolour
from .sign import SaveSigned
from .strength_grid import StrengthGrid
from .train import TrainImage, TrainImages, TrainStyle

NODES = [
    Recolour,
    TrainImage,
    TrainStyle,
    TrainImages,
    Save,
    Load,
    Apply,
    Guider,
    Sampler,
    StrengthGrid,
    KeepColours,
    Evaluate,
    Gate,
    SaveSigned,
    CatalogLoad,
    CatalogSave,
    LoadDemoModel,
]
