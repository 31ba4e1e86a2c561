"""The store: the same in, the same out, whatever the disk, other processes or a kill do meanwhile."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from consislora_core import lora_file
from consislora_core.lora_file import ImageLora, LoraLayer
from consislora_core.schedule import image_stage
from consislora_core.store import Store, Unhashable, fingerprint
from consislora_core.trainer import Trainer

KEYS = [fingerprint(number) for number in range(5)]
SHORT = dict(steps=6, transition_step=3, learning_rate=1e-2, reconstruction_learning_rate=1e-2, rank=2)
PATH = "transformer_blocks.0.attn1.to_q"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", limit=10**9)


def lora(seed: int = 0, size: int = 8) -> ImageLora:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, size, generator=generator), torch.randn(size, 2, generator=generator)
    return ImageLora({"content": {PATH: LoraLayer(down, up, 2.0)}}, {"consislora.prompt": "A [c] \u732b"})


def equal(one: ImageLora, other: ImageLora) -> bool:
    states = lora_file.to_state_dict(one), lora_file.to_state_dict(other)
    same = all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    return same and states[0].keys() == states[1].keys() and one.metadata == other.metadata


def never():
    raise AssertionError("nobody else was at it")


def trained(host, store=None, key=KEYS[0], cut_at=None, **settings):
    """Losses and parts of a training that resumes from a checkpoint, and may be cut short after one."""
    with Trainer(*host, image_stage(**SHORT | settings)) as trainer:
        losses = store.resume(key, trainer) if store else []
        for event in trainer:
            losses.append(event.losses)
            if event.step == cut_at:
                store.save_checkpoint(key, trainer, losses)
                break
        return [loss for (loss,) in losses], ImageLora(trainer.parts(), {})


def files(store) -> list[str]:
    return sorted(path.name[64:] for path in store.folder.iterdir())


# Names


VALUES = [
    None, 0, 1, 1.0, True, "", "1", b"1", [], [1], ["1"], [1, 1], [[1], 1], {}, {"1": 1}, {1: 1}, {"a": "b", "c": "d"},
    {"a": "d", "c": "b"}, ["a", "b"], ["ab"], torch.zeros(2), torch.zeros(1, 2), torch.zeros(2, dtype=torch.bfloat16),
    torch.zeros(2, dtype=torch.float8_e4m3fn), torch.ones(2), torch.zeros(0), torch.tensor(0.0), "None", float("nan"),
]  # fmt: skip


def test_different_values_have_different_names():
    assert len({fingerprint(value) for value in VALUES}) == len(VALUES)
    assert len({fingerprint({"a": value}) for value in VALUES}) == len(VALUES)


def test_equal_values_have_equal_names():
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    grid = torch.arange(6.0).view(2, 3)
    assert fingerprint(grid.T) == fingerprint(grid.T.contiguous())
    with torch.inference_mode():
        assert fingerprint(grid.clone()) == fingerprint(grid)


def test_a_function_has_no_name():
    with pytest.raises(Unhashable, match="lambda"):
        fingerprint({"wrappers": [lambda x: x]})


# What is kept


def test_what_was_kept_is_found_bit_for_bit_also_by_another_process(store):
    assert store.find(KEYS[0]) is None
    losses = [0.1, 1 / 3, 1e-30]
    store.keep(KEYS[0], lora(), losses)
    store.folder.joinpath(f"{KEYS[0]}.checkpoint").touch()  # as a kill at the end of `keep` leaves it
    found, found_losses = Store(store.folder, 0).find(KEYS[0])
    assert equal(found, lora()) and files(store) == [".lora"]
    assert found_losses == losses
    assert store.find(KEYS[1]) is None


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="a Mac does not tell")
def test_what_was_read_leaves_its_file_free(host, store):
    """Windows neither removes nor replaces a file that is mapped into memory."""
    store.keep(KEYS[0], lora(), [0.5])
    trained(host, store, KEYS[1], cut_at=3)
    with Trainer(*host, image_stage(**SHORT)) as trainer:
        assert store.resume(KEYS[1], trainer) and store.find(KEYS[0])
        (found, _), mapped = store.find(KEYS[0]), psutil.Process().memory_maps()
        assert found.parts and not {file.path for file in mapped} & set(map(str, store.folder.iterdir()))


def test_comfyui_lists_none_of_it(store, comfy):
    import folder_paths

    store.keep(KEYS[0], lora(), [])
    names = [path.name for path in store.folder.iterdir()]
    assert folder_paths.filter_files_extensions(names, folder_paths.supported_pt_extensions) == []


def test_the_least_recently_used_goes_first_and_the_users_files_never(store):
    mine = store.folder / "consislora.safetensors"
    for age, key in zip((30, 20, 10), KEYS, strict=False):
        store.keep(key, lora(), [])
        for path in store.folder.glob(f"{key}*"):
            os.utime(path, (time.time() - age,) * 2)
    mine.write_bytes(b"x" * 10**5)
    store.find(KEYS[0])
    store.limit = 2 * (store.folder / f"{KEYS[0]}.lora").stat().st_size + 500
    store.keep(KEYS[3], lora(), [])
    assert [bool(store.find(key)) for key in KEYS[:4]] == [True, False, False, True]
    assert mine.exists()


def test_the_newest_stays_however_small_the_limit_and_however_wrong_the_clock(store):
    store.keep(KEYS[0], lora(), [])
    os.utime(store.folder / f"{KEYS[0]}.lora", (time.time() + 10**8,) * 2)
    store.limit = 0
    store.keep(KEYS[1], lora(), [])
    assert (store.find(KEYS[0]), bool(store.find(KEYS[1]))) == (None, True)


def test_a_training_that_goes_on_keeps_its_files_and_its_lock(store):
    other = Store(store.folder, 0)  # as of another process
    with store.locked(KEYS[0], never):
        store.keep(KEYS[0], lora(), [])
        two_more = Store(store.folder, int(2.5 * store.folder.joinpath(f"{KEYS[0]}.lora").stat().st_size))
        for key in KEYS[3:]:  # beside which the one that goes on does not count
            two_more.keep(key, lora(), [])
        assert all(map(store.find, KEYS[3:]))
        other.keep(KEYS[1], lora(), [])
        assert store.find(KEYS[0]) and store.folder.joinpath(f"{KEYS[0]}.lock").exists()
    other.keep(KEYS[2], lora(), [])
    assert [bool(store.find(key)) for key in KEYS[:3]] == [False, False, True]
    if os.name != "nt":  # where whoever releases it removes it, unless another process waits for it
        assert store.folder.joinpath(f"{KEYS[0]}.lock").exists()


def test_a_checkpoint_larger_than_the_limit_does_not_empty_the_store(host, store):
    store.keep(KEYS[0], lora(), [])
    store.limit = store.folder.joinpath(f"{KEYS[0]}.lora").stat().st_size
    trained(host, store, KEYS[1], cut_at=1)
    assert store.find(KEYS[0])
    with store.locked(KEYS[1], never):
        store.keep(KEYS[2], lora(), [])  # as a smaller training may beside it
    assert {".checkpoint", ".lora"} <= set(files(store))
    assert store.find(KEYS[2])


def test_of_trainings_that_were_cut_the_last_can_go_on_whatever_the_limit(host, store):
    store.limit = 0
    for key in KEYS[:2]:
        trained(host, store, key, cut_at=1)
    assert [path.name for path in store.folder.glob("*.checkpoint")] == [f"{KEYS[1]}.checkpoint"]


def test_a_network_folder_without_locks_keeps_to_its_limit_all_the_same(store, monkeypatch):
    def no_locks(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    store.keep(KEYS[0], lora(), [])
    store.limit = 0
    store.keep(KEYS[1], lora(), [])
    assert [bool(store.find(key)) for key in KEYS[:2]] == [False, True]


@pytest.mark.skipif(os.name == "nt", reason="a file that is open stays there")
def test_deleting_the_folder_empties_it_also_while_training(store):
    with store.locked(KEYS[0], never):
        for path in store.folder.iterdir():
            path.unlink()
        store.folder.rmdir()
        store.keep(KEYS[0], lora(), [])
    assert store.find(KEYS[0])


# Checkpoints


@pytest.mark.parametrize("cut_at", [1, 3, 6])
def test_a_training_that_was_cut_goes_on_and_ends_the_same(host, store, cut_at):
    trained(host, store, cut_at=cut_at)
    losses, parts = trained(host, store)
    whole_losses, whole = trained(host)
    assert losses == whole_losses
    assert equal(parts, whole)


def test_a_step_that_is_cut_short_is_done_again_with_the_same_noise(host, store):
    model, z_0, cond = host
    calls = []

    def stops(x, sigma, cond):
        calls.append(sigma)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model.denoise(x, sigma, cond)

    with Trainer(model._replace(denoise=stops), z_0, cond, image_stage(**SHORT)) as trainer:
        with pytest.raises(KeyboardInterrupt):
            list(trainer)
        store.save_checkpoint(KEYS[0], trainer, [(0.0,)] * trainer.step)
    assert equal(trained(host, store)[1], trained(host)[1])


def test_a_checkpoint_goes_when_the_training_has_ended(host, store):
    trained(host, store, cut_at=3)
    assert files(store) == [".checkpoint"]
    store.keep(KEYS[0], *reversed(trained(host, store)))
    assert files(store) == [".lora"]


def test_checkpoints_hold_no_pickle(host, store):
    trained(host, store, cut_at=1)
    (path,) = store.folder.iterdir()
    with safe_open(path, framework="pt") as file:
        assert "weights.0" in file.keys()  # noqa: SIM118
        assert json.loads(file.metadata()["store"])["key"] == KEYS[0]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def huge_header(path):
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")


def pickled(path):
    torch.save({"step": 1}, path)


def of_another_key(path):
    os.replace(path.with_name(path.name.replace(KEYS[0], KEYS[1])), path)


def no_record(path):
    save_file({"step": torch.tensor(1)}, path)


def record_of_another_kind(path):
    save_file({"step": torch.tensor(1)}, path, {"store": "[1]"})


def record_of_nothing(path):
    save_file(load(path.read_bytes()), path, {"store": json.dumps({"key": KEYS[0]})})


def record_without_end(path):
    save_file(load(path.read_bytes()), path, {"store": "[" * 100_000})


def other_tensors(path):
    save_file({"step": torch.tensor(1)}, path, {"store": json.dumps({"key": KEYS[0], "metadata": {}, "losses": []})})


DAMAGES = [
    truncate, empty, huge_header, pickled, of_another_key, no_record, record_of_another_kind, record_of_nothing,
    record_without_end, other_tensors,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_or_foreign_checkpoint_is_set_aside_and_training_starts_afresh(host, store, caplog, damage):
    for key in KEYS[:2]:
        trained(host, store, key, cut_at=3)
    damage(store.folder / f"{KEYS[0]}.checkpoint")
    losses, parts = trained(host, store)
    assert equal(parts, trained(host)[1])
    assert len(losses) == SHORT["steps"]
    assert ".checkpoint.damaged" in files(store)
    assert "is set aside as .damaged; the training starts afresh" in caplog.text


def test_a_checkpoint_of_another_setting_is_set_aside(host, store):
    trained(host, store, cut_at=3, rank=4)
    assert equal(trained(host, store)[1], trained(host)[1])
    assert files(store) == [".checkpoint.damaged"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_or_foreign_lora_is_set_aside_and_not_found(store, caplog, damage):
    for key in KEYS[:2]:
        store.keep(key, lora(), [])
    damage(store.folder / f"{KEYS[0]}.lora")
    assert store.find(KEYS[0]) is None
    assert ".lora.damaged" in files(store)
    store.keep(KEYS[0], lora(), [])
    assert store.find(KEYS[0])


# What the disk refuses


def refused(store, monkeypatch):
    """Every file it writes is refused half-way, as by a full disk."""

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora_file, "save_file", full)


def in_a_files_place(store, monkeypatch):
    store.folder.write_bytes(b"")


def not_writable(store, monkeypatch):
    """As a read-only folder is for anyone but root, who may run the tests."""

    def read_only(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")

    monkeypatch.setattr(lora_file, "save_file", read_only)


@pytest.mark.parametrize("fault", [refused, in_a_files_place, not_writable], ids=lambda fault: fault.__name__)
def test_errors_of_the_disk_are_reported_once_and_training_goes_on(host, store, caplog, monkeypatch, fault):
    fault(store, monkeypatch)
    with store.locked(KEYS[0], never):
        assert store.find(KEYS[0]) is None
        with Trainer(*host, image_stage(**SHORT)) as trainer:
            losses = store.resume(KEYS[0], trainer)
            for event in trainer:
                losses.append(event.losses)
                store.save_checkpoint(KEYS[0], trainer, losses)
            result = ImageLora(trainer.parts(), {})
        store.keep(KEYS[0], result, [loss for (loss,) in losses])
    assert equal(result, trained(host)[1])
    assert caplog.text.count("Training goes on, but may not be remembered or resumed") == 1
    assert not list(store.folder.parent.rglob("*.tmp"))


def test_a_read_only_folder_still_gives_what_it_has(store, monkeypatch):
    def read_only(*args):
        raise PermissionError(13, "Permission denied")

    store.keep(KEYS[0], lora(), [])
    monkeypatch.setattr(os, "utime", read_only)
    assert equal(store.find(KEYS[0])[0], lora())


@pytest.mark.skipif(os.name == "nt", reason="the limit is one of Unix")
def test_a_file_that_outgrows_the_disk_leaves_the_earlier_one(store, caplog):
    import resource

    store.keep(KEYS[0], lora(), [1.0])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        store.keep(KEYS[0], lora(size=10_000), [2.0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be used" in caplog.text
    assert store.find(KEYS[0])[1] == [1.0]


# Other processes


def test_a_second_one_waits_and_reads(store, caplog):
    caplog.set_level(logging.INFO)
    waits, found = [], []

    def second():
        other = Store(store.folder, store.limit)
        with other.locked(KEYS[0], lambda: waits.append(1)):
            found.append(other.find(KEYS[0]))

    thread = threading.Thread(target=second)
    with store.locked(KEYS[0], never):
        thread.start()
        while not waits:
            time.sleep(0.01)
        with store.locked(KEYS[1], never):  # another training does not wait
            store.keep(KEYS[0], lora(), [])
    thread.join()
    assert equal(found[0][0], lora())
    assert caplog.text.count("another process is at the same training") == 1


def test_waiting_can_be_given_up(store):
    def give_up():
        raise KeyboardInterrupt

    other = Store(store.folder, store.limit)
    with store.locked(KEYS[0], never), pytest.raises(KeyboardInterrupt), other.locked(KEYS[0], give_up):
        pass
    with other.locked(KEYS[0], never):
        pass


def test_one_that_is_killed_lets_go_and_its_unfinished_file_goes(store):
    code = """
import sys, time
from pathlib import Path
from consislora_core import lora_file
from consislora_core.store import Store
def hang(tensors, path, metadata):
    Path(path).write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
lora_file.save_file = hang
store = Store(Path(sys.argv[1]), 10**9)
with store.locked(sys.argv[2], lambda: None):
    store.keep(sys.argv[2], lora_file.ImageLora({}, {}), [])
"""
    command = [sys.executable, "-c", code, str(store.folder), KEYS[0]]
    root = Path(lora_file.__file__).resolve().parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"writing"
        assert store.find(KEYS[0]) is None
        assert [name for name in files(store) if name.endswith(".tmp")]
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    with store.locked(KEYS[0], lambda: None):
        assert files(store) == [".lock"]
