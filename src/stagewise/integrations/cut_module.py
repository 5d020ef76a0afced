"""What of a LightningModule is cut, and what it may not do outside of that."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn
from torch.utils import _pytree as pytree

from stagewise.errors import ModelError, UsageError


def cut_path(module: nn.Module, path: str | None) -> str:
    """Return the path of the module to cut; ModelError unless it alone has parameters."""
    having = [name for name, child in module.named_children() if [*child.parameters()]]
    found = path or (having[0] if len(having) == 1 else None)
    if found is None:
        raise ModelError(
            f"{type(module).__name__} has {len(having)} modules with parameters "
            f"({', '.join(having)}), and which to cut is not clear; put them into one module that "
            "training_step calls, and name it: PipelineStrategy('model')"
        )
    try:
        cut = module.get_submodule(found)
    except AttributeError as error:
        raise ModelError(
            f"{type(module).__name__} has no module {found!r} to cut; it has {', '.join(having)}"
        ) from error
    own = set(cut.parameters())
    others = [n for n, p in module.named_parameters() if p not in own and p.requires_grad]
    if others:
        raise ModelError(
            f"{', '.join(others[:5])} of {type(module).__name__} are trained, but lie outside "
            f"{found!r}, so no stage would own them; make them part of it"
        )
    return found


def refuse_draws(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise UsageError if the states of generators differ before and after the model's call."""
    same = all(
        np.array_equal(one, other)
        for one, other in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
    )
    if not same:
        raise UsageError(
            "training_step draws random numbers before it calls the model, and would draw others "
            "for its loss; draw them in the data set, or in on_after_batch_transfer"
        )


def refuse_loss(warnings: Iterable[str]) -> None:
    """Raise UsageError if a pipeline has warned that microbatches' losses do not make the whole."""
    for text in warnings:
        if text.startswith("the loss"):
            raise UsageError(
                "training_step's loss for a batch is not the mean over its samples of the losses "
                "of its microbatches. Return such a mean; or say what part of a batch counts how "
                "much, as in PipelineStrategy(weight=lambda batch: (batch[1] != -100).sum()); or "
                "do not split batches, with PipelineArguments(num_microbatches=1). The Pipeline, "
                f"whose options these words name, says: {text}"
            )
