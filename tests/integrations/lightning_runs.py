"""Runs of Lightning's Trainer, plain and with PipelineStrategy, on a tiny model."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stagewise.errors import StagewiseError
from stagewise.integrations.lightning import PipelineStrategy
from stagewise.integrations.pipeline_arguments import PipelineArguments

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
Run = dict[str, Any]
FEATURES, CLASSES = 8, 3


class Classifier(pl.LightningModule):
    """As users write them: a model, a step that returns and logs its loss, an optimizer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 16), nn.Tanh()
        )
        self.model.append(nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        out = self(x)
        loss = nn.functional.cross_entropy(out, y)
        self.log("train_loss", loss)
        self.log_dict({"accuracy": (out.argmax(-1) == y).double().mean()}, on_epoch=True)
        return {"loss": loss}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Drawing(Classifier):
    """Draws before it calls the model."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        return super().training_step([x + torch.randn_like(x), y], batch_idx)


class Skipping(Classifier):
    """Returns no loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self(batch[0])


class Manual(Classifier):
    """Steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Narrow(Classifier):
    """Trains its last layer only, although all have gradients."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model[-1].parameters(), lr=0.1)


class Losing(Classifier):
    """Computes a loss of outputs and labels, and logs it."""

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss, batch_size=len(batch[0]), on_step=True, on_epoch=True)
        return loss


def labels_in(batch: list[Tensor]) -> Tensor:
    return (batch[1] != 1).sum()


class Padded(Losing):
    """Ignores the labels of one class."""

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, torch.where(y == 1, -100, y))


class Summed(Losing):
    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, y, reduction="sum")


class ByPosition(Losing):
    """Weighs the first samples of a batch less than its last."""

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        weights = torch.linspace(1, 2, len(y), dtype=out.dtype)
        return (nn.functional.cross_entropy(out, y, reduction="none") * weights).mean()


class Reducing(Losing):
    """Logs a maximum, a minimum and a count."""

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        self.log("greatest", out.max(), reduce_fx="max")
        self.log("least", out.min(), reduce_fx=torch.min, on_step=True, on_epoch=True)
        self.log("right", (out.argmax(-1) == y).double().sum(), reduce_fx="sum")
        return nn.functional.cross_entropy(out, y)


class Product(Losing):
    """Logs by a reduction that microbatches do not have."""

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        self.log("product", out.mean(), reduce_fx=torch.prod)
        return nn.functional.cross_entropy(out, y)


class Counting(Losing):
    """Counts its calls, behind that of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(out, y)


class Collecting(Counting):
    """Keeps its losses, and makes a cache, which is no change."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.cache: Tensor | None = None

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        self.cache = torch.zeros(1) if self.cache is None else self.cache
        self.kept.append(loss := nn.functional.cross_entropy(out, y))
        return loss


class Buffered(Classifier):
    """Counts in a buffer, ahead of the model's call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.seen += 1
        return super().training_step(batch, batch_idx)


class Cached(Losing):
    """Makes what it needs at the first call."""

    weights: Tensor | None = None

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        if self.weights is None:
            self.weights = out.new_ones(CLASSES)
        return nn.functional.cross_entropy(out, y) * self.weights.mean()


class Quasi(Classifier):
    """Has an optimizer that takes products over all parameters."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)


class Peeking(Classifier):
    """Reads a parameter of the first stage in a hook, which the second has without values."""

    def on_train_batch_end(self, *args: object) -> None:
        float(self.model[0].weight.sum())


class Rows(Callback):
    """What a callback sees after each batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: object) -> None:
        seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append({**seen, "loss": float(outputs["loss"]), "rate": rate})


def loader(seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(44, FEATURES, generator=generator).double()
    y = torch.randint(0, CLASSES, (44,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def trained(
    *,
    pipelined: bool,
    out: str | None = None,
    resume: str | None = None,
    dropout: float = 0.0,
    num_stages: int | None = None,
    module: type[Classifier] | None = None,
    stop_early: bool = False,
    weight: Any = None,
    **options: Any,
) -> Run:
    """Train, and return what a callback saw, what was saved, and predictions."""
    pl.seed_everything(1, verbose=False)
    ours = PipelineStrategy(pipeline=PipelineArguments(num_stages=num_stages), weight=weight)
    strategy: Any = ours if pipelined else "auto"
    plain: Any = Classifier(dropout) if module is None else module()
    plain.double()  # Lightning restores checkpoints before it converts modules
    rows, callbacks = Rows(), list[Callback]()
    callbacks = [rows]
    if out is not None:
        callbacks.append(ModelCheckpoint(out, save_top_k=-1, monitor="val_loss"))
    if stop_early:
        callbacks.append(EarlyStopping("val_loss", patience=0, min_delta=10.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=int(os.environ.get("WORLD_SIZE", 1)) if pipelined else 1,
            strategy=strategy,
            callbacks=callbacks,
            enable_checkpointing=out is not None,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"max_epochs": 2, "precision": "64-true", **options},
        )
        trainer.fit(plain, loader(), loader(1), ckpt_path=resume)
        guesses = trainer.predict(plain, loader(1))
    best = trainer.checkpoint_callback
    return {
        "rows": rows.rows,
        "epochs": trainer.current_epoch,
        "guesses": torch.cat(guesses).tolist(),  # type: ignore[arg-type]
        "held": sum(p.numel() for p in plain.parameters() if not p.is_meta),
        "best": best and Path(best.best_model_path).name,  # type: ignore[attr-defined]
    }


def trained_on_ranks(cases: list[dict[str, Any]]) -> list[Run]:
    """Run cases on every rank of a pool, as under torchrun."""
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    os.environ.update(
        LOCAL_RANK=rank,
        LOCAL_WORLD_SIZE=size,
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="pool",
        MASTER_ADDR="localhost",
        MASTER_PORT="0",
    )
    return [trained(pipelined=True, **case) for case in cases]


def refused_on_ranks(case: dict[str, Any]) -> str:
    """Run a case on every rank of a pool, and return what it says when it is refused."""
    try:
        trained_on_ranks([case])
    except StagewiseError as error:
        return str(error)
    return ""
