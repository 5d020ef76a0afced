from dataclasses import replace

import pytest

from stagewise.planning.devices import Efficiency, load_devices
from stagewise.planning.roofline import CellWork, Op, total_flops

DEVICE = replace(
    load_devices()["h100"],
    flops_per_second={"float32": 100.0, "bfloat16": 1000.0},
    memory_bytes_per_second=10.0,
    efficiency=Efficiency(compute=0.5, memory=0.5, link=1.0),
)


def test_an_operator_takes_as_long_as_arithmetic_or_memory() -> None:
    assert Op("mm", 500, 1, "float32").seconds(DEVICE) == 10.0
    assert Op("mm", 500, 1, "bfloat16").seconds(DEVICE) == 1.0
    assert Op("add", 0, 15, "float32").seconds(DEVICE) == 3.0
    assert Op("mm", 500, 100, "bfloat16", 7).seconds(DEVICE) == 140.0


def test_a_cell_costs_the_sum_of_its_operators() -> None:
    product, addition = Op("mm", 500, 1, "float32"), Op("add", 0, 15, "float32", 2)
    work = CellWork(
        name="a",
        forward=(product, addition),
        backward=(product, product),
        input_backward=(product,),
        parameter_bytes=1,
        activation_bytes=2,
        unsaved_output_bytes=3,
        released_output_bytes=3,
        output_bytes=4,
        gradient_bytes=5,
        deferred_bytes=6,
    )
    cost = work.cost(DEVICE)
    assert (cost.forward_seconds, cost.backward_seconds) == (16.0, 20.0)
    assert cost.split_seconds == (10.0, 10.0)
    assert cost.kept_for_weights == 6
    assert (work.forward_flops, work.backward_flops) == (500, 1000)
    assert total_flops([replace(product, count=3)]) == 1500
    assert replace(work, backward=()).cost(DEVICE).split_seconds == (0.0, pytest.approx(0.0))
