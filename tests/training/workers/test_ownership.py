"""A run's folder is one run's: while it lasts, whatever way it ends."""

from pathlib import Path

import pytest

from stagewise.errors import UsageError
from stagewise.training.workers.run_owner import owned


def take(run: Path) -> None:
    with owned(run):
        pass


def test_a_second_run_is_refused_while_the_first_lasts(tmp_path: Path) -> None:
    with owned(tmp_path / "run"):
        with pytest.raises(UsageError, match=r"in use by another run \(process \d+"):
            take(tmp_path / "run")
        take(tmp_path / "other")
    with pytest.raises(KeyError), owned(tmp_path / "run"):
        raise KeyError
    take(tmp_path / "run")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written: Not a directory"):
        take(tmp_path / "file" / "run")
