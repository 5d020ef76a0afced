"""An Accelerator whose processes all have the same batch.

Problem: accelerate takes processes for replicas: it gives each its own part of the data, wraps the
model for it, and puts together what each computed. The stages of a pipeline all belong to one
replica. Idea: to its data loaders and gathers this one is alone; the Pipeline does the rest.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils import _pytree as pytree


class OneBatch(Accelerator):
    """Gives every process the whole of the data, and gathers nothing."""

    @staticmethod
    def of(accelerator: Accelerator) -> "OneBatch":
        """Turn `accelerator` into one."""
        accelerator.__class__ = OneBatch
        config: DataLoaderConfiguration = accelerator.dataloader_config
        config.dispatch_batches = False  # or one process would read for all, and give each a part
        config.split_batches = False
        assert isinstance(accelerator, OneBatch)
        return accelerator

    @property
    def num_processes(self) -> int:
        """The number of processes that have different batches."""
        return 1

    def prepare_model(self, model: Any, *args: object, **kwargs: object) -> Any:
        """Return the model unchanged, which the Pipeline runs."""
        if not any(each is model for each in self._models):
            self._models.append(model)
        return model

    def gather(self, tensor: Any) -> Any:
        """Return the value of this process, which all have."""
        return tensor

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Return the value of this process, without what repeats samples in the last batch."""
        if not all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(input_data)):
            return input_data
        return super().gather_for_metrics(input_data)

    def pad_across_processes(self, tensor: Any, *args: object, **kwargs: object) -> Any:
        """Return the value of this process, which all have."""
        return tensor

    def reduce(self, tensor: Any, *args: object, **kwargs: object) -> Any:
        """Return the value of this process, which all have."""
        return tensor
