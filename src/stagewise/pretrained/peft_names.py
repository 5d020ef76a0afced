"""The names that a model's tensors have in the folder of its base model, or in PEFT's.

PEFT puts the base model at `base_model.model`, and its adapted layers at `base_layer`; its own
files leave the adapter's name out.
"""

_BASE, _LAYER = "base_model.model.", ".base_layer."
_NEW = ("lora_", "ia3_", "oft_", "vera_", "hada_", "boft_", "modules_to_save")
ADAPTER = "default"  # PEFT's own name for the only adapter


def is_adapter(name: str) -> bool:
    """Return whether a tensor belongs to an adapter."""
    return any(part.startswith(_NEW) for part in name.split("."))


def base_name(name: str) -> str | None:
    """Return a tensor's name in the base model; None if it is an adapter's.

    >>> base_name("base_model.model.model.layers.0.q_proj.base_layer.weight")
    'model.layers.0.q_proj.weight'
    """
    if is_adapter(name):
        return None
    return name.removeprefix(_BASE).replace(_LAYER, ".")


def adapter_name(name: str) -> str | None:
    """Return the name of an adapter's tensor in PEFT's file; None for any other.

    >>> adapter_name("base_model.model.model.layers.0.q_proj.lora_A.default.weight")
    'base_model.model.model.layers.0.q_proj.lora_A.weight'
    """
    return name.replace(f".{ADAPTER}", "", 1) if is_adapter(name) else None
