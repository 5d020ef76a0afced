import json

import pytest
from typer.testing import CliRunner, Result

from stagewise.cli.main import command_app
from stagewise.costs import StageCost
from stagewise.errors import UsageError
from stagewise.planning import simulate
from stagewise.schedule import named_schedule, parse_programs, with_recompute
from stagewise.timeline import Timeline

RUNNER = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def run(*arguments: str) -> Result:
    return RUNNER.invoke(command_app("simulate"), arguments, catch_exceptions=False)


def test_the_plain_call_draws_the_default_schedule() -> None:
    result = run()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[1] == (
        "device 0  F0F1F2F3............B0##F4B1##F5B2##F6B3##F7B4##..B5##..B6##..B7##"
    )
    assert lines[-2] == "step 33 s, bubble 27.3% of all devices' time"
    assert lines[-1].endswith("bubble (K-1)/(M+K-1) = 3/11 = 27.3%")


def test_the_closed_form_is_for_equal_stages_only() -> None:
    assert "(K-1)/(M+K-1)" in run("--forward", "1,1", "--stages", "2").stdout
    assert "(K-1)/(M+K-1)" not in run("--forward", "1,2", "--stages", "2").stdout


def test_json() -> None:
    result = run(
        *["--schedule", "gpipe", "--stages", "3", "--microbatches", "4", "--recompute", "always"],
        *["--forward", "1,2,1", "--backward", "2.5", "--latency", "0.25", "--json"],
    )
    record = json.loads(result.stdout)
    spans = record.pop("spans")
    timeline = Timeline.from_records(3, spans)
    assert record == {
        "schedule": "gpipe",
        "num_stages": 3,
        "num_microbatches": 4,
        "recompute": "always",
        "step_seconds": timeline.duration_seconds,
        "bubble_fraction": pytest.approx(timeline.bubble_fraction),
        "peak_in_flight": [4, 4, 4],
    }
    assert [span["instruction"] for span in spans if span["device"] == 2][:5] == [
        "2F0",
        "2F1",
        "2F2",
        "2F3",
        "2B3",
    ]


def test_json_predicts_what_the_simulator_does() -> None:
    record = json.loads(run("--stages", "2", "--microbatches", "3", "--json").stdout)
    cost = StageCost(forward_seconds=1, backward_seconds=2, recompute_seconds=1)
    timeline = simulate(named_schedule("1f1b", 2, 3), [cost] * 2)
    assert record["spans"] == timeline.to_records()
    assert record["bubble_fraction"] == pytest.approx(1 / 4)


def test_text_is_the_schedules_text_form() -> None:
    result = run("--text", "--stages", "3", "--microbatches", "5", "--recompute", "except_last")
    expected = with_recompute(named_schedule("1f1b", 3, 5), "except_last")
    assert parse_programs(result.stdout) == expected.programs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--stages 0", "num_devices is 0; a schedule needs at least 1"),
        ("--microbatches 0", "num_microbatches is 0; a schedule needs at least 1"),
        ("--schedule zigzag", "there is no schedule 'zigzag'; choose one of 1f1b, gpipe"),
        ("--recompute maybe", "there is no recompute policy 'maybe'; choose one of always, exc"),
        ("--forward 1,2", "--forward 1,2 gives 2 costs for 4 stages; give one cost for all"),
        ("--backward 1,2,3,4,5", "--backward 1,2,3,4,5 gives 5 costs for 4 stages"),
        ("--forward -1", "--forward has -1; seconds must be finite and not negative"),
        ("--backward 1,1,-2,1", "--backward has -2; seconds must be finite and not negative"),
        ("--forward inf", "--forward has inf; seconds must be finite"),
        ("--forward nan", "--forward has nan; seconds must be finite"),
        ("--latency -0.5", "--latency has -0.5; seconds must be finite and not negative"),
        ("--forward fast", "--forward is 'fast'; give seconds, as in --forward 1 for all stages"),
        ("--forward 1,,1,1", "--forward is '1,,1,1'; give seconds"),
        ("--forward 0 --backward 0", "--forward and --backward are all 0"),
        ("--json --text", "--json and --text were both given; choose one of them"),
    ],
)
def test_wrong_input(arguments: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(*arguments.split())
    assert message in str(caught.value)


def test_help_explains_and_gives_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "no model, no" in result.stdout
    assert "stagewise simulate --stages 4 --microbatches 8" in result.stdout
