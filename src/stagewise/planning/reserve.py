"""What a device's memory holds besides parameters, their state and activations.

1. Rooms: receives posted before their messages are needed (`schedule.posting`), known to the byte.
2. On accelerators the context, libraries' workspaces, and a communicator for each directed link of
   two ranks. Nothing of these was measured by us: they are estimates, with their source.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from stagewise.costs import StageCost
from stagewise.mesh import Placement, device_turns
from stagewise.schedule.posting import POSTED_AHEAD, POSTED_BYTES
from stagewise.units import size_in_words

MiB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """Bytes that every device, and every directed link between two, takes; rooms if `posts`."""

    context_bytes: int = 0
    workspace_bytes: int = 0
    link_bytes: int = 0
    posts: bool = False  # whether devices are ranks of their own, which post receives

    def __str__(self) -> str:
        text = "receives posted ahead" if self.posts else ""
        if self.context_bytes:
            more = [self.context_bytes, self.workspace_bytes, self.link_bytes]
            context, workspace, link = map(size_in_words, more)
            text += f"{' and, ' if text else ''}estimated: a context of {context}, workspaces of "
            text += f"{workspace}" + (f", {link} for each end of a link" if self.posts else "")
        return text

    def on(
        self, placement: Placement, costs: Sequence[StageCost], num_microbatches: int
    ) -> list[int]:
        """Return the bytes that each device needs besides its state and activations."""
        devices = 1 + max(device for devices in placement for device in devices)
        needs = [self.context_bytes + self.workspace_bytes] * devices
        if self.posts:
            for (source, target), sizes in _messages(placement, costs, num_microbatches).items():
                needs[source] += self.link_bytes
                needs[target] += self.link_bytes + room_bytes(sizes)
        return needs


NO_RESERVE = Reserve()

# By type of device. Estimates, not measurements.
# Context: CUDA with lazily loaded modules, and torch's kernels, take about 0.5 GiB on recent GPUs
# (as NVIDIA's and torch's forums report; `nvidia-smi` shows it for a process with one tensor).
# Workspace: torch gives cuBLAS 32 MiB a stream on Hopper, 8 MiB before (CUDAContext's
# getChosenWorkspaceSize), and cuBLASLt as much; rounded up for cuDNN.
# Link: NCCL's buffers, NCCL_BUFFSIZE = 4 MiB for each of about 4 channels (NCCL's manual).
RESERVES: Mapping[str, Reserve] = {
    "cpu": NO_RESERVE,
    "cuda": Reserve(context_bytes=512 * MiB, workspace_bytes=128 * MiB, link_bytes=16 * MiB),
}
_OTHERS = "cuda"  # what is assumed of other accelerators


def reserve_of(kind: str, *, posts: bool) -> Reserve:
    """Return what a device of type `kind` needs; `posts` as in Reserve."""
    return replace(RESERVES.get(kind, RESERVES[_OTHERS]), posts=posts)


def room_bytes(sizes: Mapping[int, int]) -> int:
    """Return the most bytes of receives that are posted at once on a link; `sizes` says how many
    messages there are of so many bytes.

    On CPUs small ones are posted further ahead; elsewhere that is at most POSTED_BYTES too much.
    """
    largest = sorted(size for size, n in sizes.items() for _ in range(min(n, POSTED_AHEAD)))
    total = sum(size * n for size, n in sizes.items())
    return max(sum(largest[-POSTED_AHEAD:]), min(total, POSTED_BYTES + max(sizes)))


def _messages(
    placement: Placement, costs: Sequence[StageCost], num_microbatches: int
) -> Mapping[tuple[int, int], Mapping[int, int]]:
    """Return how many messages of so many bytes go from one device to another."""
    found: defaultdict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for cost, both in zip(costs, pairwise(placement), strict=False):
        here, there = (device_turns(devices, num_microbatches) for devices in both)
        for (one, other), n in Counter(zip(here, there, strict=True)).items():
            if one != other:
                found[one, other][cost.output_bytes] += n
                found[other, one][cost.gradient_bytes] += n
    return found
