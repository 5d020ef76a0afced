"""Public helpers for tests and benchmarks.

1. `check_parity` compares a model plain and pipelined (`stagewise.checker`).
2. `memory` counts live tensors and activations.
3. `emulated` has cells that sleep for a known time instead of computing.
"""

from stagewise.checker.check_parity import check_parity
from stagewise.parity import Configuration, ParityReport, ParityRow
from stagewise.testing.emulated import EmulatedCell, EmulatedDevice, emulated_model
from stagewise.testing.memory import LiveTensors, live_activation_bytes, live_tensors

__all__ = [
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
]
