"""A rank's vote travels as numbers, and every column arrives under its name."""

from dataclasses import fields

from stagewise.engine.step.vote import Vote, difference


def filled() -> Vote:
    """Every field another number; a new column joins by its type."""
    values: dict[str, object] = {}
    for index, field in enumerate(fields(Vote)):
        values[field.name] = (7 * index, 7 * index + 1) if field.default == () else 7 * index
    return Vote(**values)  # type: ignore[arg-type]


def test_a_row_is_the_vote() -> None:
    vote = filled()
    assert all(isinstance(number, int) for number in vote.row())
    assert vote.same_kind(vote.row()) == vote


def test_ranks_that_differ_are_told_in_what() -> None:
    one, other = Vote(step_index=3), Vote(step_index=5)
    found = difference([one, Vote(), other], ())
    assert found is not None and found.part == "step_index"
    assert "ranks are at different steps: rank 0: 3, rank 2: 5" in str(found.error([None] * 3))
    assert difference([one, Vote()], ()) is None, "who has no say does not differ"
    assert difference([one], ()) is None
