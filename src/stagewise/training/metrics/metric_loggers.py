"""Where else a run's numbers go: TensorBoard, Weights & Biases, MLflow, or Prometheus.

The log always has a JSON object per step. A logger gets the same numbers by name; to add one, write
a class with its two methods and a row in LOGGERS. Packages are imported when they are asked for.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from stagewise.errors import UsageError

PROMETHEUS_FILE = "metrics.prom"


class MetricLogger(Protocol):
    """Receives the numbers of a run, on rank 0."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the numbers of step `step`, by name."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Scalars in RUN/tensorboard."""

    def __init__(self, run: Path) -> None:
        made = import_module("torch.utils.tensorboard")
        self._writer = made.SummaryWriter(str(run / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, with the name of the folder."""

    def __init__(self, run: Path) -> None:
        self._run = import_module("wandb").init(name=run.name, dir=str(run))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, with the name of the folder."""

    def __init__(self, run: Path) -> None:
        self._mlflow = import_module("mlflow")
        self._mlflow.start_run(run_name=run.name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Prometheus:
    """RUN/metrics.prom in Prometheus' text format, for the node exporter's textfile collector."""

    def __init__(self, run: Path) -> None:
        self._path, self._now = run / PROMETHEUS_FILE, dict[str, float]()
        self._label = run.name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._now |= {"step": step, **metrics}
        lines = []
        for name, value in self._now.items():
            metric = "stagewise_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
            lines += [f"# TYPE {metric} gauge", f'{metric}{{run="{self._label}"}} {value:.9g}']
        written = self._path.with_suffix(".tmp")
        written.write_text("\n".join(lines) + "\n", encoding="utf-8")
        written.replace(self._path)  # a reader sees the old one or the new one

    def close(self) -> None:
        pass


LOGGERS: dict[str, Callable[[Path], MetricLogger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "prometheus": Prometheus,
}


class Loggers:
    """Several loggers as one."""

    def __init__(self, run: Path, names: Sequence[str]) -> None:
        self._loggers = [LOGGERS[name](run) for name in dict.fromkeys(names)]

    def log(self, row: Mapping[str, object]) -> None:
        """Pass a row of the run's log on: its numbers, those inside named with a slash."""
        step = row.get("step")
        if self._loggers and isinstance(step, int):
            metrics = dict(metrics_in(row))
            for logger in self._loggers:
                logger.log(step, metrics)

    def close(self) -> None:
        """Close all."""
        for logger in self._loggers:
            logger.close()


def metrics_in(row: Mapping[str, object], before: str = "") -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a row of the log, besides its step, by name."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from metrics_in(value, f"{before}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value) and name != "step":
            yield f"{before}{name}", float(value)


def _is_installed(package: str) -> bool:
    """Return whether it is; a folder of that name, which Python would import, has no origin."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def loggers_named(text: str) -> tuple[str, ...]:
    """Return the loggers in a list with commas; UsageError for one that cannot be used here."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if text and not names:
        raise UsageError(f"--log {text} names no logger; choose of {', '.join(LOGGERS)}")
    for name in names:
        if name not in LOGGERS:
            raise UsageError(f"there is no logger {name!r}; choose of {', '.join(LOGGERS)}")
        if name != "prometheus" and not _is_installed(name):
            raise UsageError(
                f"--log {name} needs {name}, which is not installed: pip install {name}"
            )
    return names
