"""Published formulas for schedules on equal stages: the bubble and the microbatches in flight.

In formulas K is the number of devices, d a device, v the stages on each, M the microbatches, g
Megatron's group (K if M is a multiple of it); F, I, W are one stage's seconds per microbatch for
the forward and the two halves of the backward, and B = I + W. The bubble is the time that each
device idles in one step, from the start of the first instruction to the end of the last.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from stagewise.schedule.interleaved import group_sizes

Seconds = Fraction | float


@dataclass(frozen=True, kw_only=True)
class EqualStages:
    """The variables of the formulas: K, M, v and the seconds of one stage."""

    num_devices: int
    num_microbatches: int
    stages_per_device: int
    forward_seconds: Seconds
    input_seconds: Seconds
    weight_seconds: Seconds

    @property
    def backward_seconds(self) -> Seconds:
        """Return B."""
        return self.input_seconds + self.weight_seconds

    @property
    def round_seconds(self) -> Seconds:
        """Return F + B."""
        return self.forward_seconds + self.backward_seconds

    @property
    def busy_seconds(self) -> Seconds:
        """Return each device's work in a step."""
        return self.num_microbatches * self.stages_per_device * self.round_seconds


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """Each device's idle seconds in a step, or an upper bound if not `exact`."""

    formula: str
    seconds: Callable[[EqualStages], Seconds]
    where: str = ""  # the condition `holds`, as text
    holds: Callable[[EqualStages], bool] = lambda _: True
    exact: bool = True

    def fraction(self, stages: EqualStages) -> Seconds:
        """Return the idle share of the step."""
        idle = self.seconds(stages)
        return idle / (idle + stages.busy_seconds)

    def __str__(self) -> str:
        return "at most " * (not self.exact) + self.formula + f" ({self.where})" * bool(self.where)


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A device's peak number of microbatches between `F` and `B` or `W`, summed over its stages.

    It is `count(K, M, v, d)`, or at most that if not `exact`.
    """

    formula: str
    count: Callable[[int, int, int, int], int]
    exact: bool = True

    def __str__(self) -> str:
        return "at most " * (not self.exact) + self.formula


def _equal(stages: EqualStages) -> bool:
    return stages.forward_seconds == stages.input_seconds == stages.weight_seconds


def _short_weights(stages: EqualStages) -> bool:
    return stages.weight_seconds <= min(stages.forward_seconds, stages.input_seconds)


def _missing_microbatches(stages: EqualStages) -> int:
    """Return how many microbatches are missing to fill all devices."""
    return max(0, stages.num_devices - stages.num_microbatches)


FILL = Bubble(  # Huang et al., arXiv:1811.06965, section 2.3; Narayanan et al., arXiv:2104.04473
    formula="(K-1)(F+B)",
    seconds=lambda s: (s.num_devices - 1) * s.round_seconds,
)
LOOPED = Bubble(  # arXiv:2104.04473, section 2.2, for M >= K
    formula="(K-1)(F+B) + (v-1)max(0,K-M)(F+B)",
    seconds=lambda s: (
        (s.num_devices - 1 + (s.stages_per_device - 1) * _missing_microbatches(s)) * s.round_seconds
    ),
)
ZIGZAG = Bubble(
    formula="(K-1)(F+B)",
    seconds=FILL.seconds,
    where="F/2 <= B <= 2F, M >= 2K",
    holds=lambda s: (
        s.num_microbatches >= 2 * s.num_devices
        and s.forward_seconds <= 2 * s.backward_seconds <= 4 * s.forward_seconds
    ),
)
ZB_H1 = Bubble(  # arXiv:2401.10241, table 2, for M >= K
    formula="(K-1)(F+I-W) + max(0,K-M)W",
    seconds=lambda s: (
        (s.num_devices - 1) * (s.round_seconds - 2 * s.weight_seconds)
        + _missing_microbatches(s) * s.weight_seconds
    ),
    where="W <= F, W <= I",
    holds=_short_weights,
)
ZB_V = Bubble(  # arXiv:2401.10241, section 6: no idle time after a device's first instruction
    formula="(K-1)F",
    seconds=lambda s: (s.num_devices - 1) * s.forward_seconds,
    where="F = I = W, M >= K",
    holds=lambda s: _equal(s) and s.num_microbatches >= s.num_devices,
)
V_HALF = Bubble(  # p/2m of the work, github.com/sail-sg/zero-bubble-pipeline-parallelism
    formula="K(F+B)",
    seconds=lambda s: s.num_devices * s.round_seconds,
    where="F = I = W, M >= K",
    holds=ZB_V.holds,
    exact=False,
)
V_MIN = Bubble(  # 2p/3m of the work, same source
    formula="4K(F+B)/3",
    seconds=lambda s: s.num_devices * s.round_seconds * 4 / 3,
    where="F = I = W",
    holds=_equal,
    exact=False,
)
DUALPIPE_V = Bubble(  # (PP/2-1)(F&B+B-3W), PP = 2K, F&B = F+B: github.com/deepseek-ai/DualPipe
    formula="(K-1)(F+2B-3W)",
    seconds=lambda s: (
        (s.num_devices - 1) * (s.forward_seconds + 2 * s.backward_seconds - 3 * s.weight_seconds)
    ),
    where="W <= I, W <= F <= B, M >= 2K",
    holds=lambda s: (
        _short_weights(s)
        and s.forward_seconds <= s.backward_seconds
        and s.num_microbatches >= 2 * s.num_devices
    ),
    exact=False,
)

ALL = InFlight(formula="vM", count=lambda k, m, v, d: v * m)
ONE_F_ONE_B = InFlight(formula="min(M, K-d)", count=lambda k, m, v, d: min(m, k - d))
INTERLEAVED = InFlight(  # one more than Megatron-LM's num_warmup_microbatches
    formula="min(vM, (v-1)g + 2(K-d) - 1)",
    count=lambda k, m, v, d: min(v * m, (v - 1) * max(group_sizes(k, m)) + 2 * (k - d) - 1),
)
INTERLEAVED_V = InFlight(
    formula="K ceil(v max(v,3)/2), K for v=1",
    count=lambda k, m, v, d: min(v * m, k * (-(-v * max(v, 3) // 2) if v > 1 else 1)),
    exact=False,
)
ONE_F_ONE_B_FIRST = InFlight(formula="min(M, K)", count=lambda k, m, v, d: min(m, k))
V_AS_1F1B = InFlight(formula="2 min(M, K)", count=lambda k, m, v, d: 2 * min(m, k), exact=False)
V_AS_HALF = InFlight(  # table in the same repository: (p+2)//2 microbatches, both stages of each
    formula="2 floor((K+2)/2)", count=lambda k, m, v, d: min(2 * m, 2 * ((k + 2) // 2)), exact=False
)
V_AS_THIRD = InFlight(  # same table: (p+4)//3
    formula="2 floor((K+4)/3)", count=lambda k, m, v, d: min(2 * m, 2 * ((k + 4) // 3)), exact=False
)
DUALPIPE = InFlight(  # PP + 1, PP = 2K
    formula="min(2M, 2K+1)", count=lambda k, m, v, d: min(2 * m, 2 * k + 1), exact=False
)
