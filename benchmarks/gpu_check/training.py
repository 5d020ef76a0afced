"""Training as users do it: mixed precision with a scaler, and a model that is captured."""

import torch
from torch import Tensor, nn

import stagewise
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.subjects import Block, Result, Subject, pipeline
from benchmarks.gpu_check.supervise import Say


def scaler(dry: bool, say: Say) -> None:
    """Half precision with a scale that overflows at first, and a fused AdamW."""
    machine = Machine.here(dry)
    subject = Subject(machine, "no dropout")
    pipe = pipeline(subject.model(), 4, recompute="always", num_microbatches=4)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-3, fused=True)
    # The CPU's half precision is bfloat16, which has float32's range.
    dtype = machine.size(torch.float16, torch.bfloat16)
    own = stagewise.GradScaler(pipe, init_scale=2.0**40)
    inputs, target = subject.batch()
    losses, skipped = [], 0
    for _ in range(machine.size(60, 12)):
        optimizer.zero_grad()
        before = own.get_scale()
        with torch.autocast(machine.device.type, dtype=dtype):
            losses.append(float(pipe.step(inputs, target=target, loss_scale=before)))
        own.unscale_(optimizer)
        pipe.clip_grad_norm_(1.0)
        own.step(optimizer)
        own.update()
        skipped += own.get_scale() < before
    finite = all(bool(p.isfinite().all()) for p in pipe.parameters())
    say(
        "half precision, scaled",
        ok=finite and (machine.dry or skipped > 0) and losses[-1] < losses[0],
        first_loss=losses[0],
        last_loss=losses[-1],
        skipped=skipped,
    )


class LanguageModel(nn.Module):
    """A small language model that is no chain of cells: it has to be captured."""

    def __init__(self, vocabulary: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.tokens.weight.T


def captured(dry: bool, say: Say) -> None:
    """Capture on the CPU, train on the device; compare with the unchanged module there."""
    machine = Machine.here(dry)
    name, model = _unmodified(machine)
    plain = _unmodified(machine)[1].to(machine.device)
    ids = torch.randint(0, 97, (8, 16), generator=torch.Generator().manual_seed(2))
    there = ids.to(machine.device)
    loss = _next_token(plain(there), there)
    loss.backward()
    plan = stagewise.plan(
        model, ids, target=ids, loss=_next_token, num_stages=2, num_microbatches=4, seconds=0.1
    )
    pipe = stagewise.Pipeline(model, plan, loss=_next_token, devices=[machine.device] * 2)
    for _ in range(2):
        pipe.zero_grad()
        ours = pipe.step(there, target=there)
    apart = Result.of(loss, plain).difference(Result.of(ours, pipe))
    say(f"captured {name}, float64", ok=apart < 1e-9, difference=apart, cut=plan.balance)


def _unmodified(machine: Machine) -> tuple[str, nn.Module]:
    """Return transformers' GPT-2 where there is one, else our own."""
    torch.manual_seed(0)
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return "model", LanguageModel(97, machine.size(64, 16), machine.size(6, 2)).double()
    sizes = dict(vocab_size=97, n_positions=16, n_embd=64, n_layer=6, n_head=4)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    return "GPT-2 of transformers", GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout)).double()


def _next_token(output: object, target: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output["logits"]  # type: ignore[index]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
