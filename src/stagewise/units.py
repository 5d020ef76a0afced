"""Sizes and times as text."""


def size_in_words(num_bytes: float) -> str:
    """Return a size with three significant digits and a unit, such as `1.5 GiB`."""
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes /= 1024
        units.pop()
    return f"{num_bytes:.3g} {units[-1]}"


def format_seconds(seconds: float) -> str:
    """Return a time with three significant digits and a unit, such as `1.25 s` or `12.5 ms`."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if abs(float(f"{seconds * factor:.3g}")) >= 1 or unit == "us":
            break
    number = float(seconds * factor)
    digits = f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"
    return f"{digits} {unit}" if seconds else "0 s"


def duration_in_words(seconds: float) -> str:
    """Return a long time in the largest unit of which there is one, such as `1.5 days`."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return format_seconds(seconds)
