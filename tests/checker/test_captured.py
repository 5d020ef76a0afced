"""The checker on models that are no chain, captured or cut by `cells=`: the module is the truth."""

import copy

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import UsageError
from stagewise.model.captured import captured_of
from stagewise.model.cell import Piece
from stagewise.parity import ParityReport
from stagewise.testing import check_parity


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.drop(self.out(seen))


class Language(nn.Module):
    """Embedding and head share one table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        if scale is not None:
            x = x * scale[:, None, None]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    """With a parameter, a buffer and a size of its own between BatchNorm, dropout and layers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.drop, self.scale = nn.Dropout(dropout), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.drop(self.norm(self.up(x)).relu()).reshape(x.shape[0], 2, 4)
        return x * self.scale + self.down(inner.flatten(1))


class Branching(nn.Module):
    """What torch.export cannot trace."""

    def __init__(self, *, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 4)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2)
        )
        self.gain, self.norm = nn.Parameter(torch.ones(6)), norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x) if x.abs().mean() < 1e6 else x - layer(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.head(x * self.gain)


def check(model: nn.Module, **more: object) -> ParityReport:
    """Under two schedules, at K=1 and 2, on 10 samples in 4 microbatches, if not told otherwise."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(10, 4, generator=generator) for _ in range(2))
    options = {
        "inputs": x,
        "target": y,
        "loss": nn.functional.mse_loss,
        "num_stages": [1, 2],
        "schedules": ["gpipe", "1f1b"],
        "recompute": ["never", "always"],
        "dtype": torch.float64,
        **more,
    }
    return check_parity(model, options.pop("inputs"), **options)  # type: ignore[arg-type]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_captured_model_equals_itself(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model, tokens = Language(), torch.randint(11, (6, 5))
    report = check(
        model,
        inputs=tokens,
        target=tokens.roll(1, 1),
        loss=cross_entropy,
        kwargs={"scale": torch.rand(6, requires_grad=True)},
        dtype=dtype,
        max_norm=0.5,
        max_value=0.01,
    )
    assert {row.verdict for row in report.rows} == {"ok"}, report.summary()
    assert len(report.configurations) == 8
    quantities = {row.quantity for row in report.rows}
    names = [name for name, _ in model.named_parameters()]
    assert {q.removeprefix("gradient ") for q in quantities if q.startswith("gradient ")} == {
        *names
    }
    assert {"loss", "outputs", "input gradient 1"} <= quantities
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_batchnorm_and_dropout_of_a_captured_model_are_explained(dropout: float) -> None:
    torch.manual_seed(0)
    report = check(Residual(dropout))
    verdicts = {row["quantity"]: row["verdict"] for row in report.table()}
    assert report.ok, report.summary()
    assert verdicts["gradient down.weight"] == verdicts["loss"] == "explained"
    assert verdicts["buffer norm.running_var"] == verdicts["outputs"] == "ok"
    assert "BatchNorm's statistics by microbatch (norm)" in report.summary()
    assert ("random numbers" in report.summary()) == bool(dropout)


def sabotage(model: nn.Module, path: str) -> None:
    """Let the captured cell that calls the layer at `path` call a slightly wrong one."""
    captured = captured_of(model)
    assert captured is not None
    wrong = copy.deepcopy(model.get_submodule(path))
    with torch.no_grad():
        next(wrong.parameters()).mul_(1.05)
    cells = [cell.module for cell in captured.chain]
    names = [
        (cell, name)
        for cell in cells
        if isinstance(cell, Piece)
        for _, own, name in cell._owned  # type: ignore[union-attr]
        if own == path
    ]
    assert names
    for cell, name in names:
        setattr(cell._space, name, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [None, 0.0, 0.4])
def test_a_wrong_capture_fails_and_nothing_excuses_it(dropout: float | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 4)
    model = Residual(dropout or 0.0)
    if dropout is None:
        model.norm.eval()  # nothing differs by microbatch
    stagewise.capture(model, x)
    assert check(model, inputs=x, dtype=None).ok
    sabotage(model, "down")
    report = check(model, inputs=x, dtype=None)
    failed = {row.quantity for row in report.failures}
    assert {"loss", "outputs", "gradient up.weight"} <= failed, report.summary()
    assert "the captured cells are not equal to the module" in report.summary()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_model_cut_by_cells(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model, cells = Branching(), ["embed", "layers.*", "head"]
    report = check(model, cells=cells, dtype=dtype)
    assert report.ok, report.summary()
    assert "explained by random numbers (layers.0, layers.1)" in report.summary()
    stagewise.capture_cells(model, cells, torch.randn(10, 4))
    assert check(model, dtype=dtype).ok  # what it was cut by is remembered
    assert {row.quantity for row in report.rows} >= {f"gradient {n}" for n in ("gain", "head.bias")}


def test_a_batchnorm_in_no_cell_is_no_excuse() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    report = check(Branching(norm=norm), cells=["embed", "layers.*", "head"])
    assert "every microbatch updates norm, which is in no cell" in report.summary()
    assert check(Branching(norm=norm), cells=["embed", "layers.*", "norm", "head"]).ok


def test_wrong_use() -> None:
    model, x = Residual(), torch.randn(10, 4)
    with pytest.raises(UsageError, match="pass the module itself"):
        check_parity(stagewise.capture(model, x), x)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="use at most"):
        check(model, num_stages=[40])


class Targeted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (self.linear(x) - target).square().mean()


def test_a_target_that_forward_takes_is_a_keyword() -> None:
    x = torch.randn(10, 4)
    with pytest.raises(UsageError, match="has an argument 'target'"):
        check_parity(Targeted(), x, target=x, kwargs={"target": x})
