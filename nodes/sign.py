"""Save pictures with signed Content Credentials (C2PA): that a model made them, and with which LoRAs."""

import json
import os
from functools import partial
from io import BytesIO
from pathlib import Path

from comfy_api.latest import io, ui

from ..consislora_core import __version__
from ..consislora_core.files import escape_text, write_file, write_numbered
from ..host import drawing, provenance
from ..host.model_inputs import check_pictures
from ..host.paths import new_picture_paths, output_folder
from ..host.picture_files import Metadata, text_chunks
from ..host.prompt_graph import workflow_texts
from ..host.xmp import TRAINED_MODEL
from .sockets import CATEGORY, aliases
from .widget_values import checked

# Named in the environment, because workflows are shared, and a key must not be.
CERTIFICATE, KEY = "CONSISLORA_C2PA_CERTIFICATE", "CONSISLORA_C2PA_KEY"
CREATED = {"action": "c2pa.created", "digitalSourceType": TRAINED_MODEL}


class SaveSigned(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRASaveSigned",
            display_name="Save Signed Image",
            category=CATEGORY,
            **aliases("c2pa", "content credentials", "watermark", "save image"),
            description="Saves pictures as PNG with signed Content Credentials (C2PA): that a model made them, "
            "with which LoRAs, and what was stated of rights. Needs the package c2pa-python and a certificate.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures to save."),
                io.String.Input(
                    "filename_prefix", default="consislora", tooltip="Beginning of the name, as in Save Image."
                ),
                io.Combo.Input(
                    "algorithm",
                    options=["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"],
                    default="es256",
                    tooltip="What the certificate's key signs with: es is for EC keys, ps for RSA.",
                ),
            ],
            hidden=provenance.HIDDEN,
        )

    @classmethod
    @checked
    def execute(cls, images, filename_prefix, algorithm) -> io.NodeOutput:
        check_pictures(images, "images")
        texts = workflow_texts(cls.hidden)
        record = provenance.recorded(cls.hidden)
        saved = []
        for image in images:
            unsigned = BytesIO()
            drawing.to_picture(image).save(unsigned, "png", pnginfo=text_chunks(Metadata(texts, None)))
            # Without metadata, as with ComfyUI's option, the signature tells no more than the picture.
            write = partial(write_signed, unsigned.getvalue(), record if texts else {}, algorithm)
            try:
                path = write_numbered(new_picture_paths(filename_prefix, image.shape[1], image.shape[0]), write)
            except OSError as error:
                reason = escape_text(error.strerror or str(error))
                raise ValueError(
                    f"The picture could not be saved under filename_prefix {filename_prefix!r:.100}: {reason}. "
                    "Free some space, or give another name."
                ) from error
            subfolder = path.parent.relative_to(output_folder()).as_posix()
            saved.append(ui.SavedResult(path.name, "" if subfolder == "." else subfolder, io.FolderType.output))
        return io.NodeOutput(ui=ui.SavedImages(saved))


def write_signed(unsigned: bytes, record: dict, algorithm: str, path: Path) -> None:
    """Signs a PNG and writes it. Raises FileExistsError for a file that is there, and ValueError as `sign_png`."""
    file = sign_png(BytesIO(unsigned), record, escape_text(path.name), algorithm)
    write_file(path, file, new=True)


def sign_png(file: BytesIO, record: dict, title: str, algorithm: str) -> bytes:
    """A PNG with Content Credentials. Raises ValueError if package, certificate or key are missing or wrong."""
    try:
        import c2pa
    except ImportError:
        raise ValueError(
            "c2pa-python is missing. In ComfyUI's Python: pip install c2pa-python. Then restart."
        ) from None
    manifest = {
        "claim_generator_info": [{"name": "ComfyUI-ConsisLoRA", "version": __version__}],
        "title": title,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [CREATED]}},
            {"label": "io.github.consislora", "data": json.loads(json.dumps(record))},
        ],
    }
    result = BytesIO()
    info = c2pa.C2paSignerInfo(algorithm.encode(), read_pem(CERTIFICATE), read_pem(KEY), None)
    try:
        with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest) as builder:
            builder.sign(signer, "image/png", file, result)
    except c2pa.C2paError as error:
        raise ValueError(
            f"The picture could not be signed: {error}. Check that {CERTIFICATE} holds the chain, the signer's own "
            f"certificate first, that {KEY} is its key, and that algorithm is the key's."
        ) from error
    return result.getvalue()


def read_pem(variable: str) -> bytes:
    """The content of the file that a variable of the environment names. Raises ValueError if there is none."""
    named = os.environ.get(variable, "")
    if not os.path.isfile(named):
        raise ValueError(
            f"To sign, set {variable} in ComfyUI's environment to a PEM file with "
            f"{'the certificate chain' if variable == CERTIFICATE else 'the private key'}; now it is {named!r}."
        )
    return Path(named).read_bytes()
