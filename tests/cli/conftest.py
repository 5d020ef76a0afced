"""The command line in pytest's own process."""

import sys
from pathlib import Path

import pytest

from stagewise.cli.main import main
from tests.forked import fork_workers
from tests.recipes import RunHere


@pytest.fixture
def run_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> RunHere:
    """`recipes.run_command` without a process of its own, whose imports take seconds.

    Workers are processes all the same, but forked. One test of every command starts it, and its
    workers, as a user does.
    """
    fork_workers(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "STAGEWISE_STOP_FILE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["stagewise", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return code or 0, out, err

    return run
