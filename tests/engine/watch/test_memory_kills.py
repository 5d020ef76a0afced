"""Whether the kernel killed a process for memory, by its own counts."""

from pathlib import Path

from stagewise.engine.watch.memory_kills import MemoryKills

OWN = "4:memory:/old/job\n0::/new/job\n"


def counted(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"low 0\noom 7\noom_kill {number}\n")


def kills(tmp_path: Path) -> MemoryKills:
    (tmp_path / "own").write_text(OWN)
    return MemoryKills(tmp_path / "groups", tmp_path / "own", tmp_path / "vmstat")


def test_the_own_group_counts_before_the_machine(tmp_path: Path) -> None:
    counted(tmp_path / "vmstat", 1)
    group = tmp_path / "groups" / "new" / "job" / "memory.events"
    counted(group, 2)
    found = kills(tmp_path)
    counted(tmp_path / "vmstat", 9)
    assert found.number == 0
    assert "the kernel has killed nothing for memory" in found.in_words()
    counted(group, 3)
    assert "killed by the kernel because memory ran out (oom_kill in" in found.in_words()
    assert "rose by 1" in found.in_words()


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    control = tmp_path / "groups" / "memory" / "old" / "job" / "memory.oom_control"
    counted(control, 0)
    found = kills(tmp_path)
    counted(control, 2)
    assert found.number == 2


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    counted(tmp_path / "groups" / "memory.events", 0)
    found = kills(tmp_path)
    counted(tmp_path / "groups" / "memory.events", 1)
    assert found.number == 1


def test_without_counts_it_is_not_known(tmp_path: Path) -> None:
    found = kills(tmp_path)
    assert found.number is None
    assert "perhaps by the kernel" in found.in_words()
