"""Weights that are quantised while they are read, one layer at a time.

Problem: transformers quantises a model that one process reads whole, and torch.export cannot trace
layers of quantised weights. Idea: the model is captured and cut as if it were not quantised. A twin
on the meta device is prepared by transformers' quantiser; when a process reads a weight of its own,
that quantiser makes the twin's layer of it, which then takes the place of the model's.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagewise.batch.layouts import held_bytes
from stagewise.checkpoints.renamed import Maker
from stagewise.costs import CellCost
from stagewise.errors import ModelError
from stagewise.model.cell import Cell, Chain
from stagewise.pretrained.in_blocks import InBlocks
from stagewise.pretrained.peft_names import base_name

_METHODS = "torchao", "bitsandbytes"
_PROBE = 64  # rows of a weight that are quantised to learn how many bytes it will take
# Whether an evaluation on the CPU may pack a layer of bitsandbytes anew, for a kernel that rounds
# to bfloat16 and has no gradient: adapters below it would not train any more.
_REPACKS = "support_avx512bf16_for_cpu"


def quantiser_of(config: Any, asked: Any, folder: Path) -> Any:
    """Return transformers' quantiser for a folder, and note it in `config`; None if none is needed.

    `asked` is a quantization_config of transformers; a folder that is quantised has its own.
    """
    written = getattr(config, "quantization_config", None)
    if asked is None and written is None:
        return None
    module = import_module("transformers.quantizers.auto")
    auto = module.AutoHfQuantizer
    if isinstance(asked, Mapping):
        try:
            asked = module.AutoQuantizationConfig.from_dict(dict(asked))
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"quantization_config={asked!r} describes no way of quantising ({error}); give a "
                "BitsAndBytesConfig or a TorchAoConfig of transformers"
            ) from error
    method = _method(asked if written is None else written)
    if method not in _METHODS:
        where = "quantization_config asks for" if written is None else f"{folder} is quantised by"
        raise ModelError(
            f"{where} {method}, which is not read layer by layer; give a BitsAndBytesConfig or a "
            "TorchAoConfig of transformers, or a folder that is quantised by one of them or not "
            "at all"
        )
    try:
        if written is not None:
            asked = auto.merge_quantization_configs(written, asked)
        made = auto.from_config(asked, pre_quantized=written is not None)
        made.validate_environment(device_map=None)
    except ImportError as error:
        raise ModelError(
            f"{error}; run: pip install 'stagewise[quantised]'" if str(error) else repr(error)
        ) from error
    config.quantization_config = asked
    return made


def _method(config: Any) -> str:
    own = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    found = own.get("quant_method", f"{config!r}" if not own else type(config).__name__)
    return str(found.value if isinstance(found, Enum) else found)


@dataclass(frozen=True)
class Quantised(Maker):
    """Makes quantised weights of `model`, which may have adapters, as those of `twin` are.

    `wanted` are the twin's weights that are to be quantised, if the folder is not.
    """

    quantiser: Any
    model: nn.Module
    twin: nn.Module
    wanted: frozenset[str]

    @staticmethod
    def of(quantiser: Any, model: nn.Module, twin: nn.Module, folder: Path) -> "Quantised":
        """Prepare `twin`, which is on the meta device."""
        files = [str(file) for file in sorted(folder.glob("*.safetensors"))]
        quantiser.preprocess_model(model=twin, device_map=None, checkpoint_files=files)
        names = (name for name, _ in twin.named_parameters())
        wanted = {n for n in names if quantiser.param_needs_quantization(twin, n)}
        return Quantised(quantiser, model, twin, frozenset(wanted))

    def sources(self, name: str, saved: Collection[str]) -> Sequence[str]:
        """Return the saved tensors that a weight is made of."""
        base = base_name(name)
        if base is None:
            return ()
        if not self.quantiser.pre_quantized:
            return (base,) if base in self.wanted else ()
        path, _, attribute = base.rpartition(".")
        parts = self.quantiser.serialized_names.get(attribute, ())
        found = [full for part in parts if (full := f"{path}.{part}") in saved]
        return () if found == [base] else found

    @property
    def reads_in_parts(self) -> bool:
        """Whether `InBlocks` reads the weights, which bitsandbytes quantises to 4 bits."""
        return bool(getattr(self.quantiser.quantization_config, "load_in_4bit", False))

    def make(self, name: str, values: Mapping[str, torch.Tensor], *, mapped: bool) -> nn.Parameter:
        """Return the weight, and let its layer in the model become the twin's."""
        base = base_name(name)
        assert base is not None
        path, _, attribute = base.rpartition(".")
        layer, own = (
            self.twin.get_submodule(path),
            self.model.get_submodule(name.rpartition(".")[0]),
        )
        layer._parameters[attribute] = weight = self._made(base, values, mapped)
        if hasattr(layer, _REPACKS):
            setattr(layer, _REPACKS, False)
        if type(own) is not type(layer):
            _become(own, layer, attribute)
        return weight

    def _made(
        self, base: str, values: Mapping[str, torch.Tensor], mapped: bool = False
    ) -> nn.Parameter:
        """Return the weight that transformers makes of `values`."""
        path, _, attribute = base.rpartition(".")
        quantiser = self.quantiser
        about = {"model": self.twin, "full_layer_name": base, "missing_keys": set()}
        if quantiser.pre_quantized and len(values) > 1:
            parts = {name.removeprefix(f"{path}."): [value] for name, value in values.items()}
            read = quantiser.get_load_operations()["deserialize"](quantiser)
            made = read.convert(parts, source_patterns=[*parts], **about)
        else:
            with InBlocks(mapped=values[base] if mapped else None):
                made = quantiser.get_quantize_ops().convert({base: [values[base]]}, **about)
        layer = self.twin.get_submodule(path)
        value = made.get(base, made.get(attribute, layer._parameters[attribute]))
        weight: nn.Parameter = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
        )
        weight.requires_grad_(False)
        return weight

    def smaller(self, costs: Sequence[CellCost], chain: Chain) -> list[CellCost]:
        """Return the costs of cells with what their weights take once they are quantised."""
        return [
            replace(cost, parameter_bytes=cost.parameter_bytes - self._spared(cell))
            for cost, cell in zip(costs, chain, strict=True)
        ]

    def _spared(self, cell: Cell) -> int:
        names = {
            f"{path}.{name}": weight
            for path, module in cell.named_modules()
            for name, weight in module._parameters.items()
            if weight is not None
        }
        return sum(self._spared_by(base_name(name), weight) for name, weight in names.items())

    def _spared_by(self, base: str | None, weight: torch.Tensor) -> int:
        if base not in self.wanted:
            return 0
        few = weight[:_PROBE]
        return round((few.nbytes - self._size(base, few)) * len(weight) / len(few))

    def _size(self, base: str, few: torch.Tensor) -> int:
        """Return the bytes of a weight with `few` rows, by quantising zeros; the twin stays."""
        layer = self.twin.get_submodule(base.rpartition(".")[0])
        weight = layer.get_parameter(base.rpartition(".")[2])
        states = [(vars(one), dict(vars(one))) for one in (layer, weight)]
        own = dict(layer._parameters)
        try:
            return held_bytes(self._made(base, {base: torch.zeros_like(few, device="cpu")}))
        except Exception:  # a kernel of another device
            each = float(self.quantiser.param_element_size(self.twin, base, few))
            return round(few.numel() * each)
        finally:
            for now, before in states:
                now.clear()
                now.update(before)
            layer._parameters.clear()
            layer._parameters.update(own)


def _become(own: nn.Module, layer: nn.Module, weight: str) -> None:
    """Let `own` be `layer`, with its own other parameters, for whoever holds it."""
    layer._parameters.update({n: p for n, p in own._parameters.items() if n != weight})
    layer.training = own.training
    own.__class__, own.__dict__ = type(layer), vars(layer)
