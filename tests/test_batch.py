"""The job sheet's way through a server that refuses, forgets, hangs up and comes back."""

import asyncio
import copy
import datetime
import io
import itertools
import json
import os
import random
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from conftest import COMFYUI, ROOT
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from filelock import FileLock
from PIL import Image
from prompts import api, two_steps
from test_resume import check_every_file_is_whole

import batch.comfy_client
from batch import run
from batch.comfy_client import ComfyClient, Denied, Refused, Unreachable, WorkflowError, headers_in
from batch.fill_workflow import fill_workflow, lora_problems, server_problems, value_problems
from batch.job_runner import JobRunner, Order, made_by
from batch.scheduler import Scheduler, WorkerLost
from catalogue.pictures import open_picture
from catalogue.sheets import RESULTS, Job, Result, ResultsSheet
from demo.run import IMAGES, nodes
from demo.server import ComfyServer

WORKFLOW = json.loads((ROOT / "workflows" / "api" / "catalogue_demo.json").read_text(encoding="utf-8"))
JOB = Job("cup.png", "ink.png", "cup", prompt="a [c] cup", seed=7, content_strength=0.5)


def fill(**changes) -> dict:
    return fill_workflow(WORKFLOW, Job(**{**vars(JOB), **changes}), "a.png", "b.png", "batch/jobs", {})[0]


def inputs(workflow: dict, kind: str) -> dict:
    (node,) = nodes(workflow, kind)
    return workflow[node]["inputs"]


# A job in the workflow


def test_a_job_fills_the_workflow_and_leaves_the_rest(monkeypatch):
    before = copy.deepcopy(WORKFLOW)
    made = fill()
    sampler, load = inputs(made, "ConsisLoRASampler"), inputs(made, "ConsisLoRACatalogLoad")
    assert (sampler["seed"], sampler["content_strength"], sampler["style_strength"]) == (7, 0.5, 1.0)
    assert made[sampler["positive"][0]]["inputs"]["text"] == "a [c] cup"
    assert {node["inputs"]["seed"] for node in made.values() if "rank" in node["inputs"]} == {0}
    assert (load["contents"], load["styles"]) == ("consislora_batch/a.png", "consislora_batch/b.png")
    assert before == WORKFLOW


def test_a_job_says_how_far_its_colours_are_kept_and_else_they_are_the_styles():
    assert inputs(fill(keep_colours=0.75), "ConsisLoRAKeepColours")["keep_colours"] == 0.75
    assert inputs(fill(), "ConsisLoRAKeepColours")["keep_colours"] == 0


def test_an_adapter_takes_the_place_of_its_training():
    made = fill(content_lora="cup.safetensors")
    sampler, save = inputs(made, "ConsisLoRASampler"), inputs(made, "ConsisLoRACatalogSave")
    assert sampler["content"] == save["content"] == ["content_lora", 0]
    assert made["content_lora"] == {"class_type": "ConsisLoRALoad", "inputs": {"lora_name": "cup.safetensors"}}
    assert len(nodes(made, "ConsisLoRATrainImage")) == 1  # of the style image
    assert nodes(fill(content_lora="c", style_lora="s"), "ConsisLoRATrainImage") == []


def test_what_a_job_says_of_its_picture_goes_into_its_xmp_and_its_name_is_its_title():
    save = inputs(fill(), "ConsisLoRACatalogSave")
    assert (save["title"], save["creator"], save["rights"]) == ("cup", "", "")
    save = inputs(fill(title="The cup", creator="A. Smith", rights="\u00a9 Shop"), "ConsisLoRACatalogSave")
    assert (save["title"], save["creator"], save["rights"]) == ("The cup", "A. Smith", "\u00a9 Shop")


def test_options_say_how_results_are_saved():
    options = run.parse(["jobs.csv", "--format", "TIFF", "--bits", "16"])
    workflow = run.read_workflow(run.WORKFLOWS / "catalogue_demo.json", None, run.saving(options))
    save = inputs(workflow, "ConsisLoRACatalogSave")
    assert (save["format"], save["bits"], save["size"]) == ("TIFF", "16", "as the photo")


def test_a_job_has_a_key_of_its_own():
    changes = [{}, {"seed": 8}, {"style_lora": "s"}, {"prompt": "x"}, {"name": "other"}, {"rights": "A"}]
    keys = [inputs(fill(**change), "ConsisLoRACatalogLoad")["name"] for change in changes]
    assert len(set(keys)) == 5 and keys[4] == keys[0]  # the name decides nothing


def test_an_adapter_that_was_replaced_under_its_name_makes_another_job():
    job = Job("a.png", "b.png", content_lora="cup.safetensors")

    def key(weights: str) -> str:
        return fill_workflow(WORKFLOW, job, "a", "b", "", {"cup.safetensors": {"consislora.weights": weights}})[1]

    assert key("1a") == key("1a") != key("2b")


def test_a_workflow_that_lacks_what_a_job_needs_is_refused():
    with pytest.raises(ValueError, match="has 0 nodes of the kind ConsisLoRACatalogLoad"):
        fill_workflow({}, JOB, "", "", "", {})
    bare = {node: content for node, content in WORKFLOW.items() if content["class_type"] != "ConsisLoRASampler"}
    with pytest.raises(ValueError, match="no node of the workflow takes content_strength"):
        fill_workflow(bare, JOB, "", "", "", {})


def test_a_prompt_that_no_text_node_would_get_is_refused():
    between = copy.deepcopy(WORKFLOW)
    sampler = inputs(between, "ConsisLoRASampler")
    between["control"] = {"class_type": "ControlNetApply", "inputs": {"conditioning": sampler["positive"]}}
    sampler["positive"] = ["control", 0]
    with pytest.raises(ValueError, match="column prompt.*positive comes from ControlNetApply, which has no text"):
        fill_workflow(between, JOB, "", "", "", {})


def test_what_the_server_would_not_take_is_reported():
    spec = {"required": {"seed": ["INT", {"min": 0, "max": 9}], "scheduler": [["normal"], {}], "model": ["MODEL"]}}
    newer = {"required": {"lora_name": ["COMBO", {"options": ["a/x.safetensors", "y.safetensors"]}]}}
    info = {"Sampler": {"input": spec}, "Load": {"input": newer}}
    workflow = {
        "1": {"class_type": "Sampler", "inputs": {"seed": 10, "scheduler": "karras", "model": ["2", 0]}},
        "2": {"class_type": "Load", "inputs": {"lora_name": "x.safetensors"}},
        "3": {"class_type": "Gone", "inputs": {}},
    }
    assert list(server_problems(workflow, info)) == [
        "seed of Sampler is 10; it must be from 0 to 9.",
        "scheduler of Sampler is 'karras', which the server does not have. It has normal.",
        "lora_name of Load is 'x.safetensors', which the server does not have. It has a/x.safetensors.",
        "the server has no node Gone. Install the pack it is from, or update it.",
    ]


@pytest.mark.parametrize(("kind", "value"), [("INT", None), ("INT", "many"), ("FLOAT", "1,5"), ("INT", float("inf"))])
def test_a_workflow_with_what_is_no_number_is_reported(kind, value):
    assert list(value_problems("steps", value, kind, {"min": 1})) == [f"steps is {value!r}; it must be a number."]


def test_a_number_in_quotes_is_one_as_it_is_for_comfyui():
    for value in ("1", "20", "30"):
        assert list(value_problems("steps", value, "INT", {"min": 1, "max": 30})) == []
    assert list(value_problems("steps", "20", "INT", {"min": 1, "max": 9})) == ["steps is 20; it must be from 1 to 9."]


def test_a_checkpoint_for_a_workflow_that_loads_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="catalogue_demo.json has no Load Checkpoint for --checkpoint"):
        run.read_workflow(run.WORKFLOWS / "catalogue_demo.json", "sd_xl_base_1.0.safetensors")
    sdxl = run.read_workflow(run.WORKFLOWS / "catalogue_sdxl.json", "mine.safetensors")
    assert inputs(sdxl, "CheckpointLoaderSimple")["ckpt_name"] == "mine.safetensors"


NO_WORKFLOWS = {
    "a list": [],
    "the canvas": {"nodes": [], "links": []},
    "a node without a class": {"1": {"inputs": {}}},
    "inputs in a list": {"1": {"class_type": "X", "inputs": [1]}},
    "a link to a node that is not there": {"1": {"class_type": "X", "inputs": {"model": ["2", 0]}}},
    "a link to nothing": {"1": {"class_type": "X", "inputs": {"model": []}}},
    "a link to a number": {"1": {"class_type": "X", "inputs": {"model": [1, 0]}}},
}


@pytest.mark.parametrize("kind", NO_WORKFLOWS)
def test_what_is_no_whole_workflow_is_refused(tmp_path, kind):
    (tmp_path / "flow.json").write_text(json.dumps(NO_WORKFLOWS[kind]))
    with pytest.raises(ValueError, match="flow.json is not a whole workflow in API form"):
        run.read_workflow(tmp_path / "flow.json", None)


def test_a_file_of_brackets_is_no_workflow(tmp_path):
    (tmp_path / "flow.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="flow.json is not a whole workflow in API form"):
        run.read_workflow(tmp_path / "flow.json", None)


def test_a_workflow_that_an_editor_has_saved_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "flow.json").write_text(json.dumps(api("catalogue_sdxl")), encoding="utf-8-sig")
    assert run.read_workflow(tmp_path / "flow.json", None) == api("catalogue_sdxl")


@pytest.mark.parametrize(
    "option", ["--patience nan", "--patience=-1", "--patience soon", "--workers 0", "--workers=-1", "--workers 1.5"]
)
def test_a_number_that_an_option_cannot_have_is_refused_in_words(option, capsys):
    with pytest.raises(SystemExit):
        run.parse(["jobs.csv", *option.split()])
    assert "is no number of " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("separator", "written", "words"),
    [
        ("\\", r"'C:\My Comfy\python.exe' -s C:\x\main.py", [r"C:\My Comfy\python.exe", "-s", r"C:\x\main.py"]),
        (
            "/",
            r"'/my comfy/python' -s /x\ y/main.py --port 1#2",
            ["/my comfy/python", "-s", "/x y/main.py", "--port", "1#2"],
        ),
    ],
)
def test_a_command_is_split_as_its_system_writes_paths(monkeypatch, separator, written, words):
    monkeypatch.setattr(os, "sep", separator)
    assert run.split_command(written) == words


@pytest.mark.parametrize("address", ["", "http://", "http://[::1", "127.0.0.1:99999", "ftp://me:5ec2e7@host"])
def test_what_is_no_address_is_refused_without_showing_it(address, capsys):
    with pytest.raises(SystemExit):
        run.parse(["jobs.csv", "--server", address])
    said = capsys.readouterr().err
    assert "no address of a server, such as 127.0.0.1:8188" in said and "5ec2e7" not in said


def test_adapters_of_different_models_are_distinguished():
    metadata = {
        "one": {"consislora.base_model_hash": "1", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
        "two": {"consislora.base_model_hash": "2"},
        "flux": {"modelspec.architecture": "flux-1-dev/lora"},
    }

    def problems(content, style):
        return list(lora_problems(Job("a", "b", content_lora=content, style_lora=style), metadata))

    assert problems("one", "one") == problems("one", None) == problems("one", "stranger") == []
    assert problems("one", "two") == [
        "content_lora and style_lora were trained on different base models. Train one of them again."
    ]
    assert problems("one", "flux") == ["style_lora was trained on flux-1-dev/lora, not on SDXL."]


# A server that misbehaves


@asynccontextmanager
async def pretended(routes, patience: float = 5, headers: dict | None = None):
    """A ComfyClient of a server with these answers: handlers by path, or one for all."""

    async def answer(request):
        response = routes(request) if callable(routes) else routes.get(request.path, nothing)(request)
        return await response if asyncio.iscoroutine(response) else response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with (
        TestServer(app) as there,
        ComfyClient(str(there.make_url("")), patience, lambda text: None, headers) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(batch.comfy_client, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(batch.comfy_client, "LISTENING", 0.05)


def asked(routes, question, **settings):
    async def ask():
        async with pretended(routes, **settings) as server:
            return await question(server)

    return asyncio.run(ask())


def says(text: str = "", status: int = 200, kind: str = "text/html"):
    return lambda _: web.Response(text=text, status=status, content_type=kind)


def sends(data: bytes):
    return lambda _: web.Response(body=data, headers={"Content-Disposition": 'filename="a.png"'})


QUEUE = {"queue_running": [], "queue_pending": []}


def as_comfyui(_):
    return web.json_response(QUEUE)


def nothing(_):
    return web.Response(status=404)


def turns(*handlers):
    """A handler that answers as these do, one after another, and then as the last."""
    left = list(handlers)
    return lambda request: (left.pop(0) if len(left) > 1 else left[0])(request)


# Of proxies, tunnels and pods that start, in ComfyUI's place.
FOREIGN = {
    "a page": says("<html>Your pod is starting</html>"),
    "a page of XHTML": says("\n<!DOCTYPE html>", kind="application/xhtml+xml"),
    "text": says("Service is starting", kind="text/plain"),
    "nothing": says(),
    "no content": says(status=204),
    "null": says("null", kind="application/json"),
    "a list": says("[]", kind="application/json"),
    "a state": says('{"status": "starting"}', kind="application/json"),
    "a state, accepted": says('{"status": "starting"}', 202, "application/json"),
    "a state, as a failure": says('{"error": "pod not ready"}', 400, "application/json"),
    "half of an answer": says('{"queue_running": [', kind="application/json"),
    "brackets": says("[" * 100_000, kind="application/json"),
    "queue and more of another kind": says(
        '{"queue_running": null, "prompt_id": null, "name": 1, "x": {}}', kind="application/json"
    ),
}
STATUSES = [304, 400, 402, 405, 408, 409, 410, 418, 421, 423, 424, 425, 426, 428, 429, 444, 449, 451, 460, 499]
STATUSES += [500, 502, 503, 504, 511, 520, 524, 530, 599, 999]
FOREIGN |= {f"a page of {status}": says("<html>", status) for status in STATUSES}


@pytest.mark.parametrize("said", FOREIGN.values(), ids=FOREIGN)
def test_a_job_is_done_whatever_is_said_in_comfyuis_place_first(said):
    """Every kind of request of a job is answered so at first: it is neither given up nor queued twice."""
    order = Order(Result("cup", "key"), {}, "jobs", {}, frozenset())
    files, queued = {"results.csv": b"name,files\nkey,key.png", "key.png": picture(".png")}, []

    def view(request):
        name = request.query["filename"]
        return (sends(files[name]) if name in files else nothing)(request)

    async def upload(request):
        files["cup.png"] = (await request.post())["image"].file.read()
        return web.json_response({"name": "cup.png"})

    async def prompt(request):
        queued.append((await request.json())["prompt_id"])
        return web.json_response({"prompt_id": queued[0]})

    answers = {"/upload/image": upload, "/prompt": prompt, "/queue": as_comfyui, "/ws": nothing}
    answers |= {f"/view {name}": view for name in ("cup.png", *files)}
    answers = {name: turns(said, said, answer) for name, answer in answers.items()}
    entry = turns(said, said, lambda _: web.json_response({id: DONE for id in queued}))

    def answer(request):
        name = " ".join(filter(None, (request.path, request.query.get("filename"))))
        return entry(request) if request.path.startswith("/history/") else answers[name](request)

    async def run(client):
        return await JobRunner(client).run(order, {"cup.png": b"data"})

    result, made = asked(answer, run)
    assert (result.error, made, files["cup.png"]) == ("", picture(".png"), b"data")
    assert len(queued) == 1


@pytest.mark.parametrize("path", ["/queue", "/object_info", "/system_stats", "/models/loras", "/i18n"])
@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("a page", "200 OK: 'Your pod is starting'"),
        ("text", "200 OK: 'Service is starting'"),
        ("a state, as a failure", '400 Bad Request: \'{"error": "pod not ready"}\''),
        ("a page of 503", "503 Service Unavailable"),
    ],
)
def test_what_stays_another_kind_of_server_is_reported_with_its_words(path, said, words):
    with pytest.raises(Unreachable) as caught:
        asked({path: FOREIGN[said]}, lambda client: client.get(path), patience=0.05)
    assert re.sub(r":\d+ ", " ", str(caught.value)) == f"http://127.0.0.1 answers, but not as ComfyUI does ({words})."


@pytest.mark.parametrize(
    ("address", "headers"),
    [("me:5ec2e7@{}", {}), ("{}/?token=5ec2e7", {}), ("{}", {"CF-Access-Client-Secret": "a-5ec2e7"})],
)
def test_a_page_that_repeats_what_was_sent_in_confidence_is_not_quoted(address, headers):
    pages, reports = [], []

    async def echo(request):
        pages.append(f"{dict(request.headers)} {request.rel_url}")
        return web.Response(text=pages[-1], status=503)

    async def ask():
        app = web.Application()
        app.router.add_get("/queue", echo)
        async with TestServer(app) as there:
            url = f"http://{address.format(f'127.0.0.1:{there.port}')}"
            async with ComfyClient(url, 0.02, reports.append, headers) as client:
                await client.get("/queue")

    with pytest.raises(Unreachable, match=r"as ComfyUI does \(503 Service Unavailable\).$"):
        asyncio.run(ask())
    assert all("(503 Service Unavailable);" in report for report in reports)
    assert "5ec2e7" in pages[0] or "Basic bWU6NWVjMmU3" in pages[0]


def test_that_a_file_is_lacking_is_comfyuis_word_and_not_a_tunnels():
    def fetched(**routes):
        return asked({f"/{name}": route for name, route in routes.items()}, lambda client: client.file("a.png", "b"))

    assert fetched(queue=as_comfyui) is None
    assert asked({"/queue": turns(nothing, nothing, as_comfyui)}, lambda client: client.get("/queue")) == QUEUE
    file = turns(nothing, nothing, sends(b"data"))
    assert fetched(queue=turns(nothing, as_comfyui), view=file) == b"data"


def test_a_workflow_whose_answer_was_lost_is_queued_once():
    queued = []

    async def lost(request):
        queued.append((await request.json())["prompt_id"])
        return web.Response(status=524)

    def queue(_):
        return web.json_response({"queue_running": [[0, queued[0], {}]], "queue_pending": []})

    found = asked({"/prompt": lost, "/queue": queue}, lambda client: client.queue({}))
    assert [found] == queued


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (302, "sends elsewhere .302 Found., perhaps to sign in"),
        (401, "wants a key or a password .401 Unauthorized.. Set CONSISLORA_HEADER"),
        (403, "wants a key or a password"),
        (407, "wants a key or a password"),
        (413, "takes no picture as large as this .413 [\\w ]+.. Save it smaller"),
    ],
)
def test_what_no_request_can_pass_ends_the_batch_at_once(made, status, words):
    shelf = Shelf()

    async def upload(*_):
        async with pretended({"/upload/image": lambda _: web.Response(status=status)}) as client:
            await client.upload(b"data", "a.png", "b")

    shelf.upload = upload
    with pytest.raises(Denied, match=f"^one: http://127.0.0.1:\\d+ {words}"):
        made(["one", "two"], server=shelf)
    assert made([])[0] == {}  # neither is recorded as failed


def test_a_certificate_that_is_not_valid_is_reported_at_once(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    certificate = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(1)).sign(key, hashes.SHA256())
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, *plain) + certificate.public_bytes(serialization.Encoding.PEM)
    (tmp_path / "server.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")

    async def ask():
        server = TestServer(web.Application(), scheme="https")
        await server.start_server(ssl=context)
        async with server, ComfyClient(str(server.make_url("")), 60, lambda text: None) as client:
            await client.get("/queue")

    with pytest.raises(Denied, match="certificate of https://127.0.0.1:.* is not valid: self-signed certificate"):
        asyncio.run(ask())


SECRET = "Bearer 5ec2e7"


def test_the_header_and_the_query_go_with_every_request_and_into_no_message(tmp_path, capsys, monkeypatch):
    """A sheet sent from end to end to a server that takes the header alone, at an address with a path and a token."""
    seen = []

    async def answer(request):
        seen.append((request.path, request.headers.get("Authorization"), request.query.get("token")))
        if request.path == "/proxy/ws":
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            await socket.close()
            return socket
        if request.path == "/proxy/view":
            return web.Response(status=404)
        info = {
            node["class_type"]: {"input": {}}
            for node in run.read_workflow(run.WORKFLOWS / "catalogue_sdxl.json", None, {}).values()
        }
        answers = {"/proxy/object_info": info, "/proxy/queue": QUEUE, "/proxy/prompt": {"prompt_id": ID}}
        answers["/proxy/upload/image"] = {"name": "a.png"}
        return web.json_response(answers.get(request.path, {ID: CANCELLED}))

    async def serve():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        async with TestServer(app) as there:
            address = f"http://127.0.0.1:{there.port}/proxy/?token=70cea"
            return await run.run(run.parse([str(tmp_path / "jobs.csv"), "--server", address, "--patience", "5"]))

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "jobs.csv").write_text("content,style\na.png,a.png\n")
    monkeypatch.setenv("CONSISLORA_HEADER", f"Authorization: {SECRET}")
    assert asyncio.run(serve()) == 1
    assert {path for path, *_ in seen} >= {f"/proxy/{path}" for path in ("ws", "prompt", "upload/image", "view")}
    assert {(header, token) for _, header, token in seen} == {(SECRET, "70cea")}
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    said = "".join(capsys.readouterr()).encode()
    assert (tmp_path / "jobs_results" / RESULTS).exists()
    assert b"5ec2e7" not in written + said and b"70cea" not in written + said


def test_the_header_does_not_follow_the_websocket_to_another_server():
    seen = []

    async def elsewhere(request):
        seen.append(request.path)
        return web.Response(status=404)

    async def ask():
        other = web.Application()
        other.router.add_route("*", "/{path:.*}", elsewhere)
        async with TestServer(other) as there:
            to = {"Location": str(there.make_url("/ws"))}
            routes = history([True, True], DONE) | {"/ws": lambda _: web.Response(status=302, headers=to)}
            async with pretended(routes, headers={"X-Secret": "5ec2e7"}) as client:
                return await client.run({})

    assert asyncio.run(ask()) == DONE  # without its messages
    assert seen == []


@pytest.mark.parametrize("text", ["Bearer 5ec2e7", "Authorization:", "two words: 5ec2e7"])
def test_what_is_no_header_is_refused_without_showing_it(text):
    with pytest.raises(ValueError, match="CONSISLORA_HEADER holds no header such as") as caught:
        headers_in(text)
    assert "5ec2e7" not in str(caught.value)


def test_several_headers_come_on_lines_of_their_own():
    assert headers_in("CF-Access-Client-Id: a\n\nCF-Access-Client-Secret: b:c\n") == {
        "CF-Access-Client-Id": "a",
        "CF-Access-Client-Secret": "b:c",
    }


def test_no_message_names_a_password_of_the_address():
    async def ask():
        async with ComfyClient("http://me:5ec2e7@127.0.0.1:1/?key=70cea") as client:
            await client.get("/queue")

    with pytest.raises(Unreachable, match="^http://127.0.0.1:1 cannot be reached"):
        asyncio.run(ask())


def test_patience_ends(monkeypatch):
    monkeypatch.setattr(batch.comfy_client, "FIRST_DELAY", 60)
    began = time.monotonic()
    with pytest.raises(Unreachable, match="503 Service Unavailable"):
        asked({"/queue": says(status=503)}, lambda client: client.get("/queue"), patience=0.2)
    assert 0.2 <= time.monotonic() - began < 30
    with pytest.raises(Unreachable, match="cannot be reached"):
        asyncio.run(unreachable())


async def unreachable():
    async with ComfyClient("http://127.0.0.1:1") as client:
        await client.get("/queue")


def test_a_server_that_comes_back_before_patience_ends_is_met():
    began = []

    def queue(request):
        began.append(time.monotonic())
        return as_comfyui(request) if began[-1] - began[0] >= 0.9 else web.Response(status=503)

    assert asked({"/queue": queue}, lambda client: client.get("/queue"), patience=1) == QUEUE


def test_a_flood_is_stopped(monkeypatch):
    monkeypatch.setattr(batch.comfy_client, "LIMIT", 1000)
    routes = {"/b": lambda _: web.Response(body=b"x" * 2000)}
    with pytest.raises(Refused, match="larger than"):
        asked(routes, lambda client: client.call("GET", "/b"))


def test_a_refused_workflow_names_node_and_input():
    error = {"message": "value too small", "details": "seed"}
    refusal = {
        "error": {"message": "invalid", "details": ""},
        "node_errors": {"1": {"class_type": "S", "errors": [error]}},
    }
    routes = {"/prompt": lambda _: web.json_response(refusal, status=400)}
    with pytest.raises(WorkflowError, match=r"^invalid; S \(node 1\): value too small: seed$"):
        asked(routes, lambda client: client.run({}))


ID = "12345678-1234-5678-1234-567812345678"


def history(held: list[bool], entry: dict | None) -> dict:
    """Routes of a server that holds a workflow as long as it says, and then has an entry of it or none."""
    others = [[number, f"other {number}", {}] for number in range(1000)]

    def queue(_):
        pending = others + [[1000, ID, {}]] * (len(held) > 0 and held.pop(0))
        return web.json_response({"queue_running": others[:1], "queue_pending": pending})

    return {
        "/prompt": lambda _: web.json_response({"prompt_id": ID}),
        "/queue": queue,
        f"/history/{ID}": lambda _: web.json_response({ID: entry} if entry and not held else {}),
    }


def test_behind_a_full_queue_a_job_waits():
    routes = history([True, True, True], {"status": "done"})
    assert asked(routes, lambda client: client.run({})) == {"status": "done"}


def test_a_job_that_a_restarted_server_has_lost_is_reported():
    assert asked(history([True, True], None), lambda client: client.run({})) is None


def test_an_id_of_the_server_is_no_path():
    routes = {"/prompt": lambda _: web.json_response({"prompt_id": "../../x"}), "/queue": history([], None)["/queue"]}
    with pytest.raises(ValueError, match="badly formed"):
        asked(routes, lambda client: client.run({}))


ODD = {
    "no JSON": "hello",
    "brackets": "[" * 100_000,
    "a list": "[]",
    "null": "null",
    "no type": '{"data": {}}',
    "a type that is no name": '{"type": [], "data": {}}',
    "no data": '{"type": "status"}',
    "executing without a node": '{"type": "executing", "data": {}}',
    "executing with null": '{"type": "executing", "data": null}',
    "progress with null": '{"type": "progress", "data": null}',
    "progress without its end": '{"type": "progress", "data": {"value": 1}}',
    "progress in words": '{"type": "progress", "data": {"value": "half", "max": []}}',
    "one byte": b"\x01",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_messages_of_other_packs_are_passed_over(odd, monkeypatch):
    monkeypatch.setattr(batch.comfy_client, "LISTENING", 60)
    step = {"type": "progress", "data": {"value": 3, "max": 4}}
    end = {"type": "executing", "data": {"node": None, "prompt_id": ID}}
    kept, shown = [], []

    async def ws(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await (socket.send_str if isinstance(odd, str) else socket.send_bytes)(odd)
        await socket.send_json(step)
        await socket.send_json(end)
        return socket

    async def run(client):
        order = Order(Result("cup", "key"), {}, "jobs", {}, frozenset())
        await JobRunner(client).run_all([order], lambda *made: kept.append(made), shown.append)

    asked(history([True, True], FAILED) | {"/ws": ws}, run)
    assert [result.error for result, _ in kept] == ["VAEDecode (node 5): no memory"]
    assert shown == ["cup", "cup, step 3 of 4"]


def test_a_websocket_that_never_opens_holds_no_job_up(monkeypatch):
    monkeypatch.setattr(batch.comfy_client, "CONNECTING", 0.05)
    began = time.monotonic()
    routes = history([True, True], DONE) | {"/ws": lambda _: asyncio.sleep(60)}
    assert asked(routes, lambda client: client.run({})) == DONE
    assert time.monotonic() - began < 30


# The whole sheet, with a server in its place


class Shelf:
    """Answers as a Server does. outcomes: of every workflow in turn; an entry, or None for one that was lost.

    suffix: of the pictures that it makes.
    """

    def __init__(self, *outcomes, suffix=".png"):
        self.outcomes, self.prompts, self.files, self.uploads = list(outcomes), [], {}, []
        self.inputs, self.suffix = set(), suffix

    async def get(self, path, **query):
        raise AssertionError(path)

    async def has_upload(self, data, name, folder):
        return name in self.inputs

    async def upload(self, data, name, folder):
        self.uploads.append(name)
        self.inputs.add(name)

    async def run(self, prompt, on_event):
        self.prompts.append(prompt)
        outcome = self.outcomes.pop(0)
        if outcome in (None, WIPED):  # as when a pod starts again with an empty disk
            self.inputs.clear()
        if outcome == DONE:
            key = inputs(prompt, "ConsisLoRACatalogLoad")["name"]
            files = f"{key}{self.suffix}", f"name,scores,seconds,files\n{key},good,7.5,../../evil{self.suffix}".encode()
            self.files |= {files[0]: picture(self.suffix), RESULTS: files[1]}
        return outcome

    async def file(self, name, folder):
        assert folder == "consislora_batch/jobs"
        return self.files.get(name)


DONE = {"status": {"messages": []}}
NODE = {"node_type": "VAEDecode", "node_id": "5"}
WIPED = {"status": {"messages": [["execution_error", {**NODE, "exception_message": "no such folder"}]]}}
CANCELLED = {"status": {"messages": [["execution_interrupted", NODE]]}}
FAILED = {"status": {"messages": [["execution_error", {**NODE, "exception_message": "no memory\n"}]]}}


def picture(suffix: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, Image.registered_extensions()[suffix])
    return data.getvalue()


@pytest.fixture
def made(tmp_path, capsys):
    """Makes jobs of these names on a server of these outcomes; the results, and the server."""
    for name in ("cup.png", "ink.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)

    def make(names, *outcomes, server=None):
        server = server or Shelf(*outcomes)
        one = run.Batch(WORKFLOW, tmp_path / "jobs.csv", tmp_path / "out")
        jobs = [Job("cup.png", "ink.png", name, seed=number) for number, name in enumerate(names)]
        assert one.local_problems(jobs) == []
        asyncio.run(one.run_all(jobs, JobRunner(server)))
        assert server.outcomes == []
        return ResultsSheet(tmp_path / "out" / RESULTS).read(), server

    return make


def test_a_server_that_cannot_save_a_picture_may_have_a_full_disk():
    routes = {"/upload/image": says("500 Internal Server Error\n\nServer got itself in trouble", 500, "text/plain")}
    with pytest.raises(Unreachable, match="took no picture; its disk may be full .500 Internal Server Error"):
        asked(routes, lambda client: client.upload(b"data", "cup.png", "batch"), patience=0)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".tif"])
def test_results_come_home_under_our_names_whatever_the_server_calls_them(made, tmp_path, suffix):
    results, _ = made(["a/cup"], server=Shelf(DONE, suffix=suffix))
    (result,) = results.values()
    assert (result.name, result.files) == ("a/cup", f"a/cup{suffix}")
    assert (result.scores, result.seconds, result.content) == ("good", 7.5, "cup.png")
    assert (tmp_path / "out" / "a" / f"cup{suffix}").read_bytes() == picture(suffix)
    assert len(made(["a/cup"], server=Shelf())[0]) == 1  # done


def test_of_kinds_that_save_catalogue_does_not_write_no_file_comes_home(made, tmp_path):
    results, _ = made(["cup"], server=Shelf(DONE, suffix=".gif"))
    assert "without a picture" in results["cup"].error and not list((tmp_path / "out").glob("cup*"))


DAMAGE = {
    "cut off": lambda data: data[:20],
    "a byte flipped": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "another file": lambda data: b"<html>",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_picture_that_comes_home_damaged_is_fetched_again_the_next_time(made, monkeypatch, damage):
    with monkeypatch.context() as line:
        line.setitem(globals(), "picture", lambda suffix, whole=picture: DAMAGE[damage](whole(suffix)))
        results, server = made(["one", "two"], DONE, DONE)
    assert all("picture came damaged" in result.error for result in results.values())
    results, _ = made(["one", "two"], DONE, DONE)
    assert [result.error for result in results.values()] == ["", ""]


def test_what_is_done_is_not_done_again_and_what_failed_is(made):
    results, _ = made(["one", "two", "three"], DONE, FAILED, CANCELLED)
    assert [result.error for result in results.values()] == [
        "",
        "VAEDecode (node 5): no memory",
        "VAEDecode (node 5): it was cancelled",
    ]
    results, server = made(["one", "two", "three"], DONE, DONE)
    assert [result.error for result in results.values()] == ["", "", ""]
    assert len(server.prompts) == 2
    made(["one", "two", "three"])


def test_a_job_that_has_changed_or_whose_picture_is_gone_is_done_again(made, tmp_path):
    results, _ = made(["a", "b"], DONE, DONE)
    (tmp_path / "out" / results["b"].files).unlink()
    made(["a", "b"], DONE)
    made(["b"], DONE)  # with another seed than before


def test_a_lost_job_is_queued_again_but_not_for_ever(made):
    results, server = made(["one", "two"], None, DONE, None, None, None)
    assert server.prompts[0] == server.prompts[1]
    assert results["one"].error == ""
    assert results["two"].error == "the server broke down 3 times during this job. Look into ComfyUI's log."


@pytest.mark.parametrize("loss", [None, WIPED], ids=["in the middle of a job", "between two jobs"])
def test_pictures_are_uploaded_once_and_again_when_a_restart_has_lost_them(made, loss):
    results, server = made(["one", "two", "three"], DONE, loss, DONE, DONE)
    assert [result.error for result in results.values()] == ["", "", ""]
    assert len(server.uploads) == 2  # of one picture, which is both content and style


def test_what_people_did_on_the_servers_review_page_comes_along_once(server, tmp_path):
    there = server.base / "output" / "consislora_batch" / "reviewed"
    there.mkdir(parents=True)
    for name in ("k1", "k1_seed5", "k2"):
        (there / f"{name}.png").write_bytes(picture(".png") + name.encode())
    yes = dict(decision="accepted", decided_by="editor", decided_at="2026-01-02T00:00:00.000+00:00")
    no = {**yes, "decision": "rejected", "decision_reason": "dark"}
    theirs = [Result("k1", "p", "a.png", "b.png", "k1.png", **no), Result("k2", "p", files="k2.png", **no)]
    theirs += [Result("k1_seed5", "p", "a.png", "b.png", "k1_seed5.png", retry_of="k1", **yes), Result("other", **no)]
    ResultsSheet(there / RESULTS).record(theirs)
    sheet = ResultsSheet(tmp_path / "out" / RESULTS)
    later = {**yes, "decided_at": "2026-01-03T00:00:00.000+00:00"}
    sheet.record([Result("cup", "k1", "cup.jpg", "ink.jpg", "cup.png"), Result("pot", "k2", files="pot.png", **later)])

    async def bring():
        batch = run.Batch(WORKFLOW, tmp_path / "reviewed.csv", tmp_path / "out")
        async with ComfyClient(server.url) as client:
            await batch.bring_review(sheet, JobRunner(client), lambda: None)

    asyncio.run(bring())
    ours = sheet.read()
    assert ours.keys() == {"cup", "pot", "cup_seed5"}
    assert (ours["cup"].decision_reason, ours["pot"].decision) == ("dark", "accepted")  # the later decision counts
    again = ours["cup_seed5"]
    assert (again.retry_of, again.content, again.decision, again.decided_by) == ("cup", "cup.jpg", "accepted", "editor")
    assert (tmp_path / "out" / "cup_seed5.png").read_bytes() == (there / "k1_seed5.png").read_bytes()
    before = sheet.path.stat().st_mtime_ns
    asyncio.run(bring())
    assert sheet.path.stat().st_mtime_ns == before


@pytest.mark.skipif(os.name == "nt", reason="a program cannot press Ctrl-C for itself alone there")
def test_waiting_for_the_sheet_is_stopped_by_ctrl_c(made, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / f"{RESULTS}.lock"), pytest.raises(KeyboardInterrupt):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        made(["one"], DONE)


def test_a_console_that_lacks_the_letters_of_a_name_stops_nothing(tmp_path):
    (tmp_path / "jobs.csv").write_text("content,style,name\n\u732b.png,\u732b.png,\u732b", encoding="utf-8")
    command = [sys.executable, str(ROOT / "batch"), str(tmp_path / "jobs.csv"), "--server", "http://127.0.0.1:1"]
    Image.new("RGB", (8, 8)).save(tmp_path / "\u732b.png")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([*command, "--dry-run"], env=environment, capture_output=True, text=True)
    assert "1 jobs, no problems found." in ended.stdout, ended.stderr
    (tmp_path / "\u732b.png").unlink()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "\\u732b, column content: \\u732b.png cannot be read" in ended.stderr


def test_a_disk_that_is_full_at_home_leaves_nothing_half_and_the_sheet_goes_on(made, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk, pytest.raises(OSError, match="No space left"):
        disk.setattr("os.fsync", full)
        made(["one", "two"], DONE)
    assert list((tmp_path / "out").rglob("*.*")) == []
    results, _ = made(["one", "two"], DONE, DONE)
    assert [result.error for result in results.values()] == ["", ""]


class Night(Shelf):
    """Does all jobs; during the first one something happens."""

    def __init__(self, event):
        super().__init__(DONE, DONE, DONE)
        self.event = event

    async def run(self, prompt, on_event):
        if not self.prompts:
            self.event()
        return await super().run(prompt, on_event)


@pytest.fixture
def night(tmp_path, capsys):
    """Makes a cup, a pot and a jar, and something happens meanwhile; the results, and the server."""
    for number, name in enumerate(("cup", "pot", "jar", "ink")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{name}.png")

    def make(event=lambda: None):
        one, server = run.Batch(WORKFLOW, tmp_path / "jobs.csv", tmp_path / "out"), Night(event)
        jobs = [Job(f"{name}.png", "ink.png", name) for name in ("cup", "pot", "jar")]
        assert one.local_problems(jobs) == []
        failed = asyncio.run(one.run_all(jobs, JobRunner(server)))
        results = ResultsSheet(tmp_path / "out" / RESULTS).read()
        assert failed == any(result.error for result in results.values())
        return results, server

    return make


def test_pictures_that_are_deleted_or_replaced_meanwhile_hold_no_other_job_up(night, tmp_path):
    def event():
        (tmp_path / "pot.png").rename(tmp_path / "pot.away")
        Image.new("RGB", (8, 8), "red").save(tmp_path / "jar.png")

    results, _ = night(event)
    assert results["pot"].error == "pot.png cannot be read: No such file or directory."
    (tmp_path / "pot.away").rename(tmp_path / "pot.png")
    after, server = night()
    assert len(server.prompts) == 1 and after["pot"].error == ""
    assert (after["cup"], after["jar"]) == (results["cup"], results["jar"])  # the jar was made of what replaced it


def test_a_result_stays_though_its_photo_is_deleted_meanwhile(night, tmp_path):
    before, _ = night()
    (tmp_path / "out" / "cup.png").unlink()  # to have it made again
    results, _ = night((tmp_path / "pot.png").unlink)
    assert results["pot"] == before["pot"]


def test_it_stops_when_all_pictures_are_away(night, tmp_path):
    def event():
        for picture in tmp_path.glob("*.png"):
            picture.unlink()

    with pytest.raises(FileNotFoundError, match="The folder has no files; perhaps its drive is away"):
        night(event)
    assert ResultsSheet(tmp_path / "out" / RESULTS).read().keys() == {"cup"}


def test_what_another_batch_has_made_meanwhile_is_not_made_again(night, tmp_path):
    theirs, _ = night()
    by_other = tmp_path / "by_other"
    (tmp_path / "out").rename(by_other)
    results, server = night(lambda: by_other.rename(tmp_path / "out"))
    assert len(server.prompts) == 1 and results == theirs


def test_of_workers_too_a_picture_that_is_deleted_holds_no_other_job_up(tmp_path):
    order = Order(Result("cup", "key"), {}, "jobs", {"1a.png": tmp_path / "cup.png"}, frozenset())
    with pytest.raises(FileNotFoundError, match="The folder has no files; perhaps its drive is away"):
        asyncio.run(made_by(None, order))
    (tmp_path / "pot.png").touch()
    result, picture = asyncio.run(made_by(None, order))
    assert (result.error, picture) == ("cup.png cannot be read: No such file or directory.", None)


def test_errors_of_the_disk_are_reported(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "jobs.csv").write_text("content,style\na.png,a.png\n")
    text = run.main([str(tmp_path / "jobs.csv"), "--workflow", str(tmp_path / "none.json")])
    assert text.startswith(f"{tmp_path / 'none.json'}: No such file or directory. Once that is fixed")


def test_a_sheet_that_a_spreadsheet_holds_open_is_named(monkeypatch):
    """On Windows a file that another program has open is not replaced; the error names the unfinished one first."""

    async def refused(options):
        raise PermissionError(13, "Permission denied", "results.csv1f.tmp", None, "results.csv")

    monkeypatch.setattr(run, "run", refused)
    assert run.main(["jobs.csv"]).startswith("results.csv: Permission denied. Once that is fixed")


def test_all_problems_are_reported_before_any_job_is_sent(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "jobs.csv").write_text("content,style,seed\nbad.png,none.png,1\nbad.png,bad.png,2\n")
    text = run.main([str(tmp_path / "jobs.csv"), "--dry-run", "--server", "http://127.0.0.1:1"])
    assert text.splitlines() == [
        "jobs.csv has 2 problems:",
        "- bad__none, column content: bad.png is empty (0 bytes). Copy it again.",
        "- bad__none, column style: none.png cannot be read: No such file or directory.",
    ]


def test_a_dry_run_without_a_server_checks_what_it_can(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "jobs.csv").write_text("content,style\na.png,a.png\n")
    assert run.main([str(tmp_path / "jobs.csv"), "--dry-run", "--server", "http://127.0.0.1:1"]) == 0
    assert "The jobs are not checked against it.\n1 jobs, no problems found." in capsys.readouterr().out


# Several workers, each with a server in its place


class Hand:
    """A worker that dies at the jobs of some names, each time or once."""

    def __init__(self, dies_at, died):
        self.runner, self.dies_at, self.died, self.made = JobRunner(Shelf()), dies_at, died, []

    async def run(self, order, pictures):
        name = order.result.name
        await asyncio.sleep(0)
        if name in self.dies_at and (self.dies_at[name] == "always" or name not in self.died):
            self.died.append(name)
            raise WorkerLost("killed")
        self.made.append(name)
        self.runner.client.outcomes.append(DONE)
        return await self.runner.run(order, pictures)


@pytest.fixture
def spread(tmp_path, monkeypatch):
    """Makes jobs, named by their two pictures, with a crew; results, and what every worker made."""
    monkeypatch.setattr("batch.scheduler.POLL", 0)

    def make(names, size=2, most=99, **dies_at):
        hired, died = [], []

        async def hire():
            if len(hired) == most:
                raise WorkerLost("no room")
            hired.append(Hand(dies_at, died))
            return hired[-1]

        one = run.Batch(WORKFLOW, tmp_path / "jobs.csv", tmp_path / "out")
        jobs = [Job(f"{name[0]}.png", f"{name[1]}.png", name) for name in names]
        for picture in {picture for job in jobs for picture in (job.content, job.style)}:
            Image.new("RGB", (8, 8), tuple(picture[:1].encode() * 3)).save(tmp_path / picture)
        assert one.local_problems(jobs) == []
        try:
            asyncio.run(one.run_all(jobs, Scheduler(size, hire)))
        finally:
            made.update(ResultsSheet(tmp_path / "out" / RESULTS).read())
        return made, [hand.made for hand in hired]

    made: dict[str, Result] = {}
    return make


def test_jobs_go_where_their_adapters_are(spread):
    names = ["ax", "bx", "ay", "by", "az", "bz"]
    results, made = spread(names)
    assert sorted(results) == sorted(names)
    assert list(map(sorted, made)) == [["ax", "ay", "az"], ["bx", "by", "bz"]]


def test_the_job_of_a_lost_worker_goes_on_elsewhere_and_nothing_is_made_twice(spread):
    names = ["ax", "bx", "ay", "by", "az", "bz"]
    results, made = spread(names, ay="once")
    assert sorted(results) == sorted(names) == sorted(sum(made, []))
    assert not any(result.error for result in results.values())
    assert len(made) == 3  # another was hired in the lost one's place


def test_a_job_at_which_every_worker_dies_is_left(spread):
    results, _ = spread(["ax", "bx"], ax="always")
    assert results["ax"].error == "the worker broke down 3 times during this job. Look into ComfyUI's log."
    assert not results["bx"].error


def test_without_a_worker_it_stops_and_goes_on_later(spread):
    with pytest.raises(WorkerLost, match="No worker is left, and 2 jobs are."):
        spread(["ax", "bx", "ay"], size=1, most=1, bx="once")
    results, made = spread(["ax", "bx", "ay"])
    assert sorted(results) == ["ax", "ay", "bx"]
    assert sorted(sum(made, [])) == ["ay", "bx"]


# A real server


def sheet_of(count: int, folder: Path) -> Path:
    """Jobs of ever other pictures, and beside them a workflow that trains for two steps."""
    for picture in IMAGES.glob("*.png"):
        (folder / picture.name).write_bytes(picture.read_bytes())
    pairs = itertools.cycle(itertools.permutations(sorted(picture.name for picture in IMAGES.glob("*.png")), 2))
    rows = [f"{','.join(next(pairs))},job {number},{number},2" for number in range(count)]
    (folder / "jobs.csv").write_text("\n".join(["content,style,name,seed,steps", *rows]))
    (folder / "quick.json").write_text(json.dumps(two_steps("catalogue_demo")))
    return folder / "jobs.csv"


def started(sheet: Path, server: ComfyServer) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "batch"), str(sheet), "--server", server.url]
    command += ["--workflow", str(sheet.with_name("quick.json")), "--patience", "600"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(sheet: Path) -> dict[str, Result]:
    return ResultsSheet(sheet.with_name("jobs_results") / RESULTS).read()


def wait_for_one_more(sheet: Path, process: subprocess.Popen) -> None:
    before = results(sheet)
    while len(results(sheet)) == len(before):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def test_a_server_tells_whether_it_has_a_whole_picture(server):
    data = picture(".png")

    async def ask():
        async with ComfyClient(server.url) as client:
            before = await client.has_upload(data, "whole.png", "batch")
            await client.upload(data, "whole.png", "batch")
            await client.upload(data[:-5], "cut.png", "batch")
            after = [await client.has_upload(data, name, "batch") for name in ("whole.png", "cut.png")]
            return [before, *after, await client.file("../whole.png", "batch")]

    assert asyncio.run(ask()) == [False, True, False, None]


@pytest.mark.skipif(os.name == "nt", reason="a program cannot press Ctrl-C for one other program there")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_stopped_and_with_its_server_killed_every_job_is_done_once(tmp_path, kills):
    moments, count = random.Random(kills), 2 * kills + 2
    sheet, server = sheet_of(count, tmp_path), ComfyServer(tmp_path / "base", COMFYUI)
    there = tmp_path / "base" / "output" / "consislora_batch" / "jobs"
    with server:
        process = started(sheet, server)
        wait_for_one_more(sheet, process)
        process.send_signal(signal.SIGINT)
        assert "Stopped. The server finishes its running job" in process.communicate()[0]
    process = started(sheet, server)
    for _ in range(kills):
        with server:  # each time at the same address
            wait_for_one_more(sheet, process)
            # In the next job: none is shorter than the shortest so far.
            time.sleep(moments.uniform(0, min(result.seconds for result in results(sheet).values())))
            server.kill()
        known = results(sheet)
        check_every_file_is_whole(tmp_path / "base" / "models" / "loras")
        for picture in [*there.glob("*.png"), *sheet.with_name("jobs_results").glob("*.png")]:
            open_picture(picture)
    with server:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    assert f"{count} of {count} are in" in output
    assert f"{count} pictures made of {count} wanted ones" in output
    assert json.loads(sheet.with_name("jobs_results").joinpath("summary.json").read_text())["pictures_made"] == count
    done = results(sheet)
    assert {name: done[name] for name in known} == known  # what was done stayed as it was
    assert [(name, result.error, result.seed, result.steps) for name, result in done.items()] == [
        (f"job {number}", "", number, 2) for number in range(count)
    ]
    assert ResultsSheet(there / RESULTS).read().keys() == {result.key for result in done.values()}
    assert sorted(path.stem for path in there.glob("*.png")) == sorted(result.key for result in done.values())
    pictures = [open_picture(sheet.with_name("jobs_results") / result.files) for result in done.values()]
    assert len({picture.tobytes() for picture in pictures}) == count
    print(f"{kills} kills, {output.count('the job is queued again')} jobs begun again, {count} of {count} done once")
