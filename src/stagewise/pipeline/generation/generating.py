"""`pipe.generate`: the model's own `generate` on every rank, with tokens that one rank chooses.

The rank with the logits chooses and tells the others, which choose what they were told; all so run
the same loop, to the same end. Greedy tokens are those of the plain model. Sampled ones are, too,
with the same seed, as long as one lane draws them.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import ModelError, UsageError
from stagewise.pipeline.generation.shared_units import Agreed
from stagewise.pipeline.generation.spread import SpreadModel
from stagewise.pipeline.generation.turns import Turns

_WHAT, _CALLS = "generate", itertools.count()
# What one process alone can do: options of `generate`, with values that do not ask for it.
_ALONE: Mapping[str, tuple[object, ...]] = {
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "max_time": (None,),
    "custom_generate": (None,),
}


def generate_on_ranks(
    model: Any,
    ranks: Ranks,
    own: Mapping[str, torch.Tensor],
    agreed: Agreed,
    lanes: int | None,
    options: dict[str, Any],
) -> Any:
    """Return what `model.generate(**options)` does, on every rank; collective."""
    options.setdefault("use_cache", True)  # a trainer's model has it off
    spread = SpreadModel(model, ranks, own, agreed)
    what = f"{_WHAT} {next(_CALLS)}"
    config = options.get("generation_config") or model.generation_config
    _refuse(options, config)

    def asked(name: str) -> Any:
        return options.get(name, getattr(config, name, None))

    in_full = (asked("num_beams") or 1) > 1 or bool(asked("return_dict_in_generate"))
    if in_full:
        lanes = 1
    samples = asked("do_sample")
    if lanes is None:
        lanes = 1 if samples or options.get("streamer") is not None else ranks.num_ranks
    if not spread.flows_forward():
        lanes = 1  # a rank before takes both tokens and values, which have one order
    torch.set_rng_state(ranks.broadcast(torch.get_rng_state(), 0).cpu())
    parts = _parts(options, lanes)
    turns = Turns()

    def lane(part: dict[str, Any]) -> Callable[[], Any]:
        choice = _Choice(ranks, spread, turns, in_full=in_full)
        return partial(_one_lane, model, part, choice, _autocast_here())

    try:
        with spread.run():
            found = turns.run([*map(lane, parts)])
        ranks.finish()
    except MetNaN:  # as all ranks have
        raise
    except Exception as error:
        ranks.fail_in(what, error, clean=not spread.has_moved)
        raise
    return _joined(found, options, config)


def _one_lane(model: Any, options: dict[str, Any], choice: "_Choice", cast: torch.autocast) -> Any:
    processors = LogitsProcessorList([*(options.pop("logits_processor", None) or ()), choice])
    told = _Told(choice)
    criteria = StoppingCriteriaList([*(options.pop("stopping_criteria", None) or ()), told])
    with cast:  # of the caller, whose thread this need not be
        return model.generate(**options, logits_processor=processors, stopping_criteria=criteria)


def _autocast_here() -> torch.autocast:
    here = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if here is None else here.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )


class _Choice(LogitsProcessor):  # type: ignore[misc]
    """Where the logits are, they stay; elsewhere the token that was chosen there has all weight.

    With `in_full` the scores travel, for beams and results that need them.
    """

    def __init__(self, ranks: Ranks, spread: SpreadModel, turns: Turns, *, in_full: bool) -> None:
        self._ranks, self._spread, self._turns, self._in_full = ranks, spread, turns, in_full
        self._has_logits = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        source = self._spread.at
        self._has_logits = source in (None, self._ranks.rank)
        if self._has_logits:
            if bool(scores.isnan().any()):
                self._tell(scores if self._in_full else torch.full_like(input_ids[:, -1], -1))
                raise _mixed()
            if self._in_full:
                self._tell(scores)
            return scores
        self._turns.pass_on()
        assert source is not None
        room = scores if self._in_full else input_ids[:, -1]
        (chosen,) = self._ranks.receive(source, [room.contiguous()])
        if bool((chosen.isnan() if self._in_full else chosen < 0).any()):
            raise _mixed()
        if self._in_full:
            return chosen
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

    def chosen(self, tokens: torch.Tensor) -> None:
        """Tell the others, if they do not know, and let the other lanes have their turn."""
        if self._has_logits and not self._in_full:
            self._tell(tokens)
            self._turns.pass_on()

    def _tell(self, tokens: torch.Tensor) -> None:
        for rank in range(self._ranks.num_ranks):
            if rank != self._ranks.rank:
                self._ranks.send(rank, [tokens.contiguous()])


class _Told(StoppingCriteria):  # type: ignore[misc]
    """Never stops; sees every token once it is chosen."""

    def __init__(self, choice: _Choice) -> None:
        self._choice = choice

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._choice.chosen(input_ids[:, -1].clone())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class MetNaN(ModelError):
    """What every rank raises, since the one with the logits tells the others."""


def _mixed() -> MetNaN:
    return MetNaN(
        "generate met NaN: either the model's outputs are, or its forward uses a layer's output "
        "again outside its blocks, which ranks do not have; save the model, and generate in one "
        "process"
    )


def _refuse(options: Mapping[str, Any], config: Any) -> None:
    for name, harmless in _ALONE.items():
        value = options.get(name, getattr(config, name, None))
        if value not in harmless:
            raise UsageError(
                f"generate({name}={value!r}) needs the whole model in one process, and this one is "
                "on several ranks: they follow one sequence for each prompt, greedily or sampled; "
                f"leave {name} out, or save the model and generate in one process"
            )


def _parts(options: dict[str, Any], lanes: int) -> list[dict[str, Any]]:
    """Return the options of each lane, which has some of the prompts."""
    prompts = next(
        (v for k in ("inputs", "input_ids", "inputs_embeds") if (v := options.get(k)) is not None),
        None,
    )
    if prompts is None or lanes < 2 or len(prompts) < 2:
        return [options]
    size = len(prompts)

    def part(first: int, last: int) -> dict[str, Any]:
        is_split: Callable[[Any], bool] = lambda v: (  # noqa: E731
            isinstance(v, torch.Tensor) and v.dim() > 0 and len(v) == size
        )
        return {k: v[first:last] if is_split(v) else v for k, v in options.items()}

    lanes = min(lanes, size)
    edges = [size * number // lanes for number in range(lanes + 1)]
    return [part(*edges[n : n + 2]) for n in range(lanes)]


def _joined(found: list[Any], options: Mapping[str, Any], config: Any) -> Any:
    """Return the lanes' tokens together; lanes that ended early are padded, as rows are."""
    if len(found) == 1:
        return found[0]
    pad = options.get("pad_token_id", config.pad_token_id)
    if pad is None:
        end = options.get("eos_token_id", config.eos_token_id)
        pad = 0 if end is None else torch.as_tensor(end).reshape(-1)[0].item()
    longest = max(tokens.shape[1] for tokens in found)
    more = [nn.functional.pad(t, (0, longest - t.shape[1]), value=int(pad)) for t in found]
    return torch.cat(more)
