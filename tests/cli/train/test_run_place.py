"""A worker that is started again finds the folder of its launch, and no other's."""

from pathlib import Path

import pytest

from stagewise.cli.train.run_place import IF_ANY, RunPlace, agreed_place, asked_place
from stagewise.errors import CheckpointError, UsageError
from stagewise.training.workers import elastic
from stagewise.training.workers.run_owner import agents_of, owned


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "STAGEWISE_STOP_FILE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def asked() -> RunPlace:
    return RunPlace(run=Path("asked"))


def taken(run: str, agents: list[str]) -> None:
    with owned(Path(run), agents):
        pass


def test_the_folder_of_this_launch_is_found() -> None:
    own = elastic.agent_here()
    taken("runs/tiny", ["host 12 345"])
    taken("runs/tiny-2", ["host 99 17", own])
    assert agents_of(Path("runs/tiny-2")) == ["host 99 17", own]
    found = agreed_place("tiny", None, asked)
    assert (found.run, found.agents) == (Path("runs/tiny-2"), [own])
    assert found.interrupted is not None and found.interrupted.last_step == 0
    assert agreed_place("tiny", Path("runs/tiny"), asked).run == Path("asked")


def test_another_launch_goes_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    taken("runs/tiny", [elastic.agent_here()])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")  # as for a second run of one process
    found = agreed_place("tiny", None, asked)
    assert (found.run, found.interrupted) == (Path("asked"), None)


def test_a_mistake_of_the_user_is_raised_on_every_rank() -> None:
    def mistaken() -> RunPlace:
        raise CheckpointError("taken")

    with pytest.raises(CheckpointError, match="taken"):
        agreed_place("tiny", None, mistaken)


def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    for out in (tmp_path / "afile", tmp_path / "afile" / "run"):
        with pytest.raises(UsageError, match=f"folder {out} cannot be written: .*another --out"):
            asked_place("tiny", out, None)
    assert asked_place("tiny", tmp_path / "new", None).run == tmp_path / "new"
    assert not (tmp_path / "new").exists()


def test_the_run_in_the_folder_goes_on_if_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--resume auto goes on .* give --out FOLDER as well"):
        asked_place("tiny", None, IF_ANY)
    found = asked_place("tiny", tmp_path / "run", IF_ANY)
    assert found == RunPlace(run=tmp_path / "run")
