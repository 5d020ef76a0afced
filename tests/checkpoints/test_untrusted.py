"""A folder of torch.distributed.checkpoint is read, and nothing in it is run."""

import io
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import stagewise
from stagewise.checkpoints.untrusted import Planner, Reader
from stagewise.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Evil:
    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.made}",)


def pipeline() -> stagewise.Pipeline:
    plan = stagewise.Plan(balance=(1,), schedule="gpipe", num_microbatches=1)
    return stagewise.Pipeline(nn.Sequential(nn.Linear(2, 2)), plan, loss=nn.functional.mse_loss)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2), "note": (1, "two", None)}
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def _changing(module: str, name: str) -> bytes:
    """A pickle that sets an attribute `name` of what it is given, by a state in slots."""
    text = pickle.dumps((None, {"name": "../../victim"}), protocol=0)[:-1]
    return f"c{module}\n{name}\n".encode() + text + b"b."


def hostile(made: Path) -> dict[str, bytes]:
    """Indices that would run code, or name what is none of theirs."""
    named = {
        "call": pickle.dumps(Evil(made)),
        "inside a list": pickle.dumps([1, {"a": Evil(made)}]),
        "old protocol": f"cos\nsystem\n(S'touch {made}'\ntR.".encode(),
        "builtins": b"cbuiltins\neval\n(S'1'\ntR.",
        "getattr": b"cbuiltins\ngetattr\n(S'a'\nS'upper'\ntR.",
        "torch load": b"ctorch\nload\n(S'x'\ntR.",
        "torch attribute": b"ctorch\nos.system\n(S'true'\ntR.",
        "not an index": pickle.dumps({"a": 1}),
        "no pickle": b"\x00\x01\x02",
        "empty": b"",
        "cut short": pickle.dumps(list(range(1000)))[:50],
        "persistent id": b"Pabc\n.",
        "extension": b"\x80\x02\x82\x01.",
        "a class changed": _changing("torch.distributed.checkpoint.metadata", "Metadata"),
        "a path's class changed": _changing("pathlib", "PosixPath"),
        "a function changed": _changing("torch.serialization", "_get_layout"),
        "huge": b"\x80\x02\x8a\x04" + struct.pack("<i", 2**30),
    }
    return named


@pytest.mark.parametrize("name", hostile(Path("x")))
def test_a_hostile_index_is_refused_and_runs_nothing(
    tmp_path: Path, folder: Path, name: str
) -> None:
    made = tmp_path / "made"
    (folder / ".metadata").write_bytes(hostile(made)[name])
    pipe = pipeline()
    before = {n: v.clone() for n, v in pipe.state_dict().items()}
    with pytest.raises(CheckpointError):
        pipe.load_checkpoint(folder)
    assert not made.exists()
    assert all(torch.equal(before[n], v) for n, v in pipe.state_dict().items())
    assert Path("a/b").name == "b"
    assert not hasattr(dcp.metadata.Metadata, "name")
    assert not hasattr(torch.serialization._get_layout, "name")


def test_a_hostile_entry_is_refused(tmp_path: Path) -> None:
    """Entries that are no tensors are pickles too, in the data files."""
    made = tmp_path / "made"
    dcp.save({"note": Evil(made)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    made.unlink(missing_ok=True)  # saving does not run it, but be sure
    state = {"note": None}
    with pytest.raises((Exception, dcp.api.CheckpointException)):
        dcp.load(state, storage_reader=Reader(tmp_path / "saved"), planner=Planner(), no_dist=True)
    assert not made.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "a/b"])
def test_files_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="not in its folder"):
        pipeline().load_checkpoint(folder, strict=False)


def test_sizes_beyond_the_files_are_refused(folder: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata["0.weight"].size = torch.Size([1 << 40])
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="but all files together have"):
        pipeline().load_checkpoint(folder, strict=False)


def test_what_torch_wrote_is_read(folder: Path) -> None:
    pipe = pipeline()
    pipe.load_checkpoint(folder, strict=False)
    assert all(bool((value == 1).all()) for value in pipe.state_dict().values())
    state = {"note": None}
    dcp.load(state, storage_reader=Reader(folder), planner=Planner(), no_dist=True)
    assert state == {"note": (1, "two", None)}
    torch.save(state, io.BytesIO())


@pytest.mark.parametrize("file", ["/tmp/victim", "../victim", "..", "a/b.safetensors", 3])
def test_an_index_of_safetensors_names_files_of_its_folder_only(
    tmp_path: Path, file: object
) -> None:
    import json

    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "saved"
    folder.mkdir()
    name = str(victim) if file == "/tmp/victim" else file
    index = {"metadata": {}, "weight_map": {"0.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    pipe = pipeline()
    for use in (pipe.save_checkpoint, pipe.load_checkpoint):
        with pytest.raises(CheckpointError, match=r"not in its folder|not map names to files"):
            use(folder)
    assert victim.read_text() == "precious"


def test_only_shards_are_removed(tmp_path: Path) -> None:
    import json

    (tmp_path / "config.json").write_text("{}")
    index = {"metadata": {}, "weight_map": {"0.weight": "config.json"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    pipeline().save_checkpoint(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_a_flipped_bit_in_a_shard_is_found_before_a_value_changes(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_checkpoint(tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 64
    shard.write_bytes(content)
    before = {name: value.clone() for name, value in pipe.state_dict().items()}
    with pytest.raises(CheckpointError, match="not what was written"):
        pipe.load_checkpoint(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())
