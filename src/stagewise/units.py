"""Sizes as text."""


def size_in_words(num_bytes: float) -> str:
    """Return a size with three significant digits and a unit, such as `1.5 GiB`."""
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes /= 1024
        units.pop()
    return f"{num_bytes:.3g} {units[-1]}"
