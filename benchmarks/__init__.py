"""Measurements; each is `python -m benchmarks.NAME [--quick] [--json]`."""
