"""The numbers of a run's log, elsewhere."""

import functools
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from stagewise.errors import UsageError
from stagewise.training.metrics import metric_loggers
from stagewise.training.metrics.metric_loggers import Loggers, loggers_named

ROW = {
    "step": 3,
    "loss": 2.5,
    "losses": {"a": 1.0, "b": None},
    "change": "no number",
    "seconds": float("inf"),
}


def test_prometheus_text_has_the_last_numbers(tmp_path: Path) -> None:
    loggers = Loggers(tmp_path, ["prometheus"])
    loggers.log(ROW)
    loggers.log({"step": 4, "validation_loss": 2.25})
    loggers.close()
    run = f'{{run="{tmp_path.name}"}}'
    lines = (tmp_path / "metrics.prom").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        f"stagewise_step{run} 4",
        f"stagewise_loss{run} 2.5",
        f"stagewise_losses_a{run} 1",
        f"stagewise_validation_loss{run} 2.25",
    ]
    assert "# TYPE stagewise_loss gauge" in lines


class Told:
    """Stands for a package: notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "module", "calls"),
    [
        (
            "tensorboard",
            "torch.utils.tensorboard",
            [
                ("add_scalar", ("loss", 2.5, 3), {}),
                ("add_scalar", ("losses/a", 1.0, 3), {}),
                ("close", (), {}),
            ],
        ),
        (
            "wandb",
            "wandb",
            [("log", ({"loss": 2.5, "losses/a": 1.0},), {"step": 3}), ("finish", (), {})],
        ),
        (
            "mlflow",
            "mlflow",
            [
                ("log_metrics", ({"loss": 2.5, "losses/a": 1.0},), {"step": 3}),
                ("end_run", (), {}),
            ],
        ),
    ],
)
def test_packages_get_the_same_numbers(
    name: str, module: str, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Told()
    monkeypatch.setitem(sys.modules, module, package)  # type: ignore[arg-type]
    loggers = Loggers(tmp_path, [name, name])
    package.calls.clear()
    loggers.log(ROW)
    loggers.close()
    assert package.calls == calls


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loggers_named("") == () and loggers_named(" prometheus ,") == ("prometheus",)
    with pytest.raises(UsageError, match=r"no logger 'x'; choose of tensorboard"):
        loggers_named("prometheus,x")
    (tmp_path / "wandb").mkdir()  # as its own earlier runs leave one; Python would import it
    beside = functools.partial(PathFinder.find_spec, path=[str(tmp_path)])
    for find in (lambda name: None, beside):
        monkeypatch.setattr(metric_loggers, "find_spec", find)
        with pytest.raises(UsageError, match="pip install wandb"):
            loggers_named("wandb")
