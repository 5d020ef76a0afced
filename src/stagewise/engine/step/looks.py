"""When to look for what would be another number than the plain model's: at first, and again.

Problem: a look runs the loss several times over, so that not every call may have one; but padding
that begins in the hundredth batch makes a mean count otherwise than it did until then.
Idea: look again where something is new: another form of the batch, or a value below or above all
before it (an index to ignore, a padded place, a mask's first zero); and in calls 2, 4, 8, ... of a
mode. The number of looks grows as the logarithm of that of calls. Extremes of tensors on the CPU
take microseconds; those of others are taken where the call waits for them anyway.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.utils import _pytree as pytree

from stagewise.batch.markers import Microbatches
from stagewise.engine.stage.call import Call, Mode
from stagewise.engine.step.counting import extremes, left_out, most_unlike, values_in
from stagewise.engine.step.digest import is_compared
from stagewise.engine.step.first_look import FirstLook

_FREE_LOOKS, _LOOKS_PER_OCTAVE = 8, 2


@dataclass(kw_only=True)
class _Seen:
    """What calls of one mode had."""

    num_calls: int = 0
    num_looks: int = 0
    forms: set[int] = field(default_factory=set)
    extremes: dict[str, tuple[float, float]] = field(default_factory=dict)

    def is_new(self, form: int, ends: Mapping[str, tuple[float, float]]) -> bool:
        """Whether a call is one to look at; it counts as seen."""
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
    """Decides which calls are looked at, and says what was found, each once."""

    def __init__(
        self,
        weight: Callable[..., object] | None,
        loss: Callable[..., object] | None,
        *,
        sums_losses: bool,
    ) -> None:
        self._weight, self._loss, self._sums = weight, loss, sums_losses
        self._seen: defaultdict[Mode, _Seen] = defaultdict(_Seen)
        self._said: dict[str, int] = {}  # by what is wrong: how badly

    def at(self, call: Call, form: int, batch: Sequence[object]) -> FirstLook | None:
        """A look at a call, if it is one to look at; `batch` is inputs, target, keywords."""
        if len(call.sizes) < 2:
            return None
        seen = self._seen[call.mode]
        new = seen.is_new(form, _extremes(batch, is_compared(seen.num_calls)))
        if not new or _has_sizes(batch):
            return None
        parts = (call.targets, call.keywords)
        return FirstLook(
            call.sizes,
            call.batch_dim,
            weight=self._weight,
            sums_losses=self._sums,
            loss=None if call.mode is Mode.PREDICT else self._loss,
            unlike=most_unlike([*zip(*filter(None, parts), strict=True)]),
            again=seen.num_calls > 1,
        )

    def problems(self, call: Call) -> list[str]:
        """What is wrong with a call that is over, in words, and was not said before."""
        found = dict(call.look.found) if isinstance(call.look, FirstLook) else {}
        if text := self._over_nothing(call):
            found["nothing"] = 0, text
        new = {w: v for w, v in found.items() if v[0] > self._said.get(w, -1)}
        self._said |= {what: badly for what, (badly, _) in new.items()}
        return [text for _, text in new.values()]

    def _over_nothing(self, call: Call) -> str | None:
        """A mean over nothing is no number, though that of the whole batch is one."""
        if len(call.losses) < 2 or not self._may_wait(call):
            return None
        is_nan = {
            m: any(bool(loss.isnan()) for name, loss in own.items() if call.share(name, m))
            for m, own in call.losses.items()
        }
        if all(is_nan.values()):
            return None
        for m in (m for m, nan in is_nan.items() if nan):
            target = call.targets[m] if call.targets else None
            given = call.keywords[m] if call.keywords else {}
            if (found := left_out(target, given)) is not None:
                what, code = found
                by_target = what.startswith("target")
                return (
                    f"the loss of microbatch {m} is a mean over nothing, and no number, where "
                    f"others are finite and the whole batch's is: {what}; "
                    + ("" if by_target else "let the model return its outputs, and ")
                    + ("give Pipeline " if by_target else "give Pipeline the loss function and ")
                    + f"weight=lambda target: {code}, by which such a microbatch counts nothing"
                )
        return None

    def _may_wait(self, call: Call) -> bool:
        losses = [loss for own in call.losses.values() for loss in own.values()]
        on_cpu = all(loss.device.type == "cpu" for loss in losses)
        return on_cpu or is_compared(self._seen[call.mode].num_calls)


def _has_sizes(batch: object) -> bool:
    """Whether Microbatches in it say their sizes, so that no dimension tells what a sample is."""
    leaves = pytree.tree_leaves(batch, is_leaf=lambda node: isinstance(node, Microbatches))
    return any(isinstance(leaf, Microbatches) and leaf.sizes is not None for leaf in leaves)


def _extremes(batch: Sequence[object], may_wait: bool) -> dict[str, tuple[float, float]]:
    inputs, *others = batch
    tensors = [*values_in(inputs, integers_only=True), *values_in(others)]
    return {
        f"{i}{place}": extremes(tensor)
        for i, (place, tensor) in enumerate(tensors)
        if may_wait or tensor.device.type == "cpu"
    }
