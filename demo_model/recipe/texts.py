"""The prompts the demo model learns from, as texts and as tokens, and the tokenizer that reads them."""

import json
import random
from functools import cache
from pathlib import Path

import model as demo

STYLE_WORDS = {"noto-v1": "noto v1", "fluent-emoji-flat": "fluent"}


def words(name: str) -> str:
    return STYLE_WORDS.get(name, name).replace("-", " ")


def caption(subject: str, style: str, rng: random.Random, must_name: str = "") -> str:
    """One prompt, 10 % of them empty for classifier-free guidance.

    must_name: "content" or "style", the half that has to be in it.
    """
    subject, style = words(subject), words(style)
    prompts = {
        f"{subject}, {style}": 25,
        f"a {subject} in the style of {style}": 30,
        f"a {subject}": 8,
        f"an image in the style of {style}": 8,
        f"a [c] in the style of {style}": 7,
        f"a {subject} in the style of [v]": 6,
        rng.choice(["a [c]", "a [v]"]): 6,
        "": 10,
    }
    needed = {"content": subject, "style": style}.get(must_name, "")
    prompts = {prompt: weight for prompt, weight in prompts.items() if needed in prompt}
    return rng.choices(list(prompts), list(prompts.values()))[0]


def captions(
    subject: str, style: str, own_colours: bool, elsewhere: tuple[str, str], rng: random.Random
) -> tuple[str, str, str]:
    """What the content block reads, the style block, and the rest of the UNet.

    In four of five pictures the role blocks read prompts apart. The content block reads of a style that is not the
    picture's and the style block of a subject that is not, so that the one learns shape and the other style, which in
    SDXL came of itself. own_colours: the subject decides the colours, so the style block reads it.
    """
    if rng.random() < 1 / 5:
        return (caption(subject, style, rng),) * 3
    other_subject, other_style = elsewhere
    content = rng.choice([f"a {words(subject)}", caption(subject, other_style, rng, must_name="content")])
    manner = rng.choice(
        [
            f"an image in the style of {words(style)}",
            caption(subject if own_colours else other_subject, style, rng, must_name="style"),
        ]
    )
    return content, manner, rng.choice(["", "a [c] in the style of [v]"])


class Reader:
    """Token ids of a text, as ComfyUI's tokenizer gives them; each word is looked up once."""

    def __init__(self):
        self.tokenizer = demo.DemoTokenizer().clip_l

    @cache  # noqa: B019 - there is one reader a run
    def word(self, word: str) -> list[int]:
        return [token[0] for token in self.tokenizer.tokenize_with_weights(word)[0] if token[0] < demo.START]

    def tokens(self, text: str) -> list[int]:
        ids = [token for word in text.split() for token in self.word(word)][: demo.TOKENS - 2]
        return [demo.START, *ids, *[demo.END] * (demo.TOKENS - 1 - len(ids))]


def train_tokenizer(texts: list[str], folder: Path = demo.TOKENIZER) -> None:
    """A byte-level BPE in CLIP's file format, so that ComfyUI's tokenizer class reads it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=demo.VOCABULARY * 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    room = demo.VOCABULARY - 2 - 2 * len(alphabet)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]][:room]
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in merges]
    tokens += [f"<|unused{i}|>" for i in range(demo.VOCABULARY - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    special = dict(
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    config = {**special, "do_lower_case": True, "model_max_length": demo.TOKENS, "tokenizer_class": "CLIPTokenizer"}
    folder.mkdir(exist_ok=True)
    files = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        "special_tokens_map.json": json.dumps(special, indent=1),
        "tokenizer_config.json": json.dumps(config, indent=1),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
