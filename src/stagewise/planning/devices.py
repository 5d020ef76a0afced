"""The device catalogue: published figures of devices, from TOML.

Problem: planning for 64 H100s on a laptop needs the H100's rates, and every cluster has different
links. Idea: a catalogue as data (`devices.toml`, each figure with its source) that the user's files
extend; the fraction of the peak that is achieved, the efficiency, is a parameter.
"""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

from stagewise.costs import LinkCost
from stagewise.errors import DeviceError

_UNITS: dict[str, dict[str, float]] = {
    "flops": {"GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15},
    "memory": {
        **{"MB": 1e6, "GB": 1e9, "TB": 1e12},
        **{"MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40},
    },
    "bandwidth": {"MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12},
    "latency": {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0},
}
_EXAMPLES = {"flops": "67 TFLOP/s", "memory": "80 GB", "bandwidth": "450 GB/s", "latency": "10 us"}
_FIELDS = ("memory", "memory_bandwidth", "flops", "intra_node", "inter_node")
_OPTIONAL = ("devices_per_node", "efficiency", "source")


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The achieved fractions of the published peaks, each in (0, 1]."""

    compute: float
    memory: float
    link: float


@dataclass(frozen=True, kw_only=True)
class LinkSpec:
    """One direction of the link between two devices."""

    bytes_per_second: float
    latency_seconds: float


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """A device's published peaks, and the efficiency with which they are achieved.

    The keys of `flops_per_second` are torch's names of dtypes, and "tf32" and "float8"; `source`
    says where the figures were published.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_second: float
    flops_per_second: Mapping[str, float] = field(hash=False)
    intra_node: LinkSpec
    inter_node: LinkSpec
    efficiency: Efficiency
    devices_per_node: int = 1
    source: str = ""

    def flops_rate(self, dtype: str) -> float:
        """Return the achieved FLOP/s in `dtype`; unlisted dtypes count as float32."""
        rates = self.flops_per_second
        return rates.get(dtype, rates["float32"]) * self.efficiency.compute

    @property
    def memory_rate(self) -> float:
        """The achieved bytes per second to and from the device's memory."""
        return self.memory_bytes_per_second * self.efficiency.memory

    def link(self, num_devices: int) -> LinkCost:
        """Return the link between pipeline neighbours: across nodes if one node is too small."""
        spec = self.intra_node if num_devices <= self.devices_per_node else self.inter_node
        return LinkCost(
            latency_seconds=spec.latency_seconds,
            seconds_per_byte=1 / (spec.bytes_per_second * self.efficiency.link),
        )


def device_named(name: str, catalogue: Mapping[str, DeviceSpec]) -> DeviceSpec:
    """Return the device called `name`; raise DeviceError listing the names if there is none."""
    if name not in catalogue:
        raise DeviceError(
            f"there is no device {name!r}; known devices are {', '.join(sorted(catalogue))}. "
            "Describe others in a TOML file and pass it with --device-file, or put it at "
            "~/.config/stagewise/devices.toml"
        )
    return catalogue[name]


def load_devices(own_files: Iterable[Path] = ()) -> dict[str, DeviceSpec]:
    """Return the packaged catalogue, overridden by the devices and efficiencies of `own_files`.

    Raises DeviceError naming the file, device and field that are wrong.
    """
    packaged = files(__package__).joinpath("devices.toml").read_text(encoding="utf-8")
    tables: dict[str, tuple[str, dict[str, object]]] = {}
    efficiency: dict[str, object] = {}
    texts = [("stagewise's devices.toml", packaged), *map(_read, own_files)]
    for where, text in texts:
        parsed = _parsed(text, where)
        efficiency |= _table(parsed.get("efficiency", {}), f"efficiency in {where}")
        for name, table in _table(parsed.get("devices", {}), f"devices in {where}").items():
            tables[name] = where, _table(table, f"device {name!r} in {where}")
    return {name: _device(name, *found, efficiency) for name, found in tables.items()}


def own_device_files(
    given: Path | None, environment: Mapping[str, str], home: Path
) -> tuple[Path, ...]:
    """Return the user's configuration file, if any, then the file `given` with --device-file."""
    root = environment.get("XDG_CONFIG_HOME")
    configured = (Path(root) if root else home / ".config") / "stagewise" / "devices.toml"
    own = (configured,) if configured.is_file() else ()
    return own if given is None else (*own, given)


def with_efficiency(device: DeviceSpec, text: str) -> DeviceSpec:
    """Return `device` with another efficiency: "0.4" of peak compute, or "compute=0.4,link=0.9"."""
    changes = {}
    for part in text.split(","):
        name, found, number = part.rpartition("=")
        name = name.strip() if found else "compute"
        try:
            changes[name] = float(number)
        except ValueError:
            changes[name] = math.nan
    return replace(
        device,
        efficiency=_efficiency(
            {**vars(device.efficiency), **changes}, f"efficiency {text!r} of {device.name}"
        ),
    )


def parse_bytes(text: str, what: str) -> int:
    """Parse "16GB" or "16 GiB" as bytes; raise DeviceError naming `what`."""
    return round(_quantity(text, "memory", what))


def _device(
    name: str, where: str, table: dict[str, object], efficiency: Mapping[str, object]
) -> DeviceSpec:
    here = f"device {name!r} in {where}"
    for needed in _FIELDS:
        if needed not in table:
            raise DeviceError(f"{here} has no {needed}; add it, as in\n\n{_EXAMPLE}")
    _check_known(table, (*_FIELDS, *_OPTIONAL), here)
    rates = {
        dtype: _quantity(rate, "flops", f"flops.{dtype} of {here}")
        for dtype, rate in _table(table["flops"], f"flops of {here}").items()
    }
    if "float32" not in rates:
        raise DeviceError(f"flops of {here} has no float32; add its rate, such as '67 TFLOP/s'")
    number = table.get("devices_per_node", 1)
    if not isinstance(number, int) or number < 1:
        raise DeviceError(f"devices_per_node of {here} is {number!r}; give a positive integer")
    own = _table(table.get("efficiency", {}), f"efficiency of {here}")
    return DeviceSpec(
        name=name,
        memory_bytes=round(_quantity(table["memory"], "memory", f"memory of {here}")),
        memory_bytes_per_second=_quantity(
            table["memory_bandwidth"], "bandwidth", f"memory_bandwidth of {here}"
        ),
        flops_per_second=rates,
        intra_node=_link(table["intra_node"], f"intra_node of {here}"),
        inter_node=_link(table["inter_node"], f"inter_node of {here}"),
        efficiency=_efficiency({**efficiency, **own}, f"efficiency of {here}"),
        devices_per_node=number,
        source=str(table.get("source", where)),
    )


def _link(value: object, what: str) -> LinkSpec:
    table = _table(value, what)
    for needed in ("bandwidth", "latency"):
        if needed not in table:
            raise DeviceError(f"{what} has no {needed}; add it, such as '{_EXAMPLES[needed]}'")
    _check_known(table, ("bandwidth", "latency"), what)
    return LinkSpec(
        bytes_per_second=_quantity(table["bandwidth"], "bandwidth", f"bandwidth of {what}"),
        latency_seconds=_quantity(table["latency"], "latency", f"latency of {what}"),
    )


def _efficiency(table: Mapping[str, object], what: str) -> Efficiency:
    names = ("compute", "memory", "link")
    _check_known(table, names, what)
    for name in names:
        fraction = table.get(name)
        if not (isinstance(fraction, int | float) and 0 < fraction <= 1):
            raise DeviceError(
                f"{what}: {name} is {fraction!r}; give a fraction of the peak, above 0 and at "
                "most 1"
            )
    return Efficiency(**{name: float(table[name]) for name in names})  # type: ignore[arg-type]


def _quantity(value: object, kind: str, what: str) -> float:
    """Parse "450 GB/s" into base units; raise DeviceError listing the units of `kind`."""
    units = _UNITS[kind]
    text = value.strip() if isinstance(value, str) else ""
    unit = text.lstrip("0123456789.+-e ")
    try:
        number = float(text.removesuffix(unit))
    except ValueError:
        number = math.nan
    if unit not in units or not (math.isfinite(number) and number > 0):
        raise DeviceError(
            f"{what} is {value!r}; write a number above 0 and one of the units "
            f"{', '.join(units)}, such as '{_EXAMPLES[kind]}'"
        )
    return number * units[unit]


def _check_known(table: Mapping[str, object], known: Iterable[str], what: str) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise DeviceError(f"{what} has {', '.join(unknown)}; allowed are only {', '.join(known)}")


def _table(value: object, what: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise DeviceError(f"{what} is {value!r}; it must be a table, as in\n\n{_EXAMPLE}")
    return value


def _read(path: Path) -> tuple[str, str]:
    try:
        return str(path), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(
            f"the device file {path} cannot be read ({error}); check --device-file"
        ) from error


def _parsed(text: str, where: str) -> dict[str, object]:
    try:
        parsed = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise DeviceError(
            f"{where} is not valid TOML ({error}); write it as in\n\n{_EXAMPLE}"
        ) from error
    _check_known(parsed, ("efficiency", "devices"), where)
    return parsed


_EXAMPLE = """[devices.mine]
memory = "80 GB"
memory_bandwidth = "3350 GB/s"
flops = { float32 = "67 TFLOP/s", bfloat16 = "989 TFLOP/s" }
devices_per_node = 8
intra_node = { bandwidth = "450 GB/s", latency = "12 us" }
inter_node = { bandwidth = "50 GB/s", latency = "18 us" }
efficiency = { compute = 0.5 }
"""
