"""The list of nodes, in the order a user meets them."""

from .catalogue import CatalogLoad
from .colours import KeepColours, MatchPalette
from .demo import LoadDemoModel
from .evaluate import Evaluate, Gate
from .guide import Guider, Sampler
from .keep_outside import KeepOutsideMask
from .lora import Apply, Load, Save
from .recolour import Recolour
from .save_catalogue import CatalogSave
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
    MatchPalette,
    StrengthGrid,
    KeepColours,
    Evaluate,
    Gate,
    KeepOutsideMask,
    SaveSigned,
    CatalogLoad,
    CatalogSave,
    LoadDemoModel,
]
