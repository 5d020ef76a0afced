"""What `cells=` might be for a model that cannot be captured."""

from torch import nn


def cells_to_name(model: nn.Module) -> list[str]:
    """The model's lists of modules, or else its children."""
    patterns: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(pattern[:-1]) for pattern in patterns)
        if path and isinstance(module, nn.ModuleList) and len(module) > 1 and not inside:
            patterns.append(f"{path}.*")
    return patterns or [name for name, _ in model.named_children()][:5] or ["..."]
