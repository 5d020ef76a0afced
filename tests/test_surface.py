"""The public surface: change it on purpose only, with a line in CHANGELOG.md."""

import importlib

import pytest
import typer.main

import stagewise
from stagewise.cli.main import COMMANDS, app, command_app

EXPORTS = [
    "Arguments",
    "BatchDim",
    "GPipe",
    "GradScaler",
    "Microbatches",
    "Pipeline",
    "Plan",
    "Replicated",
    "Schedule",
    "SkipScope",
    "StageCost",
    "StagewiseError",
    "Timeline",
    "UsageError",
    "add_loss",
    "capture",
    "capture_cells",
    "collect_losses",
    "estimate",
    "from_pretrained",
    "pack_samples",
    "plan",
    "pop",
    "simulate",
    "skippable",
    "stash",
]

PACKAGES = {
    "stagewise.models": [
        "amoebanet_d",
        "decoder_lm",
        "resnet",
        "transformer",
        "transformer_l",
        "unet",
    ],
    "stagewise.parallel": [
        "Experts",
        "shard_cells",
        "split_experts",
        "split_sequences",
        "tp_plan",
    ],
    "stagewise.planning": [
        "DeviceSpec",
        "LowerBound",
        "Partition",
        "Plan",
        "Replicated",
        "ScheduleChoice",
        "ScheduleLike",
        "SearchResult",
        "Segmentation",
        "best_segments",
        "bottleneck_seconds",
        "check_balance",
        "choose_schedule",
        "lower_bound_seconds",
        "order_microbatches",
        "load_devices",
        "place",
        "plan_from_costs",
        "replicated_partition",
        "search",
        "simulate",
        "synthesise",
        "unit_costs",
    ],
    "stagewise.report": ["format_seconds", "render_parity", "render_timeline"],
    "stagewise.schedule": [
        "POLICIES",
        "SCHEDULES",
        "Blocked",
        "Bubble",
        "EqualStages",
        "InFlight",
        "Instruction",
        "Kind",
        "LoweredProgram",
        "Message",
        "NamedSchedule",
        "Program",
        "Schedule",
        "Segments",
        "Step",
        "check_replicas",
        "consecutive",
        "forward_only",
        "gpipe",
        "grid",
        "in_flight",
        "links",
        "lower",
        "named_schedule",
        "needed",
        "needed_for",
        "on_replicas",
        "one_f_one_b",
        "parse_programs",
        "parse_schedule",
        "refine",
        "schedule_of",
        "schedule_row",
        "stages_per_device",
        "validate",
        "walk",
        "with_recompute",
    ],
    "stagewise.testing": [
        "Configuration",
        "EmulatedCell",
        "EmulatedDevice",
        "LiveTensors",
        "ParityReport",
        "ParityRow",
        "check_parity",
        "emulated_model",
        "live_activation_bytes",
        "live_tensors",
    ],
}

# command -> its arguments and options
COMMAND_LINE = {
    "init": ["--help", "--out", "what"],
    "train": [
        "--balance",
        "--checkpoint-every",
        "--config",
        "--dashboard",
        "--devices",
        "--help",
        "--init",
        "--keep",
        "--log",
        "--memory",
        "--mesh",
        "--microbatches",
        "--no-config",
        "--out",
        "--pipeline",
        "--plan",
        "--recompute",
        "--record",
        "--replace-lost",
        "--replicas",
        "--restarts",
        "--resume",
        "--schedule",
        "--seed",
        "--shard",
        "--speeds",
        "--stages",
        "--steps",
        "--tensor",
        "--timeout",
        "--validate-every",
        "recipe",
    ],
    "report": ["--help", "--html", "--json", "--trace", "runs"],
    "export": ["--help", "out", "run"],
    "generate": [
        "--devices",
        "--help",
        "--max-new-tokens",
        "--sample",
        "--seed",
        "--temperature",
        "--timeout",
        "--top-k",
        "--top-p",
        "prompts",
        "run",
    ],
    "plan": [
        "--balance",
        "--device",
        "--device-file",
        "--devices",
        "--efficiency",
        "--help",
        "--html",
        "--json",
        "--memory",
        "--mesh",
        "--microbatches",
        "--no-trial",
        "--recompute",
        "--replicas",
        "--schedule",
        "--seconds",
        "--speeds",
        "--stages",
        "recipe",
    ],
    "advise": [
        "--device",
        "--device-file",
        "--device-memory",
        "--devices",
        "--efficiency",
        "--help",
        "--json",
        "--microbatches",
        "recipe",
    ],
    "check": [
        "--devices",
        "--double",
        "--help",
        "--microbatches",
        "--recompute",
        "--replicas",
        "--schedule",
        "--stages",
        "recipe",
    ],
    "doctor": ["--devices", "--help", "--json", "--timeout"],
    "schedules": ["--devices", "--help", "--json", "--microbatches", "-K", "-M"],
    "simulate": [
        "--backward",
        "--devices",
        "--forward",
        "--help",
        "--html",
        "--json",
        "--latency",
        "--list",
        "--microbatches",
        "--recompute",
        "--replicas",
        "--schedule",
        "--stages",
        "--stages-per-device",
        "--text",
        "--weight",
    ],
}


def parameters_of(application: typer.Typer) -> list[str]:
    command = typer.main.get_command(application)
    context = command.make_context("stagewise", [], resilient_parsing=True)
    return sorted(name for p in command.get_params(context) for name in p.opts + p.secondary_opts)


def test_exports() -> None:
    assert sorted(stagewise.__all__) == EXPORTS


def test_every_export_loads_and_dir_shows_it() -> None:
    for name in EXPORTS:
        assert getattr(stagewise, name).__name__ == name
        assert name in dir(stagewise)
    with pytest.raises(AttributeError, match="has no attribute 'pipe'"):
        _ = stagewise.pipe


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_of_packages(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PACKAGES[package])


def test_commands() -> None:
    assert list(COMMANDS) == list(COMMAND_LINE)
    assert parameters_of(app) == ["--help", "--version"]


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_options(name: str) -> None:
    assert parameters_of(command_app(name)) == COMMAND_LINE[name]
