"""What a process of the harness's server has imported before it is forked.

Problem: a forked process that looks through the server's objects for garbage writes to every page
of them, and so copies them all: half of its time.
Idea: after the last import they are set apart, as Python's documentation of `gc.freeze` advises.
"""

import contextlib
import gc

import hypothesis  # noqa: F401 (with pytest, what the files of cases import)
import pytest  # noqa: F401
import torch._dynamo
import torch.distributed.checkpoint._fsspec_filesystem
import torch.distributed.launcher.api
import torch.utils.serialization.config  # noqa: F401

import stagewise.cli.plan_command
import stagewise.cli.train.train_command
import stagewise.pipeline.pipeline
import stagewise.pipeline.plan_model
import stagewise.training.trainer  # noqa: F401

with contextlib.suppress(ImportError):  # some versions of typer want it
    import pydantic.type_adapter  # noqa: F401
gc.collect()
gc.freeze()
gc.set_threshold(10_000)  # as in pytest: see `conftest`
