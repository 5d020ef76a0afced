"""Run them all."""

from benchmarks.wrong_inputs.runner import main

main()
