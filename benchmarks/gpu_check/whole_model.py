"""A GPT-2-sized model in bfloat16: two stages on one GPU beside the plain model on it."""

import torch
from torch import Tensor, nn

import stagewise
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.subjects import Block
from benchmarks.gpu_check.supervise import Say

AIM = 1.05  # a step over the plain model's


class Embedding(nn.Module):
    """Tokens and positions."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)

    def forward(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return embedded


def model(dry: bool, say: Say) -> None:
    """Step time, memory, loss and gradients of both, with the same microbatches."""
    machine = Machine.here(dry)
    vocabulary, length, width, layers = machine.size((50257, 1024, 768, 12), (101, 8, 16, 2))
    samples, count = machine.samples(4), machine.size(8, 4)
    torch.manual_seed(0)
    blocks = [Block(width, max(1, width // 64)) for _ in range(layers)]
    cells = [Embedding(vocabulary, length, width), *blocks, nn.LayerNorm(width)]
    net = nn.Sequential(*cells, nn.Linear(width, vocabulary, bias=False))
    net = net.to(machine.device, torch.bfloat16)
    ids = torch.randint(0, vocabulary, (samples * count, length), device=machine.device)

    def plain_step() -> Tensor:
        net.zero_grad()
        losses = []
        for part in ids.chunk(count):
            loss = _next_token(net(part), part) / count
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    plain_loss = float(plain_step())
    norm = _norm(net)
    _, plain_ms = machine.milliseconds(plain_step)
    plain_peak = _peak(machine, plain_step)
    half = len(net) // 2
    plan = stagewise.Plan(balance=(half, len(net) - half), schedule="1f1b", num_microbatches=count)
    pipe = stagewise.Pipeline(net, plan, loss=_next_token)

    def step() -> Tensor:
        pipe.zero_grad()
        return pipe.step(ids, target=ids)

    for _ in range(machine.size(10, 1)):
        loss = step()
    apart = abs(float(loss) - plain_loss) / plain_loss
    norms_apart = abs(_norm(net) - norm) / norm
    say("loss", ok=apart < 0.01, ours=float(loss), plain=plain_loss)
    say("norm of the gradients", ok=norms_apart < 0.02, relative_difference=norms_apart)
    hosts, ours_ms = machine.milliseconds(step)
    over = ours_ms / plain_ms
    say("a step", aim=machine.aim(over <= AIM), ours_ms=ours_ms, plain_ms=plain_ms, over_plain=over)
    tokens = ids.numel() / ours_ms * 1e3
    say("in figures", host_ms=hosts, tokens_per_second=tokens, plain_peak_mib=plain_peak)
    say("memory", peak_mib=_peak(machine, step), plain_peak_mib=plain_peak)


def _next_token(output: Tensor, target: Tensor) -> Tensor:
    logits = output[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, target[:, 1:].flatten())


def _norm(net: nn.Module) -> float:
    return float(torch.stack([p.grad.float().norm() for p in net.parameters()]).norm())


def _peak(machine: Machine, call) -> float | None:
    if machine.device.type != "cuda":
        return None
    machine.wait()
    torch.cuda.reset_peak_memory_stats()
    call()
    machine.wait()
    return torch.cuda.max_memory_allocated() / 2**20
