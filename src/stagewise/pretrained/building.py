"""A pipeline of a pretrained model whose whole no process ever holds.

Problem: `AutoModel.from_pretrained` in every process reads the whole model everywhere, where each
needs only its stages. Idea: build it on the meta device, capture and cut it there, by costs that
are estimated, and let every process read its own tensors from the safetensors files.
"""

import gc
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagewise.batch.split import extent
from stagewise.checkpoints.loading import load
from stagewise.checkpoints.renamed import Renamed
from stagewise.costs import CellCost
from stagewise.engine.stage.loss import Loss
from stagewise.engine.transport.processes import num_processes
from stagewise.errors import ModelError
from stagewise.free_pages import HEAP
from stagewise.habits import refuse_argument
from stagewise.model.captured import Captured
from stagewise.model.export.capture import capture
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.plan import Plan, plan_for
from stagewise.planning.request import PlanRequest
from stagewise.planning.search.search import search_for
from stagewise.pretrained.folders import ADAPTERS, save_adapters, save_model
from stagewise.pretrained.peft_names import ADAPTER, adapter_name, base_name
from stagewise.pretrained.quantised import Quantised, quantiser_of
from stagewise.profiling.estimate import estimate

# Of Pipeline, whose other parameters are made of the folder.
_OPTIONS = {*inspect.signature(Pipeline).parameters} - {"model", "plan", "init", "state"}
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


class PretrainedPipeline(Pipeline):
    """A Pipeline of a model of transformers, with PEFT's adapters if `adapters` is not None."""

    config: Any = None  # of transformers
    adapters: Any = None  # PEFT's configuration

    def load_adapters(self, folder: str | Path) -> None:
        """Load the values of adapters that PEFT saved; collective."""
        state = Renamed(Path(folder) / ADAPTERS, adapter_name)
        own = {name: t for name, t in self.state_dict().items() if adapter_name(name)}
        load(state, own, self._whole.aliases, self.ranks, convert=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` of transformers reads, or of PEFT if the model has
        adapters, which alone are then saved; collective.
        """
        if self.adapters is None:
            save_model(self, self.config, Path(folder))
        else:
            save_adapters(self, self.adapters, Path(folder))


def from_pretrained(
    folder: str | Path,
    example: Mapping[str, Any],
    *,
    plan: Plan | Mapping[str, Any] | None = None,
    num_microbatches: int = 8,
    adapters: Any = None,
    dtype: torch.dtype | None = None,
    quantization_config: Any = None,
    **options: Any,
) -> PretrainedPipeline:
    """Return a Pipeline of the model in a Hugging Face folder; every rank calls this.

    Every process reads only its own tensors of the safetensors files.

    Args:
        folder: what `save_pretrained` of transformers wrote: `config.json` and safetensors.
        example: keyword arguments of the model's forward, as every batch will have them, such as
            `{"input_ids": ids, "labels": ids}`.
        plan: how to cut and run it: a Plan, or arguments of `stagewise.plan` for one that is cut by
            estimated costs, such as `{"num_devices": 2, "memory_bytes": (8e9, 16e9)}`; by default
            one stage on each rank.
        num_microbatches: of a plan that is cut here.
        adapters: new adapters, as a configuration of PEFT (`peft.LoraConfig(...)`), or the folder
            of trained ones; all other parameters are frozen.
        dtype: of the parameters; by default the folder's.
        quantization_config: transformers' `BitsAndBytesConfig` or `TorchAoConfig`: every process
            quantises its own weights while it reads them; a folder that is quantised needs none.
        options: as for `Pipeline`; with `loss`, the model's output is its first argument.

    Raises:
        ModelError: no configuration, or quantised in another way; no transformers, or no peft.
        CheckpointError: a tensor of the model is not in the folder, or has another shape.
    """
    _check_options(options)
    path = _folder(folder)
    config, model, maker = _models(path, dtype, adapters, quantization_config)
    chain = capture(model, **example)  # which the Pipeline of the model then has
    if not isinstance(plan, Plan):
        wishes = {"num_microbatches": num_microbatches, **(plan or {})}
        plan = _estimated(chain, example, wishes, options.get("loss"), maker)
    _tidy()
    given = {"init": _initialiser(model, adapters), "state": Renamed(path, base_name, maker)}
    pipe = PretrainedPipeline(model, plan, **given, **options)
    pipe.config = config
    if adapters is not None:
        pipe.adapters = model.peft_config[ADAPTER]
    if isinstance(adapters, str | Path):
        pipe.load_adapters(adapters)
    return pipe


def _check_options(options: Mapping[str, Any]) -> None:
    for unknown in options.keys() - _OPTIONS:
        known = {*inspect.signature(from_pretrained).parameters, *_OPTIONS} - {"options"}
        refuse_argument("from_pretrained", unknown, known)


def _tidy() -> None:
    """Free what capturing has left, which would come on top of the values."""
    gc.collect()
    HEAP.give_back()


def _models(
    folder: Path, dtype: torch.dtype | None, adapters: Any, quantization_config: Any
) -> tuple[Any, Any, Quantised | None]:
    """Return the configuration, the model without values, and what quantises it, if anything."""
    config, make = _described(folder)
    quantiser = quantiser_of(config, quantization_config, folder)
    if quantiser is not None:
        dtype = quantiser.update_dtype(dtype or config.dtype)
    model = make(dtype)
    if adapters is not None:
        model = _with_adapters(model, adapters)
    maker = quantiser and Quantised.of(quantiser, model, make(dtype), folder)
    return config, model, maker


def _estimated(
    chain: Captured,
    example: Mapping[str, Any],
    wishes: dict[str, Any],
    loss: Loss | None,
    quantised: Quantised | None,
) -> Plan:
    """Return a plan that is cut by estimated costs, by default with one stage on each rank."""
    if not {"num_stages", "num_devices", "replicas"} & wishes.keys():
        wishes["num_devices"] = num_processes()
    request = PlanRequest(**wishes)

    def costs_at(count: int) -> Sequence[CellCost]:
        costs = estimate(
            chain, kwargs=dict(example), loss=loss, num_microbatches=count, device="cpu"
        )
        return costs if quantised is None else quantised.smaller(costs, chain.chain)

    if not request.searched:
        assert isinstance(request.num_microbatches, int)
        return plan_for(request, costs_at(request.num_microbatches))
    num_samples = extent([*example.items()]).num_samples or 1
    return search_for(request, costs_at, request.counts(num_samples)).plan


def _folder(folder: object) -> Path:
    if not isinstance(folder, str | Path):
        raise ModelError(f"from_pretrained reads a folder, but got a {type(folder).__name__}")
    return Path(folder)


def _described(folder: Path) -> tuple[Any, Callable[[torch.dtype | None], nn.Module]]:
    """Return the folder's configuration, and what makes the model that it describes on meta."""
    try:
        written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        names = written.get("architectures") or ["AutoModelForCausalLM"]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder} has no {CONFIG} that can be read ({type(error).__name__}: {error}); give a "
            "folder that save_pretrained of transformers wrote"
        ) from error
    transformers = _optional("transformers")
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    config.use_cache = False
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise ModelError(
            f"{folder / CONFIG} names the architecture {names[0]!r}, which this transformers "
            f"({transformers.__version__}) does not have; update it"
        )

    def on_meta(dtype: torch.dtype | None) -> nn.Module:
        with torch.device("meta"):
            make = kind.from_config if names[0].startswith("Auto") else kind._from_config
            model: nn.Module = make(config, dtype=dtype or config.dtype)
        return model.train()

    return config, on_meta


def _with_adapters(model: nn.Module, adapters: Any) -> nn.Module:
    peft = _optional("peft")
    config = adapters
    if isinstance(adapters, str | Path):
        config = peft.PeftConfig.from_pretrained(str(adapters))
        config.inference_mode = False
    with torch.device("meta"):
        made: nn.Module = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    return made


def _initialiser(model: Any, adapters: Any) -> Any:
    """Return what initialises a module: the base model's own way, and PEFT's for adapters."""
    if adapters is None:
        return None
    base, how = model.get_base_model(), model.peft_config[ADAPTER]
    lora = getattr(how, "init_lora_weights", True)

    def init(module: nn.Module) -> None:
        reset = getattr(module, "reset_lora_parameters", None)
        if reset is not None:
            reset(ADAPTER, lora)
        else:
            base._init_weights(module)

    return init


def _optional(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ModelError(f"{name} is not installed; run: pip install {name}") from error
