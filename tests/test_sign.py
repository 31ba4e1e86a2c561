"""Content Credentials: what a picture says of its making is signed, and a change is found out."""

import datetime
import json
import sys
from io import BytesIO
from types import SimpleNamespace

import c2pa
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

RECORD = {"3": {"style": {"weights": "1a2b", "permission": "trained with permission"}, "style_strength": 1.0}}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for signing pictures, by an authority of our own, and its key: two PEM files."""
    folder = tmp_path_factory.mktemp("certificate")
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority, signer = (
        x509.Name(
            [
                x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "ConsisLoRA tests"),
                x509.NameAttribute(x509.NameOID.COMMON_NAME, name),
            ]
        )
        for name in ("authority", "signer")
    )
    usage = dict.fromkeys(
        ["content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"], False
    )
    usage |= {"encipher_only": False, "decipher_only": False}
    now = datetime.datetime.now(datetime.timezone.utc)

    def issued(subject, public_key, is_authority):
        builder = x509.CertificateBuilder(authority, subject, public_key, x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        signs = x509.KeyUsage(digital_signature=not is_authority, key_cert_sign=is_authority, **usage)
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), True).add_extension(signs, True)
        if not is_authority:
            purpose = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
            issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
            builder = builder.add_extension(purpose, True).add_extension(issuer, False)
        return builder.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    chain = issued(signer, key.public_key(), False) + issued(authority, authority_key.public_key(), True)
    (folder / "chain.pem").write_bytes(chain)
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(pem)
    return folder


@pytest.fixture
def sign(pack, certificate, monkeypatch):
    monkeypatch.setenv(pack.nodes.sign.CERTIFICATE, str(certificate / "chain.pem"))
    monkeypatch.setenv(pack.nodes.sign.KEY, str(certificate / "key.pem"))
    return pack.nodes.sign


def saved(pack, sign, monkeypatch, **changes):
    """The two files that the node saves of two pictures."""
    hidden = SimpleNamespace(prompt={"1": {}}, extra_pnginfo={"workflow": {}, "consislora": RECORD})
    monkeypatch.setattr(sign.SaveSigned, "hidden", hidden, raising=False)
    inputs = {"filename_prefix": "a/signed", "algorithm": "es256", **changes}
    output = sign.SaveSigned.execute(torch.rand(2, 64, 64, 3), **inputs)
    folder = pack.host.paths.output_folder()
    return [folder / one["subfolder"] / one["filename"] for one in output.ui.as_dict()["images"]]


def read(content: bytes) -> tuple[str, dict]:
    with c2pa.Reader("image/png", BytesIO(content)) as reader:
        return reader.get_validation_state(), reader.get_active_manifest()


def test_saved_pictures_are_signed_and_tell_what_made_them(pack, sign, monkeypatch):
    for file in saved(pack, sign, monkeypatch):
        state, manifest = read(file.read_bytes())
        assertions = {assertion["label"]: assertion["data"] for assertion in manifest["assertions"]}
        assert state == "Valid"
        assert assertions["io.github.consislora"] == RECORD
        assert assertions["c2pa.actions.v2"]["actions"][0]["digitalSourceType"].endswith("trainedAlgorithmicMedia")
        with Image.open(file) as picture:
            assert json.loads(picture.text["consislora"]) == RECORD and "workflow" in picture.text


def test_a_picture_that_was_changed_afterwards_is_found_out(pack, sign, monkeypatch):
    content = bytearray(saved(pack, sign, monkeypatch)[0].read_bytes())
    content[-20] ^= 1
    assert read(bytes(content))[0] == "Invalid"


def test_a_number_that_another_server_takes_while_signing_is_left_to_it(pack, sign, monkeypatch):
    def slow(unsigned, record, title, algorithm):
        if not taken:
            taken.append(pack.host.paths.output_folder() / "race" / title)
            taken[0].write_bytes(b"of another server")
        return signed(unsigned, record, title, algorithm)

    signed, taken = sign.sign_png, []
    monkeypatch.setattr(sign, "sign_png", slow)
    files = saved(pack, sign, monkeypatch, filename_prefix="race/x")
    assert [file.name for file in files] == ["x_00002_.png", "x_00003_.png"]
    assert taken[0].read_bytes() == b"of another server"
    assert [read(file.read_bytes())[1]["title"] for file in files] == [file.name for file in files]


def test_with_disable_metadata_only_the_making_by_a_model_is_signed(pack, sign, monkeypatch):
    monkeypatch.setattr(pack.host.prompt_graph.args, "disable_metadata", True)
    for file in saved(pack, sign, monkeypatch):
        assert read(file.read_bytes())[0] == "Valid"
        assert b"1a2b" not in file.read_bytes() and not Image.open(file).text


@pytest.mark.parametrize("half", ["\ud83d", "\0"])
def test_what_no_name_can_have_becomes_an_underscore(pack, sign, monkeypatch, half):
    assert saved(pack, sign, monkeypatch, filename_prefix=f"half {half}")[0].name.startswith("half __0")


@pytest.mark.parametrize("prefix", ["../x", "/x", "a/../../x"])
def test_a_prefix_that_leads_out_of_the_output_folder_is_refused(pack, sign, monkeypatch, prefix):
    with pytest.raises(ValueError, match="^filename_prefix '.*x' leads out of ComfyUI's output folder"):
        saved(pack, sign, monkeypatch, filename_prefix=prefix)


@pytest.mark.parametrize("prefix", ["", "  "])
def test_an_emptied_prefix_is_refused(pack, sign, monkeypatch, prefix):
    with pytest.raises(ValueError, match="filename_prefix is empty"):
        saved(pack, sign, monkeypatch, filename_prefix=prefix)


def test_a_name_that_the_disk_refuses_is_reported(pack, sign, monkeypatch):
    with pytest.raises(ValueError, match="could not be saved under filename_prefix 'x+: File name too long"):
        saved(pack, sign, monkeypatch, filename_prefix="x" * 400)


def test_what_is_missing_is_named(pack, sign, monkeypatch):
    with pytest.raises(ValueError, match="could not be signed: .*algorithm is the key's"):
        saved(pack, sign, monkeypatch, algorithm="ps256")
    monkeypatch.delenv(sign.KEY)
    with pytest.raises(ValueError, match="set CONSISLORA_C2PA_KEY in .* the private key; now it is ''"):
        saved(pack, sign, monkeypatch)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(ValueError, match="pip install c2pa-python"):
        saved(pack, sign, monkeypatch)
