import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from stagewise.cli.main import command_app
from stagewise.costs import StageCost
from stagewise.errors import UsageError
from stagewise.planning import simulate
from stagewise.schedule import SCHEDULES, named_schedule, parse_programs, with_recompute
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
    assert lines[-3] == "step 33 s, bubble 27.3% of all devices' time"
    assert lines[-2].endswith("idle (K-1)(F+B) = 9 s, bubble 27.3%")
    assert lines[-1] == "in flight on device d, by stage: min(M, K-d)"


def test_the_closed_form_is_for_equal_stages_only() -> None:
    assert "(K-1)(F+B)" in run("--forward", "1,1", "--stages", "2").stdout
    assert "(K-1)(F+B)" not in run("--forward", "1,2", "--stages", "2").stdout


def test_replicas() -> None:
    costs = ("--forward", "1,2,1", "--backward", "2,4,2")
    result = run("--replicas", "1,2,1", *costs)
    assert result.stdout.splitlines()[3].startswith("device 2  ....F1==F3==")
    assert "in flight on device d" not in run("--replicas", "2,2").stdout
    spans = json.loads(run("--replicas", "1,2,1", *costs, "--json").stdout)
    assert (spans["num_stages"], spans["num_devices"], spans["step_seconds"]) == (3, 4, 33)


def test_an_idle_replica_round_trips_as_text(tmp_path: Path) -> None:
    arguments = ("--replicas", "1,3", "--microbatches", "2", "--text")
    text = run(*arguments).stdout
    (tmp_path / "mine.txt").write_text(text)
    again = run("--schedule", str(tmp_path / "mine.txt"), "--replicas", "1,3", "--text").stdout
    assert again.splitlines()[1:] == text.splitlines()[1:]
    assert text.splitlines()[-1].replace(" ", "") == "device3....."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--replicas", "1,x"), "--replicas '1,x' is not a list of positive integers"),
        (("--replicas", "1,0"), "--replicas '1,0' is not a list of positive integers"),
        (("--replicas", "1,2", "--stages", "3"), "imply 2 stages, but 3 were asked for"),
        (("--replicas", "1,2", "--devices", "4"), "imply 3 devices, but 4 were asked for"),
        (("--replicas", "1,2", "--schedule", "zb_h1"), "choose one of 1f1b, gpipe, or leave"),
    ],
)
def test_replicas_that_do_not_fit(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(*arguments)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_drawn_with_its_closed_form(name: str) -> None:
    shown = run("--schedule", name, "--devices", "3").stdout
    row = SCHEDULES[name]
    assert f"equal stages without recomputation and latency: idle {row.bubble} = " in shown
    assert ("stage that is not the device's first" in shown) == (row.stages_per_device > 1)
    if row.bubble.exact:
        assert shown.count(f"bubble {shown.partition(', bubble ')[2].split('%')[0]}%") == 2


def test_where_the_closed_form_does_not_hold() -> None:
    shown = run("--schedule", "zb_v", "--weight", "0.5").stdout
    assert "idle (K-1)F (F = I = W, M >= K), which does not apply here" in shown


def test_halves_of_the_backward() -> None:
    arguments = ("--schedule", "zb_h1", "--stages", "2", "--microbatches", "2", "--json")
    for more, (for_inputs, for_weights) in {
        (): (1, 1),
        ("--weight", "0.5"): (1.5, 0.5),
        ("--backward", "4", "--weight", "1"): (3, 1),
    }.items():
        spans = json.loads(run(*arguments, *more).stdout)["spans"]
        seconds = {s["instruction"][1]: s["end_seconds"] - s["start_seconds"] for s in spans}
        assert (seconds["I"], seconds["W"]) == (for_inputs, for_weights)


def test_numbers_of_stages_and_devices() -> None:
    def numbers(*arguments: str) -> tuple[int, int]:
        record = json.loads(run("--microbatches", "4", "--json", *arguments).stdout)
        return record["num_stages"], record["num_devices"]

    several = ("--schedule", "interleaved")
    assert numbers() == (4, 4)
    assert numbers("--devices", "3") == numbers("--stages", "3") == (3, 3)
    assert numbers(*several) == (8, 4)
    assert numbers(*several, "--stages", "6") == (6, 3)
    assert numbers(*several, "--stages", "6", "--devices", "2") == (6, 2)
    assert numbers(*several, "--stages-per-device", "3", "--devices", "2") == (6, 2)
    assert numbers(*several, "--stages-per-device", "3", "--stages", "9") == (9, 3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_is_read_back(tmp_path: Path, name: str) -> None:
    arguments = ("--devices", "3", "--microbatches", "5", "--recompute", "except_last")
    text = run("--schedule", name, *arguments, "--text").stdout
    assert text.startswith(f"# {name}: ") and "recompute except_last\ndevice 0 " in text
    file = tmp_path / "mine.txt"
    file.write_text(text)
    one, other = (
        json.loads(run("--json", *more).stdout)
        for more in (("--schedule", name, *arguments), ("--schedule", str(file)))
    )
    assert one["spans"] == other["spans"]
    assert run("--schedule", str(file), "--text").stdout.splitlines()[1:] == text.splitlines()[1:]


def test_the_list_has_every_schedule() -> None:
    shown = run("--list").stdout
    for name, row in SCHEDULES.items():
        for part in (f"\n{name}: {row.summary}\n", str(row.bubble), str(row.in_flight), row.source):
            assert part in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("0F0 0B0 0Q0", "line 1: '0Q0' is not an instruction"),
        ("0F0\n1F0 1B0", "the backward of stage 0, microbatch 0 is missing"),
        ("0F0 0B0", "has 1 stages, but 3 were asked for"),
    ],
)
def test_a_file_that_will_not_do(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "mine.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError) as caught:
        run("--schedule", str(file), "--stages", "3")
    assert message in str(caught.value) and str(file) in str(caught.value)


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
        "num_devices": 3,
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
        ("--schedule zigzag", "there is no schedule 'zigzag'; choose one of 1f1b, breadth_first"),
        ("--schedule zigzag", "or give a file that contains one, such as zigzag.txt"),
        ("--schedule zb_v --stages 3", "zb_v has 2 stages on each device, so 3 stages are not"),
        ("--schedule zb_v --stages 6 --devices 2", "6 stages and 2 devices disagree: zb_v has 2"),
        ("--schedule interleaved --stages 6 --devices 4", "disagree: interleaved has any number"),
        ("--stages-per-device 2", "disagree: 1f1b has 1 stage on each device"),
        ("--stages 5 --stages-per-device 2", "--stages 5 is not --stages-per-device 2 times 2"),
        ("--schedule a.txt --stages-per-device 2", "a file fixes its own number"),
        ("--weight 3", "--weight is 3 seconds, but the backward that it is part of is only 2"),
        ("--weight 1,2", "--weight 1,2 gives 2 costs for 4 stages"),
        ("--recompute maybe", "there is no recompute policy 'maybe'; choose one of always, exc"),
        ("--forward 1,2", "--forward 1,2 gives 2 costs for 4 stages; give one cost for all"),
        ("--backward 1,2,3,4,5", "--backward 1,2,3,4,5 gives 5 costs for 4 stages"),
        ("--forward -1", "--forward has -1; seconds must be finite and not negative"),
        ("--backward 1,1,-2,1", "--backward has -2; seconds must be finite and not negative"),
        ("--forward inf", "--forward has inf; seconds must be finite"),
        ("--forward nan", "--forward has nan; seconds must be finite"),
        ("--latency -0.5", "--latency has -0.5; seconds must be finite and not negative"),
        ("--forward fast", "--forward is 'fast'; give seconds, such as --forward 1 for all stages"),
        ("--forward 1,,1,1", "--forward is '1,,1,1'; give seconds"),
        ("--forward 0 --backward 0", "--forward and --backward are all 0"),
        ("--json --text", "--json and --text were both given; choose one of them"),
    ],
)
def test_wrong_input(arguments: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(*arguments.split())
    assert message in str(caught.value)


@pytest.mark.parametrize("option", ["--stages", "--devices", "--microbatches"])
def test_less_than_one_of_anything_is_refused(option: str) -> None:
    assert run(option, "0").exit_code == 2


def test_help_explains_and_gives_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "from costs alone" in result.stdout
    assert "stagewise simulate --devices 4 --microbatches 8" in result.stdout


def test_html_holds_the_numbers_of_json(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    html = tmp_path / "page.html"
    result = run("--schedule", "gpipe", "--json", "--html", str(html))
    assert (result.exit_code, result.stderr) == (0, f"wrote {html}: open it in a browser\n")
    numbers = html.read_text().partition('id="numbers">')[2].partition("</script>")[0]
    step = json.loads(numbers).pop("steps")[0]
    assert {**json.loads(result.stdout), "steps": [step]} == json.loads(numbers)
    assert step["spans"] == json.loads(result.stdout)["spans"]
