"""Public helpers for tests and benchmarks: emulated devices."""

from stagewise.testing.emulated import EmulatedCell, EmulatedDevice, emulated_model

__all__ = ["EmulatedCell", "EmulatedDevice", "emulated_model"]
