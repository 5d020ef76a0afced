"""What a typed command line asks to be trained: a request or a plan, and the mesh."""

from dataclasses import replace
from pathlib import Path

from stagewise.cli.train.train_options import AskedMesh
from stagewise.cli.typed import NumDevices, Typed, check_unnamed, saved_plan
from stagewise.errors import PlanError
from stagewise.mesh import PIPELINE_AXIS, MeshShape
from stagewise.planning.choice import requested_schedule
from stagewise.planning.plan import Plan
from stagewise.planning.refit import refitted
from stagewise.planning.request import AUTO, PlanRequest
from stagewise.schedule import SCHEDULES
from stagewise.training.workers.elastic import num_restarts
from stagewise.training.workers.environment import launched, world_size


def wanted_of(
    typed: Typed, plan: Path | None, asked: AskedMesh
) -> tuple[PlanRequest | Plan, MeshShape | None]:
    """Return the request or plan, and the mesh, for as many devices as torchrun's workers.

    Without a number of devices it is theirs. If torchrun starts workers again, those that are left
    go on with a plan that is like the wanted one; a mesh must stay as it is.
    """
    here = world_size() if launched() else None
    if axes := replace(asked, num_ranks=typed.devices or here).axes():
        check_unnamed(typed.devices, "on a mesh the ranks choose theirs")
        asked = replace(asked, num_ranks=typed.devices or here)
        sized = plan is not None or typed.replicas is not None
        typed = replace(typed, devices=None if sized else axes.get(PIPELINE_AXIS))
        wanted = _request(typed) if plan is None else saved_plan(plan, typed)
        return wanted, asked.shape(num_devices_of(wanted))
    unsized = typed.stages is None and typed.devices is None and typed.replicas is None
    if here is not None and plan is None and unsized and typed.schedule in SCHEDULES:
        typed = replace(typed, devices=here)
    wanted = _request(typed) if plan is None else saved_plan(plan, typed)
    number = num_devices_of(wanted)
    if here is None or here == number or not num_restarts()[1]:
        return wanted, None
    return refitted(wanted, here), None


def num_devices_of(wanted: PlanRequest | Plan) -> NumDevices:
    """Return how many devices of this machine it needs, and their names if they have any."""
    if isinstance(wanted, Plan):
        return NumDevices(wanted.num_devices)
    return NumDevices.of(requested_schedule(wanted).num_devices, wanted.device_names)


def _request(typed: Typed) -> PlanRequest:
    """Return the request; `--microbatches auto` starts with the default number."""
    if typed.microbatches != AUTO:
        return typed.fixed()
    if typed.schedule not in SCHEDULES:
        raise PlanError(
            f"--microbatches auto needs a schedule for any number of microbatches, but the file "
            f"{typed.schedule} is for a fixed number; give a name, or leave --microbatches out"
        )
    return replace(typed, microbatches=None).fixed()
