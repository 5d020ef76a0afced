"""Observe what a forward does besides computing: questions to torch, changes, random draws.

A counter in an attribute, a hidden state, a draw from Python's random: a trace would freeze them.
The model is run a few times with the same random numbers of torch, and what it can see
(`model.forward.visible`) is inspected in between. A change that only the first call makes is a
cache, such as a mask, and harmless; so are draws and kept values that do not affect outputs.
"""

import random
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stagewise.errors import ExactnessWarning, ModelError
from stagewise.model.added_losses import collect_losses
from stagewise.model.forward.asked import FRESH, VARIED, Asked, AskedOfTensors, asked_of_torch
from stagewise.model.forward.users_code import warn_user
from stagewise.model.forward.visible import Sight
from stagewise.model.forward.watch import Place, changes, name_of, tokens_of
from stagewise.model.verify.compare import output_tensors
from stagewise.model.verify.rare_draws import NUM_SEEDS, save_others
from stagewise.model.verify.situation import EVAL, TRAINING, Situation, kept, seeded, surroundings

Outputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What forward asks of torch (and where), and the names of what it changes.

    `counted` are numbers and the like that change in every call, `followed` tensors that change
    and affect outputs, `assigned` tensors that do not; `touched` are all places that forward ever
    changes. `drawn`: forward draws from Python's or NumPy's random; `draws`: that affects outputs;
    `varies`: outputs differ between calls for no visible reason.
    """

    asked: Asked
    counted: tuple[str, ...]
    followed: tuple[str, ...]
    assigned: tuple[str, ...]
    touched: frozenset[Place]
    drawn: bool
    draws: bool
    varies: bool


def check_effects(model: nn.Module, found: Observed, *, draws: bool) -> None:
    """Raise ModelError for effects that cells would not reproduce; warn of harmless ones.

    With `draws`, also for random numbers other than torch's.
    """
    what, remedy = "", ""
    if found.counted:
        what = f"changes {', '.join(found.counted[:3])} in every call"
        remedy = "keep it in a buffer (register_buffer) that forward changes in place"
    elif found.followed:
        what = f"keeps state that affects the next call in {', '.join(found.followed[:3])}"
        remedy = "keep it in a buffer (register_buffer), or pass it in and return it"
    elif found.draws and draws:
        what, remedy = "draws from Python's or NumPy's random numbers", "draw with torch"
    elif found.varies and draws:
        what = "returns something else in every call, with the same random numbers of torch"
        remedy = (
            "draw from torch's default generator, and pass in what changes (an iterator's next "
            "item, the time)"
        )
    if what:
        raise ModelError(
            f"forward of {type(model).__name__} {what}, which cells would not reproduce; {remedy}"
        )
    unsure = FRESH if FRESH in found.asked else VARIED if found.drawn else ""
    if draws and unsure in found.asked:
        warn_user(
            f"forward of {type(model).__name__} {unsure} ({found.asked[unsure]}): they did not "
            "affect its outputs in a few trials, but the cells of the captured model draw none; "
            "draw from torch's default generator",
            ExactnessWarning,
        )
    if found.assigned:
        warn_user(
            f"forward of {type(model).__name__} assigns {', '.join(found.assigned[:3])}, which "
            "the cells of the captured model do not; return it from the model instead, or add it "
            "with stagewise.add_loss if it is a loss"
        )


def observed(
    model: nn.Module, example: Mapping[str, object], runs_itself: Iterable[nn.Module]
) -> Observed:
    """Run `model` on its example, in both modes, and undo its changes to modules."""
    sight = Sight(runs_itself, named_only=True)
    both = [_in(model, example, sight, situation) for situation in (TRAINING, EVAL)]
    return Observed(
        asked={what: where for one in both for what, where in one.asked.items()},
        counted=tuple(dict.fromkeys(name for one in both for name in one.counted)),
        followed=tuple(dict.fromkeys(name for one in both for name in one.followed)),
        assigned=tuple(dict.fromkeys(name for one in both for name in one.assigned)),
        touched=frozenset().union(*(one.touched for one in both)),
        drawn=any(one.drawn for one in both),
        draws=any(one.draws for one in both),
        varies=any(one.varies for one in both),
    )


def _in(
    model: nn.Module, example: Mapping[str, object], sight: Sight, situation: Situation
) -> Observed:
    def run(seed: int = 0) -> tuple[Outputs, bool]:
        """Return outputs, and whether Python's or NumPy's random numbers were drawn."""
        with seeded(seed), collect_losses() as added:
            before = _states()
            found = output_tensors(model(**_copied(example)))
            drawn = _states() != before
        return {**found, **{f"added loss {name}": loss for name, loss in added.items()}}, drawn

    with kept(model, situation.training), surroundings(model, situation):
        before = tokens_of(model, sight.walk(model))
        with asked_of_torch() as asked:
            first, drawn = run()
        second = first
        with suppress(Exception), AskedOfTensors() as of_tensors:  # some models fail under a mode
            second, _ = run()
        asked |= of_tensors.found
        after = tokens_of(model, sight.walk(model))
        touched, last = changes(before, after), first
        again: list[Place] = []
        if touched:
            last, _ = run()
            later = tokens_of(model, sight.walk(model))
            again = changes(after, later)
        varies = not again and not _equal(first, second) and not _equal(second, run()[0])
        draws = drawn and any(not _equal(last, run(seed)[0]) for seed in range(1, NUM_SEEDS))
    counted = [p for p in again if type(later.get(p, after.get(p))) is tuple]
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    others = [name_of(p) for p in again if p not in counted and name_of(p) not in buffers]
    follows = not _equal(first, last)
    return Observed(
        asked=asked,
        counted=tuple(map(name_of, counted)),
        followed=tuple(others) if follows else (),
        assigned=() if follows else tuple(others),
        touched=frozenset((*touched, *again)),
        drawn=drawn,
        draws=draws,
        varies=varies,
    )


def draws_around(
    model: nn.Module, example: Mapping[str, object], blocks: Iterable[nn.Module]
) -> bool:
    """Return whether forward draws from Python's or NumPy's random numbers outside `blocks`."""
    outside, states = False, list[Callable[[], None]]()
    for situation in (TRAINING, EVAL):
        with kept(model, situation.training), surroundings(model, situation), seeded():
            for block in blocks:
                block.register_forward_pre_hook(lambda *_: states.append(save_others()))
                block.register_forward_hook(lambda *_: states.pop()())
            before = _states()
            with collect_losses():
                model(**_copied(example))
            outside |= _states() != before
    return outside


def _copied(example: Mapping[str, object]) -> dict[str, Any]:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), dict(example))  # type: ignore[no-any-return]


def _states() -> list[object]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return [random.getstate()]
    kind, keys, *rest = numpy.random.get_state()
    return [random.getstate(), kind, keys.tobytes(), *rest]


def _equal(one: Outputs, other: Outputs) -> bool:
    return one.keys() == other.keys() and all(
        t.is_meta or torch.equal(t, other[name]) or bool((t != t).any()) for name, t in one.items()
    )
