"""Checkpoints in safetensors and torch.distributed.checkpoint: own tensors only, all or nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import stagewise
from stagewise.checkpoints import saving, sources
from stagewise.errors import CheckpointError
from tests.harness import Pools, Raised
from tests.pipeline.runs import even
from tests.zoo.cases import CASES, build

INDEX = "model.safetensors.index.json"
NAME = "decoder_lm"  # five cells; the last one's weight is the first one's
TIED = "4.scores.weight"

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def trained() -> dict[str, Tensor]:
    """A state unlike any that a pipeline starts with, under all names."""
    model = build(NAME)[0]
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(number + 0.5)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write_file(path: Path, state: dict[str, Tensor]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(state, path / "model.safetensors")
    return path


def write_shards(path: Path, state: dict[str, Tensor]) -> Path:
    """As transformers does it, the tied weight under its first name."""
    path.mkdir(parents=True, exist_ok=True)
    names = [name for name in state if name != TIED]
    files = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({n: state[n] for n in names[number::3]}, path / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names[number::3], file)
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": files}))
    return path


def write_distributed(path: Path, state: dict[str, Tensor]) -> Path:
    dcp.save(dict(state), checkpoint_id=path, no_dist=True)
    return path


def write_nested(path: Path, state: dict[str, Tensor]) -> Path:
    """As `stagewise train` does it, the optimizer beside the model."""
    whole = {"model": dict(state), "optimizer": {"momentum": torch.ones(2)}}
    dcp.save(whole, checkpoint_id=path, no_dist=True)
    return path


WRITERS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "file": write_file,
    "shards": write_shards,
    "distributed": write_distributed,
    "nested": write_nested,
}


def pipeline(num_stages: int, *, meta: bool = False, **options: object) -> stagewise.Pipeline:
    plan = stagewise.Plan(balance=even(5, num_stages), schedule="1f1b", num_microbatches=2)
    model: nn.Module = build(NAME)[0]
    if meta:
        with torch.device("meta"):
            model = CASES[NAME].model()
    return stagewise.Pipeline(model, plan, loss=CASES[NAME].loss, **options)  # type: ignore[arg-type]


def loaded(num_stages: int, path: Path, how: str) -> dict[str, Tensor]:
    """This rank's state from a checkpoint."""
    if how == "load":
        pipe = pipeline(num_stages)
        pipe.load_checkpoint(path)
    else:
        pipe = pipeline(num_stages, meta=how == "meta", state=path)
    return pipe.state_dict()


@pytest.mark.parametrize("how", ["load", "state", "meta"])
@pytest.mark.parametrize("form", WRITERS)
def test_every_form_loads_at_any_number_of_stages(
    pools: Pools, tmp_path: Path, form: str, how: str
) -> None:
    wanted = trained()
    path = WRITERS[form](tmp_path / form, wanted)
    for state in (loaded(1, path, how), *pools[2].run(loaded, 2, path, how)):
        assert state and state.keys() <= wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


def test_a_dictionary_is_a_state() -> None:
    wanted = trained()
    for meta in (True, False):
        state = pipeline(2, meta=meta, state=wanted).state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


def read_names(path: Path) -> tuple[set[str], set[str]]:
    """Which tensors rank 0 of 2 and this one read, and which are its own."""
    seen: set[str] = set()

    class Watched:
        def __init__(self, opened: object) -> None:
            self.opened = opened

        def __enter__(self) -> "Watched":
            self.handle = self.opened.__enter__()  # type: ignore[attr-defined]
            return self

        def __exit__(self, *error: object) -> None:
            self.opened.__exit__(*error)  # type: ignore[attr-defined]

        def get_tensor(self, name: str) -> object:
            seen.add(name)
            return self.handle.get_tensor(name)

        def __getattr__(self, name: str) -> object:
            return getattr(self.handle, name)

    before = sources._opened
    sources._opened = lambda path: Watched(before(path))  # type: ignore[assignment]
    try:
        pipe = pipeline(2, meta=True, state=path)
    finally:
        sources._opened = before
    return seen, set(pipe.state_dict())


def test_only_own_tensors_are_read(pools: Pools, tmp_path: Path) -> None:
    path = write_shards(tmp_path, trained())
    (first, own), (second, others) = pools[2].run(read_names, path)
    assert first == own
    assert second == (others - {TIED}) | {"0.token.weight"}


def test_saved_shards_load_at_another_number_of_stages_and_in_the_plain_model(
    pools: Pools, tmp_path: Path
) -> None:
    wanted = trained()
    path = tmp_path / "saved"
    assert pools[3].run(save_trained, 3, path) == [None] * 3
    index = json.loads((path / INDEX).read_text())
    assert set(index["weight_map"]) == set(wanted) - {TIED}, "written once, under its first name"
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(p.name for p in path.iterdir()) == [*files, INDEX]
    whole = {name: t for file in files for name, t in load_file(path / file).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    plain = CASES[NAME].model()
    missing, unexpected = plain.load_state_dict(whole, strict=False)
    assert (missing, unexpected) == ([TIED], [])
    assert all(torch.equal(t, wanted[n]) for n, t in plain.state_dict().items())
    assert all(torch.equal(t, wanted[n]) for n, t in loaded(2, path, "load").items())


def save_trained(num_stages: int, path: Path, add: float = 0.0) -> None:
    pipe = pipeline(num_stages, state={n: t + add for n, t in trained().items()})
    pipe.save_checkpoint(path)


def test_large_parts_become_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SHARD_BYTES", 1000)
    save_trained(1, tmp_path)
    sizes = [sum(t.nbytes for t in load_file(p).values()) for p in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) <= 1024  # 8 x 32 floats alone
    assert all(torch.equal(t, trained()[n]) for n, t in loaded(2, tmp_path, "load").items())


def test_saving_again_replaces_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for add in (0.0, 1.0, 2.0):
        save_trained(2, tmp_path, add)
        state = loaded(1, tmp_path, "load")
        assert all(torch.equal(t, trained()[n] + add) for n, t in state.items())
        assert len(list(tmp_path.iterdir())) == 3  # config, one shard, index


@pytest.mark.parametrize("at", ["save_file", "to_disk", "_commit"])
def test_a_crash_while_saving_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """At whichever point: the earlier checkpoint stays, and saving again works."""
    save_trained(1, tmp_path)

    def crash(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saving, at, crash)
        save_trained(1, tmp_path, 1.0)
    assert all(torch.equal(t, trained()[n]) for n, t in loaded(1, tmp_path, "load").items())
    save_trained(1, tmp_path, 2.0)
    assert all(torch.equal(t, trained()[n] + 2) for n, t in loaded(1, tmp_path, "load").items())


def test_a_full_disk_is_told_on_every_rank(pools: Pools, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for outcome in pools[2].outcomes(save_trained, 2, tmp_path / "file" / "below"):
        assert isinstance(outcome, Raised)
        assert "CheckpointError" in outcome.error and "cannot be written" in outcome.error


def test_a_single_file_would_be_read_first(tmp_path: Path) -> None:
    write_file(tmp_path, trained())
    with pytest.raises(CheckpointError, match="would be read instead of the new checkpoint"):
        save_trained(1, tmp_path)


class Extra(nn.Linear):
    def get_extra_state(self) -> str:
        return "note"

    def set_extra_state(self, state: str) -> None:
        pass


def test_what_is_no_tensor_cannot_be_saved(tmp_path: Path) -> None:
    plan = stagewise.Plan(balance=(1,), schedule="1f1b", num_microbatches=1)
    pipe = stagewise.Pipeline([Extra(2, 2)], plan)
    with pytest.raises(CheckpointError, match=r"0\._extra_state is not a tensor"):
        pipe.save_checkpoint(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        del state[name]

    return change


def with_entry(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[name] = tensor

    return change


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (without("4.norm.bias"), r"1 entries are missing: 4\.norm\.bias; strict=F"),
    "unexpected": (with_entry("9.weight", torch.ones(2)), r"are not the model's: 9\.weight"),
    "shape": (
        with_entry("4.norm.bias", torch.ones(7)),
        r"1 entries have a different shape: 4\.norm\.bias \(7,\), here \(8,\)",
    ),
    "dtype": (
        with_entry("4.norm.bias", torch.ones(8, dtype=torch.float64)),
        r"a different dtype .*convert=True.*: 4\.norm\.bias torch\.float64, here torch\.float32",
    ),
}


@pytest.mark.parametrize("form", ["file", "distributed"])
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_told_before_anything_changes(
    tmp_path: Path, case: str, form: str
) -> None:
    change, message = WRONG[case]
    state = trained()
    change(state)
    path = WRITERS[form](tmp_path / "wrong", state)
    pipe = pipeline(2)
    before = {name: tensor.clone() for name, tensor in pipe.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        pipe.load_checkpoint(path)
    assert all(torch.equal(tensor, before[n]) for n, tensor in pipe.state_dict().items())
    with torch.device("meta"):
        model = CASES[NAME].model()
    with pytest.raises(CheckpointError, match=message):
        stagewise.Pipeline(model, pipe.plan, state=path)
    assert all(parameter.is_meta for parameter in model.parameters())


def load_wrong(path: Path) -> tuple[str, bool]:
    pipe = pipeline(2)
    before = {name: tensor.clone() for name, tensor in pipe.state_dict().items()}
    message = ""
    try:
        pipe.load_checkpoint(path)
    except CheckpointError as error:
        message = str(error)
    return message, all(torch.equal(t, before[n]) for n, t in pipe.state_dict().items())


def test_no_rank_changes_anything_where_one_objects(pools: Pools, tmp_path: Path) -> None:
    state = trained()
    del state["4.norm.bias"]  # rank 1's
    path = write_file(tmp_path, state)
    (first, first_same), (second, second_same) = pools[2].run(load_wrong, path)
    assert first == f"rank 1: {second}" and "4.norm.bias" in second
    assert first_same and second_same


def test_strict_and_convert_are_choices(tmp_path: Path) -> None:
    state = {n: t.bfloat16() for n, t in trained().items() if n != "4.norm.bias"}
    state["9.weight"] = torch.ones(2)
    pipe = pipeline(2)
    pipe.load_checkpoint(write_file(tmp_path, state), strict=False, convert=True)
    for name, tensor in pipe.state_dict().items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, trained()[name]) == (name != "4.norm.bias"), name


def test_many_wrong_entries_are_counted(tmp_path: Path) -> None:
    path = write_file(tmp_path, {"a.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"\d\d entries are missing.*0\.token\.weight.* more"):
        pipeline(1).load_checkpoint(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist; give a .safetensors file"),
        (lambda path: path.mkdir(), "is not a checkpoint that stagewise can read"),
        (lambda path: _cut_short(path), r"cannot be read: Safetensor.*interrupted"),
        (lambda path: _lacks_a_shard(path), r"cannot be read: FileNotFound"),
        (lambda path: _broken_index(path), r"index\.json cannot be read: JSONDecodeError"),
        (lambda path: _cut_short_distributed(path), "cannot be read"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "checkpoint"
    make(path)
    pipe = pipeline(1)
    before = {name: tensor.clone() for name, tensor in pipe.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        pipe.load_checkpoint(path)
    assert all(torch.equal(tensor, before[n]) for n, tensor in pipe.state_dict().items())


def _cut_short(path: Path) -> None:
    file = write_file(path, trained()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _lacks_a_shard(path: Path) -> None:
    (write_shards(path, trained()) / "model-00002-of-00003.safetensors").unlink()


def _broken_index(path: Path) -> None:
    (write_shards(path, trained()) / INDEX).write_text("{")


def _cut_short_distributed(path: Path) -> None:
    (write_distributed(path, trained()) / ".metadata").write_bytes(b"\x80")


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    plan = stagewise.Plan(balance=(1, 1), num_microbatches=2)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss).save_checkpoint(tmp_path / "ck")
    (tmp_path / "usual").touch()
    modes = {path.stat().st_mode for path in [tmp_path / "usual", *(tmp_path / "ck").iterdir()]}
    assert len(modes) == 1 and len(list((tmp_path / "ck").iterdir())) == 2
