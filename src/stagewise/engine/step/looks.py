"""Decide which calls are looked at for silent differences from the plain model.

Problem: a look runs the loss several times, so that not every call can have one; but padding that
begins in the hundredth batch changes how samples count in a mean.
Idea: among the calls that are examined (the first ones, then now and then), look again where
something is new: another form of the batch, or a value below or above all before it (an index to
ignore, a padded place, a mask's first zero). Also look at calls 2, 4, 8, ... of a mode, and at any
call before which an attribute of a cell was set (`unchanged`). The number of looks grows as the
logarithm of the number of calls. Each finding is warned of once.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from stagewise.batch.markers import Microbatches
from stagewise.engine.looks.counting import extremes, left_out, most_unlike, values_in
from stagewise.engine.looks.first_look import MOST_PAIRS, FirstLook
from stagewise.engine.looks.mixing import MixingLook
from stagewise.engine.stage.draws import Source
from stagewise.engine.stage.gradient import gradients_aside
from stagewise.engine.stage.loss import Loss, share_of
from stagewise.engine.stage.randomness import LOSS_CELL
from stagewise.engine.stage.same_again import compared
from stagewise.engine.stage.work import (
    Again,
    CellForward,
    Losses,
    Mode,
    Parts,
    RunCell,
    StageGiven,
    Work,
)
from stagewise.engine.step.admission import Admitted
from stagewise.engine.step.step_request import Request
from stagewise.engine.step.weights import LossCount
from stagewise.errors import ExactnessWarning
from stagewise.model.added_losses import LossCollector
from stagewise.model.cell import Cell, Chain
from stagewise.model.forward.carried import Carried, WatchedCode
from stagewise.model.forward.users_code import is_stock, warn_user
from stagewise.model.forward.visible import Sight

_FREE_LOOKS, _LOOKS_PER_OCTAVE = 8, 2


@dataclass(frozen=True, kw_only=True)
class CallLook:
    """Looks at one call: its losses, the state that its code carries over, and cells that mix."""

    losses: FirstLook
    carried: Carried
    mixing: MixingLook | None = None
    _stock: dict[int, bool] = field(default_factory=dict)  # cell -> whether it is torch's

    @property
    def found(self) -> dict[str, tuple[int, str]]:
        """What is wrong -> how badly, and in words."""
        mixing = {} if self.mixing is None else self.mixing.found
        others = {what: (0, text) for what, text in (mixing | self.carried.found).items()}
        return self.losses.found | others

    def stage_begins(self, cells: Chain, run: RunCell, given: StageGiven, m: int) -> None:
        """Call before `cells` run on what they are given of microbatch m."""
        if self.mixing is not None:
            self.mixing.stage_begins(cells, run, given, m)

    def cells(
        self,
        calls: Sequence[tuple[Cell, CellForward]],
        collector: LossCollector,
        m: int,
        last: Cell | None,
        again: Again,
    ) -> Sequence[tuple[Cell, CellForward]]:
        """Return `calls` of microbatch m, wrapped; `last` is the last cell of the whole chain."""
        stage = calls[0][0].index
        if last is not None:
            self.carried.last_stage = stage
        watched: list[tuple[Cell, CellForward]] = []
        for cell, forward in calls:
            if cell.index not in self._stock:
                self._stock[cell.index] = is_stock(cell.module)
            run = forward
            if not self._stock[cell.index]:
                code = WatchedCode(cell.index, stage, f"cell {cell.name!r}", cell.module)
                rerun = partial(_restored, again, cell.index, m, cell.module)
                run = self.carried.watched(code, forward, rerun, compared)
            if cell is last or not self._stock[cell.index]:
                run = self.losses.watched(cell, run, collector, m, is_last=cell is last)
            watched.append((cell, run))
        return watched

    def loss(self, loss: Loss, m: int, again: Again) -> Loss:
        """Return `loss` for microbatch m, wrapped."""
        run: Callable[..., object] = loss
        if not is_stock(loss):
            code = WatchedCode(LOSS_CELL, self.carried.last_stage, "the loss function", loss)
            rerun = partial(_restored, again, LOSS_CELL, m, loss)
            run = self.carried.watched(code, loss, rerun, compared)

        def watched(output: object, *target: object) -> Losses:
            value = run(output, *target)
            self.losses.loss_ran(loss, m, output, list(target))
            return value  # type: ignore[return-value]

        return watched


@contextmanager
def _restored(again: Again, cell: int, m: int, code: object) -> Iterator[None]:
    """Run `code` inside as it ran on microbatch m; gradients that it adds itself are dropped."""
    parameters = code.parameters() if isinstance(code, nn.Module) else ()
    with gradients_aside(parameters), again(cell, m):
        yield


@dataclass(kw_only=True)
class _Seen:
    """What the calls of one mode have contained."""

    num_calls: int = 0
    num_looks: int = 0
    forms: set[int] = field(default_factory=set)
    extremes: dict[str, tuple[float, float]] = field(default_factory=dict)

    def is_new(self, form: int, ends: Mapping[str, tuple[float, float]]) -> bool:
        """Return whether a call is one to look at, and remember it."""
        self.num_calls += 1
        new = form not in self.forms or not self.num_calls & (self.num_calls - 1)
        self.forms.add(form)
        for name, (least, greatest) in ends.items():
            low, high = self.extremes.get(name, (least, greatest))
            new |= least < low or greatest > high
            self.extremes[name] = min(low, least), max(high, greatest)
        allowed = _FREE_LOOKS + _LOOKS_PER_OCTAVE * self.num_calls.bit_length()
        self.num_looks += new and self.num_looks < allowed
        return new and self.num_looks <= allowed


class Looks:
    """Decides which calls are looked at, and warns once of each finding."""

    def __init__(self, count: LossCount, loss: Callable[..., object] | None) -> None:
        self._count, self._loss = count, loss
        self._seen: defaultdict[Mode, _Seen] = defaultdict(_Seen)
        self._sights: dict[type, Sight] = {}  # by class of a cell
        self._sight = Sight(named_only=True)  # of all cells
        # The cells of other ranks, by name, for as long as they are alive here.
        self.elsewhere: Mapping[str, weakref.ref[Any]] = {}
        self._at_ones: set[Mode] = set()  # whose first call of one microbatch was looked at
        self._said: dict[str, int] = {}  # what is wrong -> how badly
        self.told: list[str] = []  # in words, what the last call's warnings say
        self.are_off = False  # cells may not run again on copies
        self.unwatched = set(Mode)  # modes in which it is not known what cells draw from

    def at(
        self, request: Request, admitted: Admitted, parts: Parts, *, flags: bool
    ) -> CallLook | None:
        """Return a look at a call, if it needs one; `flags`: an attribute of a cell was set."""
        sizes = admitted.sizes
        if request.observe is not None or self.are_off:
            return None
        if len(sizes) < 2:
            return self._at_one(request, sizes)
        seen, batch = self._seen[request.mode], (request.inputs, request.target, request.keywords)
        is_new = seen.is_new(admitted.signature, _extremes(batch)) or flags
        if not is_new or _has_sizes(batch):
            return None
        is_first, mixing = seen.num_calls == 1, None
        if is_first or flags or seen.num_calls >= _FREE_LOOKS:
            mixing = MixingLook(
                sizes,
                request.batch_dim,
                request.keywords,
                with_backward=request.mode is Mode.TRAIN,
                sight=self._sight,
            )
        losses = FirstLook(
            sizes,
            request.batch_dim,
            weight=self._count.weight,
            sums_losses=self._count.sums,
            loss=None if request.mode is Mode.PREDICT else self._loss,
            unlike=most_unlike([*zip(*filter(None, (parts.targets, parts.keywords)), strict=True)]),
            num_pairs=MOST_PAIRS if is_first else 1,
        )
        carried = Carried(sights=self._sights, is_first=is_first)
        return CallLook(losses=losses, carried=carried, mixing=mixing)

    def _at_one(self, request: Request, sizes: Sequence[int]) -> CallLook | None:
        """Look at a first call of one microbatch for what cells leave for those of other ranks."""
        if not self.elsewhere or request.mode in self._seen or request.mode in self._at_ones:
            return None
        self._at_ones.add(request.mode)
        losses = FirstLook(sizes, request.batch_dim, weight=None, sums_losses=False, loss=None)
        return CallLook(losses=losses, carried=Carried(sights=self._sights, is_first=True))

    def warn(self, work: Work, late: Sequence[Source]) -> None:
        """Warn of what is wrong with a finished call, and of what cells began to draw from."""
        found: dict[str, tuple[int, str]] = {}
        if isinstance(work.look, CallLook):
            work.look.carried.look_elsewhere(self.elsewhere)
            found |= work.look.found
        for name, own in work.record.partial.items():
            found[f"partial {name}"] = 0, _partial(name, own, work)
        if text := self._over_nothing(work):
            found["nothing"] = 0, text
        if late:
            self.unwatched.add(work.mode)
            names = ", ".join(sorted({source.name for source in late}))
            found[f"draws from {names}"] = (
                0,
                f"numbers were drawn from {names} while a {work.mode.name.lower()} call ran, for "
                "the first time; if a cell drew them, its recomputation in this step drew others, "
                "and gradients are wrong. From the next step on they are seeded for every cell and "
                "microbatch",
            )
        new = {w: v for w, v in found.items() if v[0] > self._said.get(w, -1)}
        self._said |= {what: badly for what, (badly, _) in new.items()}
        self.told = [text for _, text in new.values()]
        for text in self.told:
            warn_user(text, ExactnessWarning)

    def _over_nothing(self, work: Work) -> str | None:
        """Describe a microbatch whose loss is a mean over nothing: NaN, unlike that of others."""
        if len(work.record.losses) < 2:
            return None
        is_nan = {
            m: any(bool(loss.isnan()) for name, loss in own.items() if share_of(work, name, m))
            for m, own in work.record.losses.items()
        }
        if all(is_nan.values()):
            return None
        for m in (m for m, nan in is_nan.items() if nan):
            target = work.parts.targets[m] if work.parts.targets else None
            given = work.parts.keywords[m] if work.parts.keywords else {}
            if (found := left_out(target, given)) is not None:
                what, code = found
                by_target = what.startswith("target")
                return (
                    f"the loss of microbatch {m} is a mean over nothing, and no number, where "
                    f"others are finite and the whole batch's is: {what}; "
                    + ("" if by_target else "let the model return its outputs, and ")
                    + ("give Pipeline " if by_target else "give Pipeline the loss function and ")
                    + f"weight=lambda target: {code}, by which such a microbatch counts nothing "
                    "(whether others then count as in the whole batch was not tried: the next look "
                    "at this weight tells)"
                )
        return None


def _partial(name: str, own: Sequence[int], work: Work) -> str:
    is_added = any(added.name == name for parts in work.record.added.values() for added in parts)
    remedy = (
        "let the cell add it in every microbatch, as a mean over all samples at hand in which "
        "those that it leaves out are 0"
        if is_added
        else "return it from every microbatch (0 if it does not apply), and give Pipeline a "
        f"weight(target) that returns a dict with {name!r}: the number of samples in the loss"
    )
    return (
        f"the loss {name!r} was computed in {len(own)} of {len(work.sizes)} microbatches only "
        f"({', '.join(map(str, own))}), and counts by their share of the batch, as if it were 0 in "
        "the others; a plain model that averages it over the samples to which it applies gives "
        f"another number: {remedy}"
    )


def _has_sizes(batch: object) -> bool:
    """Return whether Microbatches in it give sizes: then no dimension is known to hold samples."""
    leaves = pytree.tree_leaves(batch, is_leaf=lambda node: isinstance(node, Microbatches))
    return any(isinstance(leaf, Microbatches) and leaf.sizes is not None for leaf in leaves)


def _extremes(batch: Sequence[object]) -> dict[str, tuple[float, float]]:
    inputs, *others = batch
    tensors = [*values_in(inputs, integers_only=True), *values_in(others)]
    return {f"{i}{place}": extremes(tensor) for i, (place, tensor) in enumerate(tensors)}
