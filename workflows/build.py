"""Writes the workflow files, both forms of each, from the descriptions below and the texts in notes/.

    python workflows/build.py [http://127.0.0.1:8188]

asks a running ComfyUI that has this pack, at that address, which widgets and sockets every node has.
The form for a browser goes to workflows/, where ComfyUI looks for templates; the API form to workflows/api/.

The folder keeps its name although ComfyUI recommends example_workflows: every version reads and serves both alike,
pictures too (app/custom_node_manager.py, the same in 0.3.75 and 0.33), and says so in a debug log alone. Two names for
the same files would need a link, which a checkout on Windows and the registry's archive do not keep, or copies.
"""

import json
import re
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTE = "MarkdownNote"
# Of a group, and of its title on it: bright, or nobody reads that.
BLUE, BROWN, GREEN = "#6ab0de", "#d09045", "#7fc77d"
TITLE_SIZE = 28  # as large as fits between a group's edge and its nodes

# Files that a new user lacks: where they belong, and from where the frontend offers to download them.
MODELS = {
    "sd_xl_base_1.0.safetensors": (
        "checkpoints",
        "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    ),
    "clip_vision_h.safetensors": (
        "clip_vision",
        "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/clip_vision/"
        "clip_vision_h.safetensors",
    ),
}

# Space that a node takes beside its sockets and widgets, in the frontend's pixels.
TITLE, SLOT, WIDGET, GAP = 30, 20, 26, 50
HEAD = 100  # of a group, for its title and those of its first nodes, which may have a badge on top
WIDTH = 350
RESULT = 500  # the most that a picture takes on the node that shows what a workflow is for; it is not enlarged
BADGE = 24  # the pack's name on its nodes, where the frontend draws it at their lower end
CONTENTS = {"CLIPTextEncode": 90, "LoadImage": 230, "SaveImage": 320, "LossGraphNode": 230}
CONTENTS |= {"ConsisLoRACatalogLoad": 260, "ConsisLoRACatalogSave": 320}  # its report; its picture
CONTROLS = {"index": "increment"}  # how a number changes after each run, where it does
CONTENTS |= {"ConsisLoRATrainImage": 380, "ConsisLoRATrainStyle": 380}  # preview and loss while it trains
CONTENTS |= {"ConsisLoRASampler": 200, "ConsisLoRAGuider": 200}  # the pad
CONTENTS |= {"ConsisLoRALoad": 90}  # what was found in the file
CONTENTS |= {"LoadVideo": 230, "SaveVideo": 320, "SaveAnimatedWEBP": 320}
CONTENTS |= {"ConsisLoRAEvaluate": 240, "PreviewAny": 120, "PreviewImage": 300}

# What newer frontends' app mode, which hides the graph, shows of a workflow: the widgets of these nodes, by their keys,
# and the pictures of nodes of these types. A file, a text or a name is called as its node is.
STRENGTHS = ["content_guidance", "style_guidance", "content_strength", "style_strength"]
GRID = ["sweep", "content_from", "content_to", "content_steps", "style_from", "style_to", "style_steps", "seed"]
APP = {
    "base": ["ckpt_name"],
    "film": ["file"],
    **{f"{image}_image": ["image"] for image in ("content", "style", "one", "another")},
    "pairs": ["contents", "styles", "catalogue", "index"],
    **{f"{image}_lora": ["lora_name"] for image in ("content", "style")},
    "positive": ["text"],
    "sampled": [*STRENGTHS, "denoise", "variation", "seed"],
    "grid": GRID,
    "coloured": ["keep_colours"],
    "gate": ["min_content", "min_style", "max_leakage", "min_edges", "min_silhouette"],
}
CALLED_AS_THEIR_NODE = {"ckpt_name", "file", "image", "lora_name", "text"}
# To change anything: one of these inputs.
NEEDS = {"denoise": {"structure_lock", "frames"}, "variation": {"structure_lock"}}
RESULTS = {"SaveImage", "SaveVideo", "SaveAnimatedWEBP", "PreviewImage", "ConsisLoRACatalogSave"}


class From(NamedTuple):
    """The output of another node, as the value of an input; value: what its widget holds, if not the default."""

    node: str
    output: str
    value: str | int | float | None = None


class Node(NamedTuple):
    """room: width, and height beside sockets and widgets, where they are not those of its type."""

    type: str
    title: str
    inputs: dict = {}
    room: tuple[int, int] | None = None


Column = dict[str, Node]  # downwards, each node by a key that others refer to


class Group(NamedTuple):
    title: str
    colour: str
    columns: list[Column]


Workflow = list[list[Group]]  # stacks of groups, left to right


MODEL, CLIP, VAE = (From("base", output) for output in ("MODEL", "CLIP", "VAE"))
LOADED = {image: From(f"{image}_lora", "consislora") for image in ("content", "style")}


class Settings(NamedTuple):
    """What differs from one base model to the next.

    words: about it, for the notes. images: content and style. another: a second picture in the style image's style.
    film: to draw in a style.
    stage_1, stage_2: inputs of the training nodes. bounds: of Gate. encoder: for Evaluate, if there is one. recolours:
    stage 1 learns from recolourings of the image.
    """

    name: str
    words: str
    base: Node
    images: tuple[str, str]
    another: str
    film: str
    side: int
    stage_1: dict[str, float | str]
    stage_2: dict[str, float | str]
    sampling: dict
    bounds: dict[str, float]
    encoder: Node | None = None
    recolours: bool = False


class Use(NamedTuple):
    """A use of saved LoRAs.

    title: of the note. loaded, made: titles of the groups for LoRAs and picture. images: those whose LoRA is loaded.
    prompts: by the base model's name.
    """

    title: str
    loaded: str
    made: str
    images: tuple[str, ...]
    scales: dict[str, float]  # where they are not the node's defaults
    prompts: dict[str, str]
    note: str


def train_and_stylise(settings: Settings, note: str) -> Workflow:
    """Two pictures in, two LoRAs and a stylised picture out: the whole method."""
    _, style_image = settings.images
    style = Group(
        "2. The style", BLUE, [sized("style", "Style image", style_image, settings.side), latents("style", settings)]
    )
    return whole_method(settings, note, style)


def multi_reference(settings: Settings, note: str) -> Workflow:
    """The whole method with two pictures in one style: they train one style LoRA together."""
    _, style_image = settings.images
    one = sized("one", "Style image", style_image, settings.side)
    another = sized("another", "Another in this style", settings.another, settings.side)
    pictures = {"image1": From("one_sized", "IMAGE"), "image2": From("another_sized", "IMAGE")}
    together = {"style_sized": Node("ImageBatch", "Together", pictures)}
    columns = [{**one, **together}, another, latents("style", settings)]
    return whole_method(settings, note, Group("2. The style, in two pictures", BLUE, columns))


def whole_method(settings: Settings, note: str, style: Group) -> Workflow:
    content_image, _ = settings.images
    columns = [sized("content", "Content image", content_image, settings.side), latents("content", settings)]
    content = Group("1. The subject", BLUE, columns)
    return [
        [start_here(settings, note)],
        [content, style],
        [
            Group("3. Learn the subject", BROWN, learn_content(settings)),
            Group("4. Learn the style, in two stages", BROWN, learn_style(settings)),
        ],
        [Group("5. The subject in the style", GREEN, stylise(settings))],
    ]


def frames(settings: Settings, note: str) -> Workflow:
    """A film and a style image in, the film in that style out."""
    components, style_image = From("components", "images"), From("style_sized", "IMAGE")
    palettes = {"images": From("content_sized", "IMAGE"), "style_image": style_image, "together": True}
    start = {
        "matched": Node("ConsisLoRAMatchPalette", "The film in the style's palette", palettes),
        "frames_latent": encoded(From("matched", "images"), "Frames to latent"),
    }
    film = {
        "film": Node("LoadVideo", "Film", {"file": settings.film}),
        "components": Node("GetVideoComponents", "Its frames", {"video": From("film", "VIDEO")}),
        "content_sized": scaled(components, settings.side),
    }
    learned = latents("content", settings, recolourings=4)
    loras = {"content": From("content_training", "consislora"), "style": From("stage_2_training", "consislora")}
    consistent = {"latent_image": From("frames_latent", "LATENT"), "denoise": 0.8, "frames": "consistent"}
    inputs = {"model": MODEL, **loras, **sampling(settings), **consistent}
    fps = From("components", "fps")
    video = {"images": From("decoded", "IMAGE"), "fps": fps, "audio": From("components", "audio")}
    clip = {"images": From("decoded", "IMAGE"), "fps": fps, "lossless": False, "filename_prefix": "consislora_film"}
    saved = {"video": From("created", "VIDEO"), "filename_prefix": "consislora_film"}
    made = [
        {"positive": text("Prompt", BOTH), "negative": text("Negative prompt", ""), **start},
        {"sampled": Node("ConsisLoRASampler", "Sample, guided", inputs), "decoded": decoded()},
        {
            "created": Node("CreateVideo", "To film", video),
            "result": Node("SaveVideo", "The film in the style", saved),
            "clip": Node("SaveAnimatedWEBP", "The same as a picture that moves", clip),
        },
    ]
    style = [sized("style", "Style image", settings.images[1], settings.side), latents("style", settings)]
    return [
        [start_here(settings, note)],
        [Group("1. The film", BLUE, [film, learned]), Group("2. The style", BLUE, style)],
        [
            Group("3. Learn the subject, from all frames", BROWN, learn_content(settings)),
            Group("4. Learn the style, in two stages", BROWN, learn_style(settings)),
        ],
        [Group("5. The film in the style", GREEN, made)],
    ]


def train_content(settings: Settings, note: str) -> Workflow:
    """The content image in, its LoRA out."""
    columns = [sized("content", "Content image", settings.images[0], settings.side), latents("content", settings)]
    image = Group("1. The subject", BLUE, columns)
    learn = Group("2. Learn the subject", BROWN, learn_content(settings))
    return [[start_here(settings, note)], [image], [learn]]


def train_style(settings: Settings, note: str) -> Workflow:
    """The style image in, its LoRA out."""
    columns = [sized("style", "Style image", settings.images[1], settings.side), latents("style", settings)]
    image = Group("1. The style", BLUE, columns)
    learn = Group("2. Learn the style, in two stages", BROWN, learn_style(settings))
    return [[start_here(settings, note)], [image], [learn]]


def strength_grid(settings: Settings, note: str) -> Workflow:
    """Saved LoRAs in, one picture for each pair of guidances out."""
    grid = {"model": MODEL, "vae": VAE, **LOADED, **sampling(settings), "cell_size": 256}
    saved = {"images": From("grid", "grid"), "filename_prefix": "consislora_grid"}
    pictures = {
        "result": Node("SaveImage", "The grid", saved, room_for(RESULT)),
        "single": Node("PreviewImage", "Single pictures", {"images": From("grid", "images")}),
    }
    columns = [{"grid": Node("ConsisLoRAStrengthGrid", "Strength grid", grid)}, pictures]
    return [*for_saved_loras(settings, note), [Group("3. One picture for each pair of guidances", GREEN, columns)]]


def evaluate_and_gate(settings: Settings, note: str) -> Workflow:
    """Saved LoRAs in, four pictures out, split by their scores."""
    images = {image: From(f"{image}_image", "IMAGE") for image in ("content", "style")}
    shown = {
        f"{image}_image": Node("LoadImage", f"{image.title()} image", {"image": file})
        for image, file in zip(images, settings.images, strict=True)
    }
    sampled = {"model": MODEL, **LOADED, **sampling(settings)}
    scored = {"images": From("decoded", "IMAGE"), "content_image": images["content"], "style_image": images["style"]}
    if settings.encoder:
        shown["encoder"] = settings.encoder
        scored["clip_vision"] = From("encoder", "CLIP_VISION")
    gate = {"images": From("decoded", "IMAGE"), "scores": From("scored", "scores"), **settings.bounds}
    judged = {
        "scored": Node("ConsisLoRAEvaluate", "Scores", scored),
        "gate": Node("ConsisLoRAGate", "Accept or reject", gate),
        "reasons": Node("PreviewAny", "Why", {"source": From("gate", "reasons")}),
    }
    drawn = {"sampled": Node("ConsisLoRASampler", "Sample, guided", sampled), "decoded": decoded()}
    columns = [drawn, judged, {side: kept(side) for side in ("accepted", "rejected")}]
    return [
        *for_saved_loras(settings, note, count=4),
        [Group("3. To compare with", BLUE, [shown])],
        [Group("4. Four pictures, scored and split", GREEN, columns)],
    ]


def structure_lock(settings: Settings, note: str) -> Workflow:
    """Saved LoRAs and their two pictures in, the subject in the style with its own outlines out."""
    content, style = (
        sized(image, f"{image.title()} image", file, settings.side)
        for image, file in zip(("content", "style"), settings.images, strict=True)
    )
    palettes = {"images": From("content_sized", "IMAGE"), "style_image": From("style_sized", "IMAGE")}
    start = {
        "matched": Node("ConsisLoRAMatchPalette", "The subject in the style's palette", palettes),
        "content_latent": encoded(From("matched", "images")),
    }
    locked = {**sampling(settings), "latent_image": From("content_latent", "LATENT"), "structure_lock": True}
    sampled = {"sampled": Node("ConsisLoRASampler", "Sample, guided", {"model": MODEL, **LOADED, **locked})}
    first, (loaded, words) = for_saved_loras(settings, note)
    del words.columns[0]["empty"]
    return [
        first,
        [loaded, words],
        [Group("3. The same two pictures", BLUE, [{**content, **style}, start])],
        [Group("4. The subject in the style", GREEN, [sampled, shown("The subject in the style", settings)])],
    ]


def for_saved_loras(settings: Settings, note: str, count: int = 1) -> Workflow:
    """The beginning of a workflow that makes `count` pictures with both LoRAs."""
    loaded = {f"{image}_lora": load(image) for image in LOADED}
    return [
        [start_here(settings, note)],
        [
            Group("1. Subject and style", BLUE, [loaded]),
            Group("2. What the pictures show", BLUE, [asked(BOTH, settings.side, count)]),
        ],
    ]


def kept(side: str) -> Node:
    images = {"images": From("gate", side), "filename_prefix": f"consislora_{side}"}
    return Node("SaveImage", side.title(), images)


def guided(use: Use, settings: Settings) -> Workflow:
    """Saved LoRAs in, a picture out, content and style guided separately."""
    loaded = {f"{image}_lora": load(image) for image in use.images}
    loras = {image: From(f"{image}_lora", "consislora") for image in use.images}
    inputs = {"model": MODEL, **loras, **sampling(settings), **use.scales}
    sampled = {"sampled": Node("ConsisLoRASampler", "Sample, guided", inputs)}
    return [
        [start_here(settings, use.note.format(title=use.title, base=settings.words, name=settings.name))],
        [
            Group(f"1. {use.loaded}", BLUE, [loaded]),
            Group("2. What the picture shows", BLUE, [asked(use.prompts[settings.name], settings.side)]),
        ],
        [Group(f"3. {use.made}", GREEN, [sampled, shown(use.made, settings)])],
    ]


def catalogue(settings: Settings, note: str, cut_out: bool = False) -> Workflow:
    """Folders in, folders out: the whole method for every pair of a content and a style picture.

    cut_out: of content pictures with alpha only what is opaque is learned, and results get their alpha.
    """
    loras = {"content": From("content_training", "consislora"), "style": From("stage_2_training", "consislora")}
    size = {side: From("pairs", side) for side in ("width", "height")}
    saved = {"images": From("coloured", "images"), "job": From("pairs", "job"), **loras, "size": "as the photo"}
    words = {
        **asked(BOTH, settings.side),
        "empty": Node("EmptyLatentImage", "Empty, in the subject's shape", {**size, "batch_size": 1}),
    }
    sampled = Node("ConsisLoRASampler", "Sample, guided", {"model": MODEL, **loras, **sampling(settings)})
    made = {
        "decoded": decoded(),
        "coloured": Node(
            "ConsisLoRAKeepColours",
            "The product's own colours, where wanted",
            {"images": From("decoded", "IMAGE"), "content_image": From("pairs", "content")},
        ),
    }
    masked, folder = {}, {"resolution": settings.side}
    if cut_out:
        masked, folder = {"mask": From("pairs", "mask")}, folder | {"catalogue": "catalogue_cut_out"}
        kept = {"images": From("coloured", "images"), "original": From("pairs", "content"), **masked}
        made["kept"] = Node("ConsisLoRAKeepOutsideMask", "Cut out again", {**kept, "outside": "transparent"})
        saved["images"] = From("kept", "images")
    made["result"] = Node("ConsisLoRACatalogSave", "Into the catalogue", saved, room_for(RESULT))
    fitted = {"image": From("pairs", "content"), "upscale_method": "lanczos", **size}
    columns = [
        {"pairs": Node("ConsisLoRACatalogLoad", "Every subject, every style", folder)},
        {"content_sized": Node("ImageScale", "To the latent's size", fitted), **latents("content", settings)},
        {"style_sized": scaled(From("pairs", "style"), settings.side), **latents("style", settings)},
    ]
    return [
        [start_here(settings, note)],
        [Group("1. The folders", BLUE, columns)],
        [
            Group("2. Learn the subject", BROWN, learn_content(settings, **masked)[:1]),
            Group("3. Learn the style, in two stages", BROWN, learn_style(settings)[:2]),
        ],
        [Group("4. The subject in the style", GREEN, [words, {"sampled": sampled}, made])],
    ]


def start_here(settings: Settings, note: str) -> Group:
    column = {"note": Node(NOTE, "What to change first", {"": note}), "base": settings.base}
    return Group("Start here", BLUE, [column])


def sized(key: str, title: str, file: str, side: int) -> Column:
    image = Node("LoadImage", title, {"image": file})
    return {f"{key}_image": image, f"{key}_sized": scaled(From(f"{key}_image", "IMAGE"), side)}


def scaled(image: From, side: int) -> Node:
    size = {"upscale_method": "lanczos", "largest_size": side}
    return Node("ImageScaleToMaxDimension", "Scale", {"image": image, **size})


def latents(image: str, settings: Settings, **recolour: int) -> Column:
    """What trainings learn from. Beside recolourings of the style image stage 2 needs the image in its own colours."""
    sized = From(f"{image}_sized", "IMAGE")
    if not settings.recolours:
        return {f"{image}_latent": encoded(sized)}
    own = {"style_own_latent": encoded(sized, "To latent, own colours")} if image == "style" else {}
    return {
        f"{image}_recoloured": Node("ConsisLoRARecolour", "In many colours", {"image": sized, **recolour}),
        f"{image}_latent": encoded(From(f"{image}_recoloured", "images")),
        **own,
    }


def encoded(pixels: From, title: str = "To latent") -> Node:
    return Node("VAEEncode", title, {"pixels": pixels, "vae": VAE})


def learn_content(settings: Settings, **inputs: From) -> list[Column]:
    stage_1 = {**settings.stage_1, **inputs}
    training = train("ConsisLoRATrainImage", "Train on the content image", "content", "content_prompt", **stage_1)
    return [
        {"content_prompt": text("What the content image is called", "A [c]"), "content_training": training},
        {
            "content_loss": loss("Loss, content image", "content_training"),
            "content_file": save("Save the content LoRA", "content_training", "consislora/content"),
        },
    ]


def learn_style(settings: Settings) -> list[Column]:
    own = "style_own_latent" if settings.recolours else "style_latent"
    inputs = {
        "content_lora": From("style_training", "consislora"),
        "latent": From(own, "LATENT"),
        **settings.stage_2,
    }
    stage_1 = train(
        "ConsisLoRATrainImage", "Stage 1: all of the style image", "style", "style_prompt", **settings.stage_1
    )
    stage_2 = train("ConsisLoRATrainStyle", "Stage 2: its style alone", "style", "stage_2_prompt", **inputs)
    return [
        {"style_prompt": text("What the style image is called", "A [v]"), "style_training": stage_1},
        {
            "stage_2_prompt": text("What its style is called", "An image in the style of [v]"),
            "stage_2_training": stage_2,
        },
        {
            "style_loss": loss("Loss, stage 1", "style_training"),
            "stage_2_loss": loss("Loss, stage 2", "stage_2_training"),
            "style_file": save("Save the style LoRA", "stage_2_training", "consislora/style"),
        },
    ]


def stylise(settings: Settings) -> list[Column]:
    loras = {"content": From("content_training", "consislora"), "style": From("stage_2_training", "consislora")}
    sampled = Node("ConsisLoRASampler", "Sample, guided", {"model": MODEL, **loras, **sampling(settings)})
    return [asked(BOTH, settings.side), {"sampled": sampled}, shown("The subject in the style", settings)]


def asked(prompt: str, side: int, count: int = 1) -> Column:
    return {
        "positive": text("Prompt", prompt),
        "negative": text("Negative prompt", ""),
        "empty": Node("EmptyLatentImage", "Size of the picture", {"width": side, "height": side, "batch_size": count}),
    }


def sampling(settings: Settings) -> dict:
    """The inputs that every sampler has, from what is `asked`."""
    conditions = {"positive": From("positive", "CONDITIONING"), "negative": From("negative", "CONDITIONING")}
    return {**conditions, "latent_image": From("empty", "LATENT"), **settings.sampling}


def shown(title: str, settings: Settings) -> Column:
    result = {"images": From("decoded", "IMAGE"), "filename_prefix": "consislora"}
    return {"decoded": decoded(), "result": Node("SaveImage", title, result, room_for(settings.side))}


def room_for(side: int) -> tuple[int, int]:
    """The room of a node that shows a picture of this size in pixels."""
    return max(WIDTH, min(side, RESULT)), min(side, RESULT) + SLOT


def decoded() -> Node:
    return Node("VAEDecode", "To picture", {"samples": From("sampled", "LATENT"), "vae": VAE})


def text(title: str, words: str) -> Node:
    return Node("CLIPTextEncode", title, {"text": words, "clip": CLIP})


def train(type: str, title: str, image: str, prompt: str, **inputs) -> Node:
    common = {"model": MODEL, "latent": From(f"{image}_latent", "LATENT"), "positive": From(prompt, "CONDITIONING")}
    return Node(type, title, {**common, **inputs})


def loss(title: str, training: str) -> Node:
    return Node("LossGraphNode", title, {"loss": From(training, "loss_map")})


def save(title: str, training: str, filename: str) -> Node:
    return Node("ConsisLoRASave", title, {"consislora": From(training, "consislora"), "filename": filename})


def load(image: str) -> Node:
    """Loads what training saves first."""
    return Node("ConsisLoRALoad", f"{image.title()} LoRA", {"lora_name": f"consislora/{image}_00001.safetensors"})


def note(*names: str) -> str:
    """The text of notes/, with fields that `str.format` fills; a paragraph is one line.

    At the end of a line the frontend's canvas swallows the space between a marked word and the next.
    """
    text = "".join((FOLDER / "notes" / f"{name}.md").read_text(encoding="utf-8") for name in names)
    return re.sub(r"(?<!\n)\n(?!\n|- |\d+\. |$)", " ", text)


BOTH = "a [c] in the style of [v]"
USES = {
    "dual_guidance": Use(
        title="Subject and style, each guided by itself",
        loaded="Subject and style",
        made="The subject in the style",
        images=("content", "style"),
        scales={},
        prompts={"demo": BOTH, "sdxl": BOTH},
        note=note("start", "dual_guidance"),
    ),
    "content_only": Use(
        title="Your subject, the rest by prompt",
        loaded="The subject",
        made="The subject as prompted",
        images=("content",),
        scales={"style_guidance": 0.0},
        prompts={"demo": "a [c], twemoji", "sdxl": "a [c] on a beach, golden hour, photograph"},
        note=note("start", "content_only"),
    ),
    "style_only": Use(
        title="Anything in your style",
        loaded="The style",
        made="Your prompt in the style",
        images=("style",),
        scales={"content_guidance": 0.0},
        prompts={"demo": "cat face in the style of [v]", "sdxl": "a teapot in the style of [v]"},
        note=note("start", "style_only"),
    ),
}

DEMO = Settings(
    name="demo",
    words="This uses **Load Demo Model**, a tiny model that comes with the pack and knows emoji only. Pictures for "
    "it are in `custom_nodes/ComfyUI-ConsisLoRA/demo/images`. For photos open the workflow of this name that ends in "
    "*sdxl*.",
    base=Node("ConsisLoRADemoModel", "Demo model"),
    images=("crown-flat.png", "balloon-halftone.png"),
    another="cherry-blossom-halftone.png",
    film="crown-turning.mp4",
    side=256,
    recolours=True,
    stage_1={
        "preset": "quality",
        "steps": 300,
        "transition_step": 100,
        "learning_rate": 2e-3,
        "reconstruction_learning_rate": 1e-3,
    },
    stage_2={"preset": "quality", "steps": 200, "reconstruction_learning_rate": 1e-3},
    sampling={
        "steps": 20,
        "sampler_name": "dpmpp_2m",
        "scheduler": "karras",
        "cfg": 2.0,
        "content_guidance": 0.5,
        "style_guidance": 0.5,
    },
    bounds={"min_silhouette": 0.6},
)
SDXL = Settings(
    name="sdxl",
    words="**SDXL checkpoint**: choose the one that the LoRAs were trained on, or a relative of it.",
    base=Node("CheckpointLoaderSimple", "SDXL checkpoint", {"ckpt_name": "sd_xl_base_1.0.safetensors"}),
    images=("example.png", "example.png"),
    another="example.png",
    film="example.mp4",
    side=1024,
    stage_1={},  # the nodes' defaults are the paper's
    stage_2={},
    sampling={"steps": 30, "cfg": 7.5, "sampler_name": "euler", "scheduler": "normal"},
    bounds={"min_content": 0.6, "max_leakage": 0.3},
    encoder=Node("CLIPVisionLoader", "CLIP or DINOv2", {"clip_name": "clip_vision_h.safetensors"}),
)
WORKFLOWS = {
    "train_and_stylise_demo": train_and_stylise(DEMO, note("train_and_stylise_demo")),
    "train_and_stylise_sdxl": train_and_stylise(SDXL, note("train_and_stylise_sdxl")),
    "catalogue_demo": catalogue(DEMO, note("catalogue").format(base=DEMO.words)),
    "catalogue_sdxl": catalogue(SDXL, note("catalogue").format(base="First choose your **SDXL checkpoint**.")),
    "catalogue_cut_out_demo": catalogue(DEMO, note("catalogue_cut_out").format(base=DEMO.words), cut_out=True),
    "catalogue_cut_out_sdxl": catalogue(
        SDXL, note("catalogue_cut_out").format(base="First choose your **SDXL checkpoint**."), cut_out=True
    ),
    **{f"{name}_{base.name}": guided(use, base) for name, use in USES.items() for base in (DEMO, SDXL)},
    **{
        f"{make.__name__}_{base.name}": make(
            base, note(*names, make.__name__).format(title=title, base=base.words, name=base.name)
        )
        for make, title, names in (
            (train_content, "", ()),
            (train_style, "", ()),
            (multi_reference, "", ()),
            (frames, "", ()),
            (strength_grid, "Find the best guidance", ("start",)),
            (evaluate_and_gate, "Keep the good pictures", ("start",)),
            (structure_lock, "The subject in the style, in its own outlines", ("start",)),
        )
        for base in (DEMO, SDXL)
    },
}


def files(object_info: dict) -> dict[Path, str]:
    """The text of every workflow file, by its path; `object_info` is the answer of the server's /object_info."""
    made = {}
    for name, workflow in WORKFLOWS.items():
        made[FOLDER / f"{name}.json"] = json.dumps(graph_form(workflow, object_info), indent=1) + "\n"
        made[FOLDER / "api" / f"{name}.json"] = json.dumps(api_form(workflow, object_info), indent=1) + "\n"
    return made


def api_form(workflow: Workflow, object_info: dict) -> dict:
    """What ComfyUI's /prompt takes."""
    ids = numbered(workflow)
    made = {}
    for key, node in all_nodes(workflow).items():
        if node.type != NOTE:
            values = input_values(node, object_info)
            linked = {name: source(value, workflow, object_info) for name, value in values.items()}
            made[str(ids[key])] = {"inputs": linked, "class_type": node.type, "_meta": {"title": node.title}}
    return made


def source(value, workflow: Workflow, object_info: dict):
    """An input's value as the API writes it."""
    if not isinstance(value, From):
        return value
    outputs = object_info[all_nodes(workflow)[value.node].type]["output_name"]
    return [str(numbered(workflow)[value.node]), outputs.index(value.output)]


def graph_form(workflow: Workflow, object_info: dict) -> dict:
    """What the frontend saves and opens (schema version 0.4)."""
    places, groups = laid_out(workflow, object_info)
    links = all_links(workflow, object_info)
    numbers = numbered(workflow)
    shown = {key: in_app(key, node, object_info) for key, node in all_nodes(workflow).items()}
    nodes = [
        graph_node(numbers[key], node, places[key], links, shown[key], object_info)
        for key, node in all_nodes(workflow).items()
    ]
    types = {key: node.type for key, node in all_nodes(workflow).items()}
    results = RESULTS if RESULTS & set(types.values()) else {"LossGraphNode"}
    app = {
        "inputs": [[numbers[key], widget] for key in APP for widget in shown.get(key, [])],
        "outputs": [numbers[key] for key, type in types.items() if type in results],
    }
    return {
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"linearData": app},
        "version": 0.4,
    }


def in_app(key: str, node: Node, object_info: dict) -> list[str]:
    """The widgets of a node that the app mode shows; not those whose value comes through a link."""
    known = specs(node.type, object_info)
    own = [name for name in APP.get(key, []) if name in known and not isinstance(node.inputs.get(name), From)]
    return [name for name in own if acts(name, node)]


def acts(widget: str, node: Node) -> bool:
    """Whether a widget changes anything in a workflow. Guidance and strength need their LoRA."""
    image, _, what = widget.partition("_")
    needed = {image} if what and image in LOADED else NEEDS.get(widget)
    return needed is None or bool(needed & node.inputs.keys())


def graph_node(number: int, node: Node, place: list, links: list, shown: list[str], object_info: dict) -> dict:
    """shown: names of the widgets that the app mode shows."""
    x, y, width, height = place
    known = specs(node.type, object_info)
    return {
        "id": number,
        "type": node.type,
        "title": node.title,
        "pos": [x, y],
        "size": [width, height],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [
            {
                "name": name,
                "type": type,
                "link": next((link[0] for link in links if link[3:5] == [number, slot]), None),
                **({"widget": {"name": name}} if is_widget(known[name]) else {}),
            }
            for slot, (name, type) in enumerate(sockets(node, object_info).items())
        ]
        + [
            {"name": name, "label": node.title, "type": type_of(known[name]), "link": None, "widget": {"name": name}}
            for name in shown
            if name in CALLED_AS_THEIR_NODE
        ],
        "outputs": [
            {"name": name, "type": type, "links": [link[0] for link in links if link[1:3] == [number, slot]]}
            for slot, (name, type) in enumerate(outputs(node.type, object_info))
        ],
        "properties": {"Node name for S&R": node.type, **offered(node)},
        "widgets_values": widget_values(node, object_info),
    }


def offered(node: Node) -> dict:
    """What the frontend offers to download where the server lacks the node's file."""
    files = [name for name in node.inputs.values() if isinstance(name, str) and name in MODELS]
    models = [{"name": name, "directory": MODELS[name][0], "url": MODELS[name][1]} for name in files]
    return {"models": models} if models else {}


def all_nodes(workflow: Workflow) -> dict[str, Node]:
    return {
        key: node for stack in workflow for group in stack for column in group.columns for key, node in column.items()
    }


def numbered(workflow: Workflow) -> dict[str, int]:
    return {key: number for number, key in enumerate(all_nodes(workflow), 1)}


def all_links(workflow: Workflow, object_info: dict) -> list[list]:
    """[link, from node, its output, to node, its input, type] of every connection."""
    links = []
    for key, node in all_nodes(workflow).items():
        for slot, (name, type) in enumerate(sockets(node, object_info).items()):
            if name in node.inputs:
                origin, output = source(node.inputs[name], workflow, object_info)
                links.append([len(links) + 1, int(origin), output, numbered(workflow)[key], slot, type])
    return links


def specs(type: str, object_info: dict) -> dict[str, list]:
    """The inputs of a node by name, as the server describes them: [type or choices, options]."""
    if type == NOTE:
        return {"": ["STRING", {}]}
    inputs = object_info[type]["input"]
    return {**inputs.get("required", {}), **inputs.get("optional", {})}


def is_widget(spec: list) -> bool:
    forced = len(spec) > 1 and spec[1].get("forceInput")
    return not forced and (isinstance(spec[0], list) or spec[0] in WIDGETS)


def type_of(spec: list) -> str:
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def sockets(node: Node, object_info: dict) -> dict[str, str]:
    """The types of a node's inputs that are sockets, and after them of widgets whose value comes through a link."""
    known = specs(node.type, object_info)
    plain = {name: spec[0] for name, spec in known.items() if not is_widget(spec)}
    linked = {name: known[name][0] for name, value in node.inputs.items() if isinstance(value, From)}
    return plain | linked


def outputs(type: str, object_info: dict) -> list[tuple[str, str]]:
    return [] if type == NOTE else list(zip(object_info[type]["output_name"], object_info[type]["output"], strict=True))


def input_values(node: Node, object_info: dict) -> dict:
    """Every input of a node that has a value: ours, or else its default."""
    known = specs(node.type, object_info)
    assert node.inputs.keys() <= known.keys(), f"{node.type} has no input {node.inputs.keys() - known.keys()}"
    return {
        name: node.inputs[name] if name in node.inputs else default(spec)
        for name, spec in known.items()
        if name in node.inputs or is_widget(spec)
    }


def default(spec: list):
    choices, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(choices, str):
        choices = options.get("options", [])
    return options["default"] if "default" in options else choices[0]


def widget_values(node: Node, object_info: dict) -> list:
    values = []
    for name, value in input_values(node, object_info).items():
        spec = specs(node.type, object_info)[name]
        if is_widget(spec):
            values.append(held(value, spec))
            values += [CONTROLS.get(name, "fixed")] * bool(spec[1:] and spec[1].get("control_after_generate"))
            uploads = spec[1:] and (spec[1].get("image_upload") or spec[1].get("video_upload"))
            values += ["image"] * bool(uploads)
    return values


def held(value, spec: list):
    """What a widget holds, which a link overrides."""
    if isinstance(value, From):
        return default(spec) if value.value is None else value.value
    return value


def laid_out(workflow: Workflow, object_info: dict) -> tuple[dict[str, list], list[dict]]:
    """[x, y, width, height] of every node by key, and the groups drawn around them."""
    places, groups, left = {}, [], 0
    for stack in workflow:
        top, right = 0, left
        for group in stack:
            inside = placed(group, left, top, object_info)
            x, y = (max(place[i] + place[i + 2] for place in inside.values()) + GAP // 2 for i in (0, 1))
            box = [left - GAP // 2, top - HEAD, x - left + GAP // 2, y - top + HEAD]
            look = {"color": group.colour, "font_size": TITLE_SIZE}
            groups.append({"id": len(groups) + 1, "title": group.title, "bounding": box, **look})
            places |= inside
            top, right = y + GAP + HEAD, max(right, x)
        left = right + 2 * GAP
    return places, groups


def placed(group: Group, left: int, top: int, object_info: dict) -> dict[str, list]:
    places, x = {}, left
    for column in group.columns:
        y, width = top, max(node.room[0] if node.room else WIDTH for node in column.values())
        for key, node in column.items():
            height = node_height(node, object_info)
            places[key] = [x, y, width, height]
            y += height + TITLE + GAP // 2
        x += width + GAP
    return places


def node_height(node: Node, object_info: dict) -> int:
    slots = max(len(sockets(node, object_info)), len(outputs(node.type, object_info)))
    return SLOT * slots + WIDGET * len(widget_values(node, object_info)) + room_below(node) + 10


def room_below(node: Node) -> int:
    """The height of what a node shows beside its sockets and widgets."""
    if node.type == NOTE:
        return 20 + 37 * len(node.inputs[""]) // 100  # of the size in which newer frontends write
    badge = BADGE if node.type.startswith("ConsisLoRA") else 0
    return node.room[1] if node.room else CONTENTS.get(node.type, badge)


def write(files: Callable[[dict], dict[Path, str]]) -> None:
    """Writes the files that a generator makes from what a running ComfyUI says of its nodes."""
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8188"
    with urllib.request.urlopen(f"{address}/object_info") as answer:
        object_info = json.load(answer)
    for path, text in files(object_info).items():
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    write(files)
