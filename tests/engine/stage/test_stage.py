"""One stage by itself, instruction by instruction."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from stagewise.batch.values import put_together, take_apart
from stagewise.engine.stage.randomness import CellRandomness, generators_kept
from stagewise.engine.stage.stage import Stage
from stagewise.engine.stage.work import Mode, Parts, Work
from stagewise.errors import BatchError, CellError
from stagewise.model.chain import chain_of
from stagewise.schedule import Instruction

CPU = torch.device("cpu")


def stage_of(*modules: nn.Module, is_last: bool = False, index: int = 1) -> Stage:
    loss = nn.functional.mse_loss if is_last else None
    return Stage(index, chain_of(list(modules)), CPU, is_last=is_last, loss=loss)


def work_of(mode: Mode = Mode.TRAIN, *, recomputed: bool = False, **fields: object) -> Work:
    return Work(
        mode=mode,
        recomputed=frozenset({(1, 0), (1, 1)} if recomputed else ()),
        sizes=(2, 1),
        by_samples=(2 / 3, 1 / 3),
        randomness={CPU: CellRandomness(0, 0, CPU)},
        parts=Parts(**fields),  # type: ignore[arg-type]
    )


def run(stage: Stage, text: str, received: object, work: Work) -> object:
    with generators_kept([CPU]):
        run = stage.action(Instruction.parse(text))
        sent = run([take_apart(received)] if received is not None else [], work)
        return None if sent is None else put_together(*sent)


@pytest.mark.parametrize("recomputed", [False, True])
def test_forward_and_backward(recomputed: bool) -> None:
    linear = nn.Linear(3, 2)
    stage, work = stage_of(linear), work_of(recomputed=recomputed)
    x = torch.randn(2, 3).requires_grad_()
    sent = run(stage, "1F0", x, work)
    assert isinstance(sent, Tensor) and sent.grad_fn is None and sent.requires_grad
    assert len(list(stage.held())) == 1, "the input; the output is the receiver's"
    if recomputed:
        assert run(stage, "1R0", None, work) is None
    gradient = torch.randn(2, 2)
    (back,) = run(stage, "1B0", (gradient,), work)  # type: ignore[misc]
    assert x.grad is None, "the sender's tensor is not touched"
    torch.testing.assert_close(back, gradient @ linear.weight)
    torch.testing.assert_close(linear.weight.grad, gradient.t() @ x.detach())
    assert list(stage.held()) == []


def test_only_what_needs_a_gradient_gets_one() -> None:
    class Pick(nn.Module):
        def forward(self, xs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return xs[0] * 2, xs[1]

    stage, work = stage_of(Pick()), work_of()
    tensors = (torch.ones(2).requires_grad_(), torch.arange(2), torch.ones(2).requires_grad_())
    first, second = run(stage, "1F0", tensors, work)  # type: ignore[misc]
    assert first.requires_grad and not second.requires_grad
    gradients = run(stage, "1B0", (torch.ones(2), None), work)
    assert isinstance(gradients, tuple)
    assert torch.equal(gradients[0], torch.full((2,), 2.0))
    assert gradients[1:] == (None, None)


def test_the_last_stage_weighs_its_losses() -> None:
    linear = nn.Linear(3, 1)
    stage = stage_of(linear, is_last=True)
    targets = [torch.zeros(2, 1), torch.zeros(1, 1)]
    work = work_of(targets=targets)
    xs = [torch.randn(2, 3), torch.randn(1, 3)]
    for m, x in enumerate(xs):
        run(stage, f"1F{m}", x, work)
        run(stage, f"1B{m}", None, work)
    whole = nn.Linear(3, 1)
    whole.load_state_dict(linear.state_dict())
    loss = nn.functional.mse_loss(whole(torch.cat(xs)), torch.zeros(3, 1))
    loss.backward()
    torch.testing.assert_close(linear.weight.grad, whole.weight.grad)
    torch.testing.assert_close(
        work.record.losses[0]["loss"] * work.by_samples[0]
        + work.record.losses[1]["loss"] * work.by_samples[1],
        loss.detach(),
    )
    assert not any(loss["loss"].requires_grad for loss in work.record.losses.values())


@pytest.mark.parametrize("mode", [Mode.EVALUATE, Mode.PREDICT])
def test_without_training_nothing_is_kept(mode: Mode) -> None:
    stage = stage_of(nn.Linear(3, 1), is_last=True)
    work = work_of(mode, targets=[torch.zeros(2, 1)])
    with torch.enable_grad():
        run(stage, "1F0", torch.randn(2, 3).requires_grad_(), work)
    assert list(stage.held()) == []
    assert bool(work.record.losses) == (mode is Mode.EVALUATE)
    assert bool(work.record.outputs) == (mode is Mode.PREDICT)


def test_gradients_keep_the_strides_the_plain_model_gives_them() -> None:
    """Found a bug: accumulating in a leaf's .grad gave them the leaf's strides, and BatchNorm's
    backward then summed in another order than without the cut."""

    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1)

    stage, work = stage_of(Turn()), work_of()
    run(stage, "1F0", torch.randn(2, 3).requires_grad_(), work)
    (back,) = run(stage, "1B0", (torch.randn(3, 2),), work)  # type: ignore[misc]
    assert back.stride() == (1, 2)
    run(stage, "1F1", torch.randn(2, 3).requires_grad_(), work)
    (back,) = run(stage, "1B1", (torch.ones(()).expand(3, 2),), work)  # type: ignore[misc]
    assert back.stride() == (0, 0)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 8)[:, ::2],
        torch.randn(2, 1).expand(2, 4),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(2, 1, 4).transpose(0, 2),
        torch.randn(0, 3),
        torch.tensor(1.0),
    ],
)
def test_cells_see_the_strides_that_were_sent(x: Tensor) -> None:
    """On the first microbatch, whose inputs are copied in case a cell changes them, and later."""
    seen = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((x.stride(), x.requires_grad))
            return x * 1

    stage, work = stage_of(Look()), work_of()
    for m in range(2):
        run(stage, f"1F{m}", x.detach().requires_grad_(), work)
    assert seen == [(x.stride(), True)] * 2


def test_a_cell_in_place_works_on_a_copy_and_others_do_not() -> None:
    seen: list[int] = []

    class Adds(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.in_place = in_place

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.data_ptr())
            return x.add_(1) if self.in_place else x + 1

    for in_place in (True, False):
        stage, work = stage_of(Adds(in_place)), work_of()
        xs = [torch.zeros(2), torch.zeros(2)]
        for m, x in enumerate(xs):
            run(stage, f"1F{m}", x, work)
        assert all(torch.equal(x, torch.zeros(2)) for x in xs)
        assert (seen[-1] == xs[1].data_ptr()) == (not in_place)


def test_a_cell_that_changes_its_input_only_sometimes_is_refused() -> None:
    class Sometimes(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x.add_(1) if self.calls == 2 else x

    stage, work = stage_of(Sometimes()), work_of()
    run(stage, "1F0", torch.zeros(2), work)
    with pytest.raises(CellError, match="changed an input in place on microbatch 1, but not on"):
        run(stage, "1F1", torch.zeros(2), work)


def test_errors_name_the_place() -> None:
    stage, work = stage_of(nn.Tanh(), nn.Linear(5, 5)), work_of()
    with pytest.raises(CellError, match=r"cell '1' \(Linear\) failed on microbatch 1") as caught:
        run(stage, "1F1", torch.ones(2, 3), work)
    assert "(instruction 1F1 on stage 1, device cpu" in str(caught.value)
    last = stage_of(nn.Identity(), is_last=True)
    with pytest.raises(CellError, match="loss failed on microbatch 0"):
        run(last, "1F0", torch.ones(2, 3), work_of(targets=["no tensor"]))
    last = Stage(1, chain_of([nn.Identity()]), CPU, is_last=True, loss=None)
    with pytest.raises(BatchError, match=r"must be one number.*shape \(2, 3\)"):
        run(last, "1F0", torch.ones(2, 3), work_of())


@pytest.mark.parametrize("recomputed", [False, True])
def test_nothing_lives_on_after_the_backward(recomputed: bool) -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin()
            alive.extend([weakref.ref(x), weakref.ref(y)])
            return y.exp()

    stage, work = stage_of(Watch(), nn.Tanh()), work_of(recomputed=recomputed)
    gc.disable()  # reference counting alone must do
    try:
        run(stage, "1F0", torch.ones(2).requires_grad_(), work)
        if recomputed:
            assert not any(reference() is not None for reference in alive)
            run(stage, "1R0", None, work)
        run(stage, "1B0", (torch.ones(2),), work)
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()


def test_clear_forgets_every_flight() -> None:
    stage = stage_of(nn.Linear(3, 3))
    run(stage, "1F0", torch.ones(2, 3), work_of())
    assert list(stage.held())
    stage.clear()
    assert not list(stage.held())


class Switch(nn.Module):
    """Switches gradients for all that follows."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on = on

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(self.on)
        return x * 2


def test_gradients_switched_off_for_what_follows_are_refused() -> None:
    """The next microbatch, on this stage, would lose its gradients without a word."""
    x = torch.randn(2, 3).requires_grad_()
    whole = run(stage_of(nn.Linear(3, 3), Switch(False), Switch(True)), "1F0", x, work_of())
    assert isinstance(whole, torch.Tensor)
    with pytest.raises(CellError, match=r"left gradients disabled after microbatch 0.*no_grad"):
        run(stage_of(nn.Linear(3, 3), Switch(False)), "1F0", x, work_of())
    assert torch.is_grad_enabled()
    with torch.no_grad():  # where there are none, nothing is lost
        run(stage_of(Switch(True)), "1F0", x, work_of(Mode.EVALUATE))
        assert not torch.is_grad_enabled()
