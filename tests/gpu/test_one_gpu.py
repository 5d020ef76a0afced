"""All stages on one GPU: the bits, failures and running out of memory."""

import pytest
import torch
from torch import Tensor, nn

import stagewise
from benchmarks.gpu_check.exact import COMPARED, WAYS
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.subjects import Block, Result, Subject, mse, pipeline
from stagewise.errors import CellError, OutOfMemoryError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]
MEBIBYTE = 1 << 20


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", COMPARED)
def test_bits_are_those_of_one_stage(kind: str, way: str, machine: Machine) -> None:
    num_stages, options = WAYS[way]
    subject = Subject(machine, kind)
    assert subject.result(1).difference(subject.result(num_stages, **options)) == 0


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_plain_models(way: str, machine: Machine) -> None:
    num_stages, options = WAYS[way]
    subject = Subject(machine, "no dropout", torch.float64)
    inputs, target = subject.batch()
    model = subject.model()
    loss = mse(model(inputs), target)
    loss.backward()
    pipe = pipeline(subject.model(), num_stages, **{"num_microbatches": 4, **options})
    ours = Result.of(pipe.step(inputs, target=target), pipe)
    assert Result.of(loss, model).difference(ours) < 1e-12


class FailsOnce(nn.Module):
    """Raises when told to, on the device."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.fails = inner, False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ValueError("as told")
        output: Tensor = self.inner(x)
        return output


def test_a_step_that_failed_leaves_the_pipeline_usable(machine: Machine) -> None:
    subject = Subject(machine, "no dropout")
    inputs, target = subject.batch()
    expected = subject.result(2, num_microbatches=4)
    cells = [FailsOnce(cell) for cell in subject.model()]
    pipe = pipeline(nn.Sequential(*cells), 2, num_microbatches=4)
    cells[-1].fails = True
    with pytest.raises(CellError, match="as told"):
        pipe.step(inputs, target=target)
    cells[-1].fails = False
    pipe.zero_grad()
    loss = pipe.step(inputs, target=target)
    assert torch.equal(loss.cpu(), expected.loss)


def test_out_of_memory_is_named_and_a_smaller_plan_fits(machine: Machine) -> None:
    model = nn.Sequential(*(Block(512) for _ in range(4))).to(machine.device)
    x = torch.randn(32, 512, 512, device=machine.device)
    pipe = pipeline(model, 2, schedule="gpipe", num_microbatches=4)
    torch.cuda.empty_cache()
    used, total = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((used + 300 * MEBIBYTE) / total)
    try:
        with pytest.raises(OutOfMemoryError, match="stage"):
            pipe.step(x, target=x)
        pipe.zero_grad()
        assert torch.cuda.memory_allocated() < used + 32 * MEBIBYTE
        pipe.use(
            stagewise.Plan(balance=(2, 2), schedule="1f1b", num_microbatches=32, recompute="always")
        )
        assert torch.isfinite(pipe.step(x, target=x))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
