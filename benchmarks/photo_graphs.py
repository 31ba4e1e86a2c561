"""The contenders of photos.py and their workflows, in ComfyUI's API form."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from catalogue.api_form import Workflow
from catalogue.sheets import Job
from consislora_core.schedule import DRAFT, FAST, PAPER, QUALITY

Link = list  # node id and output

SAMPLED = "a [c] in the style of [v]"
RECOLOURINGS = 24
FIXED = {"rank": 64, "seed": 0}  # of all trainings


class Recipe(NamedTuple):
    """How a contender trains. Steps and rates are those of the nodes before the preset acts on them.

    style_steps: of stage 2; without it the style part is stage 1's. recolourings: of each image, for stage 1.
    style_preset: of style images, if not as of content images. locked: drawn with structure_lock, in the style's
    palette.
    """

    label: str
    preset: str = PAPER
    recolourings: int = 0
    steps: int = 1500
    transition_step: int = 500
    rates: tuple[float, float] = (2e-4, 1e-4)
    style_steps: int = 1000
    style_preset: str = ""
    locked: bool = False

    @property
    def training(self) -> "Recipe":
        """Without what its LoRAs do not depend on."""
        return self._replace(label="", locked=False)

    @property
    def presets(self) -> tuple[str, str]:
        """Of content images, and of style images."""
        return self.preset, self.style_preset or self.preset


PLAIN = "plain"
VAE = "vae"  # in place of a contender: the content images, encoded and decoded
CONTENDERS = {
    "paper": Recipe("ConsisLoRA, as in the paper"),
    "quality": Recipe("preset quality (Muon), recolourings", QUALITY, RECOLOURINGS),
    "fast": Recipe("preset fast, recolourings", FAST, RECOLOURINGS),
    "both": Recipe("content by quality, style by fast", QUALITY, RECOLOURINGS, style_preset=FAST),
    "draft": Recipe("preset draft, recolourings", DRAFT, RECOLOURINGS),
    "muon": Recipe("preset quality alone", QUALITY),
    "recolourings": Recipe("paper with recolourings", PAPER, RECOLOURINGS),
    "b-lora": Recipe("B-LoRA", steps=1000, transition_step=1000, rates=(5e-5, 5e-5), style_steps=0),
    PLAIN: Recipe("plain LoRA: ComfyUI's Train LoRA", steps=1000, style_steps=0),
}
CONTENDERS |= {
    f"{name} locked": CONTENDERS[name]._replace(label=f"{name}, structure lock in the style's palette", locked=True)
    for name in ("both", "fast")
}
USUAL = ("paper", "both", "both locked", "fast", "fast locked", "b-lora", PLAIN)


class Task(NamedTuple):
    """A picture to make: of a pair or, without a style image, of a content image alone."""

    contender: str
    content: Path
    style: Path | None
    seed: int

    @property
    def name(self) -> str:
        pair = self.content.stem + (f"__{self.style.stem}" if self.style else "")
        return f"{self.contender}/{pair}_{self.seed}"

    @property
    def job(self) -> Job:
        """As `Batch` takes it."""
        content, style = (f"{path.parent.name}/{path.name}" for path in (self.content, self.style or self.content))
        return Job(content, style, self.name)


class Plan(NamedTuple):
    contenders: list[str]
    contents: list[Path]
    styles: list[Path]
    seeds: int

    def own(self, contender: str) -> list[Task]:
        """The pictures of content images alone; those of the same LoRAs without the lock are not made twice."""
        if contender != VAE and CONTENDERS[contender].locked:
            return []
        seeds = range(self.seeds if contender != VAE else 1)
        return [Task(contender, content, None, seed) for content in self.contents for seed in seeds]

    def pairs(self, contender: str) -> list[Task]:
        return [
            Task(contender, content, style, seed)
            for content in self.contents
            for style in self.styles
            for seed in range(self.seeds)
        ]

    def tasks(self, contender: str) -> list[Task]:
        return self.own(contender) + (self.pairs(contender) if contender != VAE else [])


class Base(NamedTuple):
    """A base model, and what suits it. rate: times the paper's learning rates."""

    loader: dict
    side: int
    rate: float
    sampler_name: str
    scheduler: str
    steps: int
    cfg: float


def sdxl(checkpoint: str) -> Base:
    """With the sampling of the pack's SDXL workflows."""
    loader = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}}
    return Base(loader, 1024, 1.0, "euler", "normal", 30, 7.5)


DEMO = Base({"class_type": "ConsisLoRADemoModel", "inputs": {}}, 256, 10.0, "dpmpp_2m", "karras", 20, 2.0)


class Encoders(NamedTuple):
    """The loaders of both networks."""

    clip: dict
    dino: dict


def listed_encoders(clip: str, dino: str) -> Encoders:
    return Encoders(*({"class_type": "CLIPVisionLoader", "inputs": {"clip_name": name}} for name in (clip, dino)))


TINY_ENCODERS = Encoders(*({"class_type": "TinyVision", "inputs": {"kind": kind}} for kind in ("clip", "dinov2")))


class Graphs:
    """Makes the workflows. info: of all nodes, as the server's /object_info has it. scale: of all training steps."""

    def __init__(self, info: dict, base: Base, encoders: Encoders, scale: float):
        self.info, self.base, self.encoders, self.scale = info, base, encoders, scale

    def every(self, contenders: list[str]) -> Iterator[Workflow]:
        """One of each kind, to be checked before anything is made, without pictures that are not uploaded yet."""
        yield self.through_vae()
        for recipe in (CONTENDERS[name] for name in contenders):
            yield self.pair(recipe, 0)
            if recipe is CONTENDERS[PLAIN]:
                training, _ = self.plain_training(recipe, "", "")
                yield {name: node for name, node in training.items() if node["class_type"] != "LoadImage"}

    def pair(self, recipe: Recipe, seed: int) -> Workflow:
        """The content image of Load Catalogue in the style of its style image."""
        graph = Graph(self.info, self.base.loader)
        pair = graph.add("ConsisLoRACatalogLoad")
        of_content, of_style = recipe.presets
        content = self._stage_1(graph, recipe, of_content, [pair, 0], "A [c]")
        style = self._stage_1(graph, recipe, of_style, [pair, 1], "A [v]")
        if recipe.style_steps:
            rate = {"reconstruction_learning_rate": recipe.rates[1] * self.base.rate}
            style = graph.add(
                "ConsisLoRATrainStyle", **FIXED, **rate, model=graph.model, latent=graph.encoded([pair, 1]),
                positive=graph.text("An image in the style of [v]"), content_lora=[style, 0],
                steps=self.scaled(recipe.style_steps), preset=of_style,
            )  # fmt: skip
        drawn = {"content": [content, 0], "style": [style, 0]}
        if recipe.locked:
            matched = graph.add("ConsisLoRAMatchPalette", images=[pair, 0], style_image=[pair, 1])
            drawn |= {"latent_image": graph.encoded([matched, 0]), "structure_lock": True}
        return self._scored(graph, pair, self._drawn(graph, SAMPLED, seed, **drawn))

    def own_picture(self, recipe: Recipe, seed: int) -> Workflow:
        """The content image drawn again by both parts of its own LoRA, with the prompt and the cfg of its training."""
        graph = Graph(self.info, self.base.loader)
        pair = graph.add("ConsisLoRACatalogLoad")
        lora = [self._stage_1(graph, recipe, recipe.preset, [pair, 0], "A [c]"), 0]
        return self._saved(graph, pair, self._drawn(graph, "A [c]", seed, content=lora, style=lora, cfg=1.0))

    def through_vae(self) -> Workflow:
        graph = Graph(self.info, self.base.loader)
        pair = graph.add("ConsisLoRACatalogLoad")
        return self._saved(graph, pair, graph.decoded(graph.encoded([pair, 0])))

    def plain_training(self, recipe: Recipe, image: str, prompt: str) -> tuple[Workflow, str]:
        """ComfyUI's own training on an uploaded image, at its node's own settings, and the name of its file."""
        graph = Graph(self.info, self.base.loader)
        latent = graph.encoded([graph.add("LoadImage", image=image), 0])
        # Given one latent alone it fails in ComfyUI 0.3.75; with two it still trains on one of them a step.
        twice = graph.add("RepeatLatentBatch", samples=latent, amount=2)
        latents = graph.add("RebatchLatents", latents=[twice, 0], batch_size=1)
        training = graph.add(
            "TrainLoraNode", model=graph.model, latents=[latents, 0], positive=graph.text(prompt),
            steps=self.scaled(recipe.steps), existing_lora="[None]",
        )  # fmt: skip
        name = f"photos_{hashlib.sha256(json.dumps(graph.nodes).encode()).hexdigest()[:16]}"
        output = self.info["TrainLoraNode"]["output"].index("LORA_MODEL")
        graph.add("SaveLoRA", lora=[training, output], prefix=f"loras/{name}")
        return graph.nodes, name

    def plain_pair(self, content: str, style: str, seed: int) -> Workflow:
        """As `pair`, with the files of two plain LoRAs."""
        graph = Graph(self.info, self.base.loader)
        pair = graph.add("ConsisLoRACatalogLoad")
        return self._scored(graph, pair, self._drawn_plain(graph, SAMPLED, seed, content, style))

    def plain_own_picture(self, content: str, seed: int) -> Workflow:
        graph = Graph(self.info, self.base.loader)
        pair = graph.add("ConsisLoRACatalogLoad")
        return self._saved(graph, pair, self._drawn_plain(graph, "A [c]", seed, content, cfg=1.0))

    def scaled(self, steps: int) -> int:
        return steps and max(1, round(self.scale * steps))

    def _stage_1(self, graph: "Graph", recipe: Recipe, preset: str, image: Link, prompt: str) -> str:
        if recipe.recolourings:
            image = [graph.add("ConsisLoRARecolour", image=image, recolourings=recipe.recolourings), 0]
        steps = self.scaled(recipe.steps)
        transition_step = min(steps, round(self.scale * recipe.transition_step))
        early, late = (rate * self.base.rate for rate in recipe.rates)
        return graph.add(
            "ConsisLoRATrainImage", **FIXED, model=graph.model, latent=graph.encoded(image),
            positive=graph.text(prompt), steps=steps, transition_step=transition_step, preset=preset,
            learning_rate=early, reconstruction_learning_rate=late,
        )  # fmt: skip

    def _sampling(self, graph: "Graph", prompt: str, seed: int, **changes) -> dict:
        base = self.base
        settings = dict(steps=base.steps, sampler_name=base.sampler_name, scheduler=base.scheduler, cfg=base.cfg)
        texts = {"positive": graph.text(prompt), "negative": graph.text("")}
        if "latent_image" not in changes:
            empty = graph.add("EmptyLatentImage", width=base.side, height=base.side, batch_size=1)
            changes["latent_image"] = [empty, 0]
        return {**settings, **texts, "seed": seed, "denoise": 1.0, **changes}

    def _drawn(self, graph: "Graph", prompt: str, seed: int, **changes) -> Link:
        """Without guidance, as in the paper's comparison."""
        unguided = {"content_guidance": 0.0, "style_guidance": 0.0}
        sampling = self._sampling(graph, prompt, seed, **unguided, **changes)
        return graph.decoded([graph.add("ConsisLoRASampler", model=graph.model, **sampling), 0])

    def _drawn_plain(self, graph: "Graph", prompt: str, seed: int, *loras: str, **changes) -> Link:
        model = graph.model
        for name in loras:
            model = [graph.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0), 0]
        sampling = self._sampling(graph, prompt, seed, **changes)
        return graph.decoded([graph.add("KSampler", model=model, **sampling), 0])

    def _scored(self, graph: "Graph", pair: str, picture: Link) -> Workflow:
        reports = []
        for loader in self.encoders:
            scores = graph.add(
                "ConsisLoRAEvaluate", images=picture, content_image=[pair, 0], style_image=[pair, 1],
                clip_vision=[graph.put(loader), 0],
            )  # fmt: skip
            reports.append([scores, 2])
        both = graph.add("StringConcatenate", string_a=reports[0], string_b=reports[1], delimiter=",")
        return self._saved(graph, pair, picture, report=[both, 0])

    def _saved(self, graph: "Graph", pair: str, picture: Link, **inputs) -> Workflow:
        graph.add("ConsisLoRACatalogSave", images=picture, job=[pair, 2], **inputs)
        return graph.nodes


class Graph:
    """A workflow that grows node by node."""

    def __init__(self, info: dict, loader: dict):
        self.info, self.nodes = info, {}
        base = self.put(loader)
        self.model, self.clip, self.vae = ([base, output] for output in range(3))

    def put(self, node: dict) -> str:
        self.nodes[str(len(self.nodes) + 1)] = node
        return str(len(self.nodes))

    def add(self, kind: str, **inputs) -> str:
        """The id of a new node, whose other required inputs are at the server's own defaults.

        Raises ValueError if the server lacks that node.
        """
        if kind not in self.info:
            raise ValueError(f"The server has no node {kind}. Install the pack it is from, or update it.")
        required = self.info[kind]["input"].get("required", {})
        defaults = {name: default_of(spec) for name, spec in required.items() if name not in inputs}
        return self.put({"class_type": kind, "inputs": {**defaults, **inputs}})

    def text(self, text: str) -> Link:
        return [self.add("CLIPTextEncode", text=text, clip=self.clip), 0]

    def encoded(self, image: Link) -> Link:
        return [self.add("VAEEncode", pixels=image, vae=self.vae), 0]

    def decoded(self, latent: Link) -> Link:
        return [self.add("VAEDecode", samples=latent, vae=self.vae), 0]


def default_of(spec: list):
    """The default of a widget in /object_info."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    choices = kind if isinstance(kind, list) else options.get("options")
    return options["default"] if "default" in options else choices[0]
