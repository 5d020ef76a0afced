import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stagewise
from stagewise.costs import CellCost, FarOutput, InstructionCost, StageCost
from stagewise.engine.gradients.shard_actions import SHARD_ACTIONS
from stagewise.engine.stage.stage import ACTIONS
from stagewise.errors import ScheduleError
from stagewise.schedule import Instruction, Kind
from stagewise.schedule.instruction import ACTIVATIONS, GRADIENTS, KINDS

INSTRUCTIONS = st.builds(
    Instruction, st.integers(0, 200), st.sampled_from(Kind), st.integers(0, 5000)
)


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        ("2F0", Instruction(2, Kind.FORWARD, 0)),
        ("0B13", Instruction(0, Kind.BACKWARD, 13)),
        ("10I7", Instruction(10, Kind.BACKWARD_INPUT, 7)),
        ("1W1", Instruction(1, Kind.BACKWARD_WEIGHT, 1)),
        ("3R2", Instruction(3, Kind.RECOMPUTE, 2)),
    ],
)
def test_text_form(text: str, instruction: Instruction) -> None:
    assert str(instruction) == text
    assert Instruction.parse(text) == instruction


@given(INSTRUCTIONS)
def test_text_form_round_trips(instruction: Instruction) -> None:
    assert Instruction.parse(str(instruction)) == instruction


@pytest.mark.parametrize("text", ["", "F", "2F", "F0", "2f0", "2X0", "-1F0", "2F0 ", "2F0B1"])
def test_what_is_no_instruction_is_refused(text: str) -> None:
    with pytest.raises(
        ScheduleError, match="is not an instruction; write the stage, one letter of FBIWRPUSG"
    ):
        Instruction.parse(text)


def test_every_cost_of_a_stage_belongs_to_a_kind_or_a_stream() -> None:
    """A field that no kind names would be lost: nothing else says what an instruction costs."""
    named = {
        field
        for traits in KINDS.values()
        for field in (traits.seconds, *traits.keeps, *traits.keeps_once, *traits.frees)
    } | {stream.num_bytes for stream in (ACTIVATIONS, GRADIENTS)}
    # Kept with or without instructions; a part of what waits for `W`; what is not kept.
    apart = {"parameter_bytes", "trainable_bytes", "deferred_input_bytes", "released_output_bytes"}
    # The far outputs are streams' messages to other stages than the next, with the same names.
    apart.add("far_outputs")
    assert {stream.num_bytes for stream in (ACTIVATIONS, GRADIENTS)} <= {*FarOutput._fields}
    assert {field.name for field in fields(StageCost)} == named | apart
    of_instructions = {field.name for field in fields(InstructionCost)}
    of_cells = {traits.seconds for traits in KINDS.values() if not traits.of_shards}
    assert of_instructions == of_cells - {"recompute_seconds"}
    assert of_instructions < {field.name for field in fields(CellCost)}


def test_every_kind_frees_what_it_should_and_can_be_run() -> None:
    assert KINDS.keys() == ACTIONS.keys() | SHARD_ACTIONS.keys() == set(Kind)
    assert {kind for kind, traits in KINDS.items() if traits.of_shards} == SHARD_ACTIONS.keys()
    kept = [field for t in KINDS.values() for field in (*t.keeps, *t.keeps_once)]
    freed = [field for traits in KINDS.values() for field in traits.frees]
    assert set(kept) == set(freed)


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("2F0", "1F0"),
        ("2B0", "2F0 2R0 3B0 3I0"),
        ("2I0", "2F0 2R0 3B0 3I0"),
        ("2W0", "2F0 2R0 2I0"),
        ("2R0", "2F0"),
    ],
)
def test_what_an_instruction_waits_for(text: str, before: str) -> None:
    assert " ".join(map(str, Instruction.parse(text).awaits())) == before


# Where a kind is the subject: elsewhere it is read from KINDS, so that a new row is enough.
NAMES_KINDS = {
    "schedule/": "schedules are written in kinds",
    "timeline/timeline.py": "an R and its F share what they keep",
    "planning/synthesis/problem.py": "names what synthesis orders, for all of the folder",
    "planning/synthesis/operations.py": "tabulates them; a recomputation is part of its backward",
    "planning/search/moved_recompute.py": "moves an R, or an F into the time that it saves",
    "engine/gradients/shard_actions.py": "SHARD_ACTIONS: what each does where stages are sharded",
    "engine/stage/stage.py": "ACTIONS: what each does",
    "engine/stage/skips.py": "forward, a skip's value; backward, its gradient",
    "engine/transport/transport.py": "a long skip is a message of a forward",
    "diagnosis/sharded_steps.py": "what gathers and reductions took, by their kinds",
    "profiling/trial_steps.py": "measures each cell by its F, B, I and W",
    "profiling/estimate_cell.py": "counts each cell's F, B and I",
}


def attributes(where: Path) -> set[str]:
    tree = ast.parse(where.read_text(encoding="utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_a_kind_is_named_only_where_it_is_the_subject() -> None:
    package = Path(stagewise.__file__).parent
    named = {f"Kind.{kind.name}" for kind in Kind}
    files = [path for path in package.rglob("*.py") if attributes(path) & named]
    found = {path.relative_to(package).as_posix() for path in files}
    assert not {path for path in found if not path.startswith(tuple(NAMES_KINDS))}
    assert all(any(path.startswith(owner) for path in found) for owner in NAMES_KINDS)


def test_synthesis_asks_the_table_what_a_kind_costs_and_keeps() -> None:
    """Through `problem`, and for memory `kept_bytes`: no copy of the table loses a field."""
    of_kinds = {f for t in KINDS.values() for f in (t.seconds, *t.keeps, *t.frees)}
    folder = Path(stagewise.__file__).parent / "planning/synthesis"
    reads = {path.name: attributes(path) for path in folder.glob("*.py")}
    assert not {
        name
        for name in reads["problem.py"] | reads["operations.py"]
        if re.sub(r".*costs\[.*\]\.", "", name) in of_kinds
    }
    with_costs = {file for file, names in reads.items() if any(n.endswith(".costs") for n in names)}
    assert with_costs == {"problem.py", "replay.py"}
