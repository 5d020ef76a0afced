from pathlib import Path

import pytest

from stagewise.costs import LinkCost
from stagewise.errors import DeviceError
from stagewise.planning.devices import (
    Efficiency,
    device_named,
    load_devices,
    own_device_files,
    parse_bytes,
    with_efficiency,
)

MINE = """
[devices.mine]
memory = "80 GiB"
memory_bandwidth = "1.5 TB/s"
flops = { float32 = "60 TFLOP/s", bfloat16 = "1 PFLOP/s" }
devices_per_node = 4
intra_node = { bandwidth = "450 GB/s", latency = "12 us" }
inter_node = { bandwidth = "50 GB/s", latency = "2 ms" }
efficiency = { compute = 0.5, memory = 1, link = 0.5 }
"""


def written(directory: Path, text: str, name: str = "mine.toml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_the_catalogue_has_what_the_papers_used_and_every_source() -> None:
    catalogue = load_devices()
    asked = (
        "p100 p40 v100 a100-40 a100 h100 h200 l4 rtx4090 mi300x tpu-v2 tpu-v3 tpu-v4 tpu-v5p cpu"
    )
    assert set(asked.split()) <= set(catalogue)
    for device in catalogue.values():
        assert len(device.source) > 10
        assert device.intra_node.bytes_per_second >= device.inter_node.bytes_per_second
        assert device.flops_rate("bfloat16") >= device.flops_rate("float32")
        assert device.efficiency == Efficiency(compute=0.52, memory=0.90, link=0.84)
    assert catalogue["h100"].flops_per_second["bfloat16"] == 989.4e12
    assert catalogue["tpu-v2"].memory_bytes == 8 * 2**30  # GPipe's 8 GB devices
    assert catalogue["tpu-v3"].memory_bytes == 16 * 2**30


def test_own_devices_extend_and_replace(tmp_path: Path) -> None:
    catalogue = load_devices(
        [written(tmp_path, MINE + MINE.replace("devices.mine", "devices.h100"))]
    )
    device = device_named("mine", catalogue)
    assert device.memory_bytes == 80 * 2**30
    assert device.memory_rate == 1.5e12
    assert device.flops_rate("bfloat16") == 0.5e15
    assert device.flops_rate("float16") == device.flops_rate("float32") == 30e12  # not listed
    assert device.source == str(tmp_path / "mine.toml")
    assert catalogue["h100"].memory_bytes == device.memory_bytes
    assert catalogue["a100"].memory_bytes == 80e9


def test_a_pipeline_over_several_nodes_has_the_slower_link(tmp_path: Path) -> None:
    device = load_devices([written(tmp_path, MINE)])["mine"]
    assert device.link(4) == LinkCost(latency_seconds=12e-6, seconds_per_byte=1 / 225e9)
    assert device.link(5) == LinkCost(latency_seconds=2e-3, seconds_per_byte=1 / 25e9)


def test_efficiency_of_all_devices_and_of_one(tmp_path: Path) -> None:
    catalogue = load_devices([written(tmp_path, "[efficiency]\ncompute = 0.3\n" + MINE)])
    assert catalogue["h100"].efficiency == Efficiency(compute=0.3, memory=0.90, link=0.84)
    assert catalogue["mine"].efficiency.compute == 0.5
    device = catalogue["h100"]
    assert with_efficiency(device, "0.4").efficiency.compute == 0.4
    changed = with_efficiency(device, "compute=0.1, link=1").efficiency
    assert changed == Efficiency(compute=0.1, memory=0.90, link=1.0)


def test_where_own_files_stand(tmp_path: Path) -> None:
    given = tmp_path / "given.toml"
    assert own_device_files(None, {}, tmp_path) == ()
    configured = tmp_path / ".config" / "stagewise" / "devices.toml"
    configured.parent.mkdir(parents=True)
    configured.write_text(MINE)
    assert own_device_files(given, {}, tmp_path) == (configured, given)
    assert own_device_files(given, {"XDG_CONFIG_HOME": str(tmp_path)}, tmp_path) == (given,)


def test_an_unknown_device_gets_the_names_there_are() -> None:
    with pytest.raises(
        DeviceError, match=r"no device 'h1000'; known devices are a100, .*--device-file"
    ):
        device_named("h1000", load_devices())


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('memory = "80 GiB"\n', "", r"device 'mine' in .*mine.toml has no memory; add it, as in"),
        ('memory = "80 GiB"', "memory = 80", r"memory of .* is 80; .* units MB, GB"),
        ('"80 GiB"', '"80 GB/s"', r"memory of device 'mine' .* is '80 GB/s'; .* such as '80 GB'"),
        ('"80 GiB"', '"-1 GB"', r"above 0"),
        ('"60 TFLOP/s"', '"60 GB"', r"flops.float32 of .* units GFLOP/s"),
        ('float32 = "60 TFLOP/s", ', "", r"flops of .* has no float32"),
        ('latency = "12 us"', 'latency = "12"', r"latency of intra_node of .* units ns, us"),
        (', latency = "12 us"', "", r"intra_node of .* has no latency"),
        ("devices_per_node = 4", "devices_per_node = 0", r"positive integer"),
        ("devices_per_node", "devices_a_node", r"has devices_a_node; allowed are only memory,"),
        ("compute = 0.5", "compute = 52", r"compute is 52; give a fraction"),
        ("[devices.mine]", "[mine]", r"mine.toml has mine; allowed are only efficiency, devices"),
        ("[devices.mine]", "[devices.mine", r"mine.toml is not valid TOML"),
    ],
)
def test_errors_name_file_device_and_field(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in MINE
    with pytest.raises(DeviceError, match=message):
        load_devices([written(tmp_path, MINE.replace(old, new))])


def test_a_missing_file_and_a_wrong_efficiency(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"absent.toml cannot be read .* check --device-file"):
        load_devices([tmp_path / "absent.toml"])
    for text in ("fast", "2", "compute=0", "speed=0.5"):
        with pytest.raises(DeviceError, match="efficiency"):
            with_efficiency(load_devices()["h100"], text)


def test_bytes_from_words() -> None:
    assert parse_bytes("16GB", "--device-memory") == 16 * 10**9
    assert parse_bytes("16 GiB", "--device-memory") == 16 * 2**30
    with pytest.raises(DeviceError, match="--device-memory is '16'"):
        parse_bytes("16", "--device-memory")
