"""Whether the kernel has killed processes because memory ran out.

Problem: a process killed for memory and one killed by hand both end by SIGKILL, without a word.
Idea: the kernel counts the processes that it kills for memory, by control group (`memory.events`,
see the kernel's cgroup-v2 documentation; `memory.oom_control` in version 1) and on the whole
machine (`/proc/vmstat`). The count before is compared with the count after.
"""

from collections.abc import Iterator
from pathlib import Path

_COUNT = "oom_kill"
_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_MACHINE = Path("/proc/vmstat")


class MemoryKills:
    """Kills for memory since this was made, of this process's control group or else the machine."""

    def __init__(self, groups: Path = _GROUPS, own: Path = _OWN, machine: Path = _MACHINE) -> None:
        self._path, self._before = machine, _count(machine)
        for path in _files(groups, own):
            if (count := _count(path)) is not None:
                self._path, self._before = path, count
                break

    @property
    def number(self) -> int | None:
        """How many there were; None if it cannot be known."""
        now = _count(self._path)
        return None if now is None or self._before is None else now - self._before

    def in_words(self) -> str:
        """Say what a process of ours that ended by SIGKILL died of."""
        number = self.number
        if number is None:
            return "killed, perhaps by the kernel because memory ran out"
        if number:
            return (
                f"killed by the kernel because memory ran out ({_COUNT} in {self._path} rose by "
                f"{number})"
            )
        return "killed by somebody or a batch system: the kernel has killed nothing for memory"


def _files(groups: Path, own: Path) -> Iterator[Path]:
    """Yield where this process's control group may count, the most exact first."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield Path(f"{groups}{path}", "memory.events")
        elif "memory" in controllers.split(","):
            yield Path(f"{groups}/memory{path}", "memory.oom_control")
    yield groups / "memory.events"  # the group's own root, where a container sees it
    yield groups / "memory" / "memory.oom_control"


def _count(path: Path) -> int | None:
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        return None
    found = [int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == _COUNT]
    return found[0] if found else None
