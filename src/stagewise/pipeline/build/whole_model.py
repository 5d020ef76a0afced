"""What every rank knows about the whole model, on which all must agree: names, shapes, classes.

It keeps no tensors: a rank only holds its own stages' parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stagewise.checkpoints.names import Aliases, aliases_of
from stagewise.engine.step.digest import fingerprint
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import ModelError, PlanError
from stagewise.model.cell import Chain
from stagewise.model.chain import module_tree
from stagewise.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """The model as given, before it has its initial values."""

    shapes: Mapping[str, tuple[int, ...]]  # of parameters
    dtypes: Mapping[str, torch.dtype]  # of parameters
    modules: Sequence[tuple[str, str, str]]  # name, class, and extra_repr of torch's own classes
    by_frequency: Sequence[str]  # embeddings with `scale_grad_by_freq`
    aliases: Aliases

    @staticmethod
    def of(chain: Chain) -> "WholeModel":
        whole = module_tree(chain)
        named = dict(whole.named_parameters())
        return WholeModel(
            shapes={name: tuple(parameter.shape) for name, parameter in named.items()},
            dtypes={name: parameter.dtype for name, parameter in named.items()},
            modules=[
                (name, type(module).__qualname__, module.extra_repr() if _is_torchs(module) else "")
                for name, module in whole.named_modules()
            ],
            by_frequency=[
                path
                for cell in chain
                for path, module in cell.named_modules()
                if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq
            ],
            aliases=aliases_of(whole),
        )

    def agree(self, ranks: Ranks, plan: Plan, options: Mapping[str, object] | None = None) -> None:
        """Raise PlanError on every rank unless all have the same plan, model and `options`.

        Also raise ModelError if an embedding's gradients need the minibatch that `plan` splits.
        """
        options = options or {}
        words = [*self.shapes.items()], [*self.dtypes.items()], self.modules
        marks = [fingerprint(text) for text in (plan.to_json(), words, *options.values())]
        built = ranks.agree_on_pipeline
        rows = built(marks) if options else ranks.exchange_all(marks, "use(plan)")
        for column, what in enumerate(["plans", "models", *(f"{name}=" for name in options)]):
            differing = [rank for rank, row in enumerate(rows) if row[column] != rows[0][column]]
            if differing:
                raise PlanError(
                    f"ranks {differing} have different {what} than rank 0; build model and plan "
                    "from the same code on every rank (stagewise.plan agrees by itself when every "
                    "rank calls it)"
                )
        if self.by_frequency and plan.num_microbatches > 1:
            raise ModelError(
                f"{', '.join(self.by_frequency)} has scale_grad_by_freq=True, which divides "
                "gradients by how often a row occurs in the minibatch, but each of the "
                f"{plan.num_microbatches} microbatches only sees its own rows; omit the option, "
                "or use one microbatch"
            )


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")
