from __future__ import annotations

from pathlib import Path

import pytest
import typer

from lora_runtime.base import device
from lora_runtime.config import BaseConfig, DeviceDefaults
from lora_runtime.errors import ConfigError
from loramux.server.cli.settings import TRAIN_SETTINGS, read_texts
from loramux.server.config import SETTINGS, load_config, split_address

BAD_DEVICES = ["", "gpu", "0", "cuda0", "cuda:", "cuda:-1", "cuda:01", "cuda:1.5", "cuda:x",
               "CUDA", "cuda: 1", "cuda:1 ", "cuda:1\n", "cpu:0", "meta", "mps"]  # fmt: skip


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(f"LORAMUX_{name.upper()}", raising=False)


def write(folder: Path, text: str) -> Path:
    file = folder / "serve.yaml"
    file.write_text(text)
    return file


def test_file_then_environment_then_flags(tmp_path, monkeypatch):
    file = write(tmp_path, "max_num_seqs: 1\nmax_queued_requests: 1\nblock_size: 1\n")
    monkeypatch.setenv("LORAMUX_MAX_QUEUED_REQUESTS", "2")
    monkeypatch.setenv("LORAMUX_BLOCK_SIZE", "2")
    config = load_config(file, {"block_size": 3, "device": None})
    scheduler = config.scheduler
    assert (scheduler.max_num_seqs, scheduler.max_queued_requests) == (1, 2)
    assert config.cache.block_size == 3
    assert config.base.device == "auto"


def test_every_setting_reaches_the_engine(tmp_path):
    engine = load_config(
        flags={
            "base": "some/base",
            "quantization": "none",
            "dtype": "float32",
            "device": "cpu",
            "dequantized_cache": False,
            "max_num_seqs": 3,
            "max_num_batched_tokens": 33,
            "max_model_len": 77,
            "block_size": 8,
            "kv_bytes": 4096,
            "gpu_memory_utilization": 0.5,
            "adapter_pool_bytes": 9999,
            "max_queued_requests": 5,
        }
    )
    base = engine.base
    assert (base.model, base.quantization, base.dtype, base.device, base.dequantized_cache) == (
        "some/base", "none", "float32", "cpu", False,
    )  # fmt: skip
    scheduler = engine.scheduler
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (3, 33)
    assert (scheduler.max_model_len, scheduler.max_queued_requests) == (77, 5)
    assert (engine.cache.block_size, engine.cache.kv_bytes) == (8, 4096)
    assert engine.cache.gpu_memory_utilization == 0.5
    assert engine.adapters.pool_bytes == 9999


@pytest.mark.parametrize("given", ["list", "text"])
def test_adapter_roots_from_a_list_or_a_path_variable(tmp_path, monkeypatch, given):
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        root.mkdir()
    if given == "text":
        monkeypatch.setenv("LORAMUX_ADAPTER_ROOTS", f"{roots[0]}:{roots[1]}")
        assert load_config().adapter_roots == tuple(roots)
    else:
        file = write(tmp_path, f"adapter_roots: [{roots[0]}, {roots[1]}]")
        assert load_config(file).adapter_roots == tuple(roots)


def test_a_wrong_key_is_refused_with_the_nearest_valid_one(tmp_path):
    with pytest.raises(
        ConfigError, match=r"max_num_seq .*serve.yaml.*mean 'max_num_seqs'"
    ) as caught:
        load_config(write(tmp_path, "max_num_seq: 4"))
    assert caught.value.field == "max_num_seq"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("block_size", 0),
        ("kv_bytes", "much"),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.01),
        ("gpu_memory_utilization", "nan"),
        ("max_model_len", 1),
        ("drain_s", -1),
        ("dtype", "float16"),
        ("quantization", "int3"),
        ("grpc_address", "localhost"),
        ("http_address", "localhost:http"),
        ("grpc_address", "localhost:65536"),
        ("adapter_roots", ["/does/not/exist"]),
        *(("device", name) for name in BAD_DEVICES),
    ],
)
def test_a_value_that_cannot_be_used_is_named(setting, value):
    with pytest.raises(ConfigError, match=setting) as caught:
        load_config(flags={setting: value})
    assert caught.value.field == setting


def test_the_error_says_where_the_value_was_set(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAMUX_BLOCK_SIZE", "none")
    with pytest.raises(ConfigError, match="in the environment"):
        load_config(write(tmp_path, "block_size: 4"))
    with pytest.raises(ConfigError, match="in the flags"):
        load_config(flags={"block_size": -4})


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "a: [", "1: 2", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"serve\.yaml"):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_refused_and_an_empty_one_is_not(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml"):
        load_config(tmp_path / "none.yaml")
    assert load_config(write(tmp_path, "# nothing\n")) == load_config()


def test_addresses():
    assert split_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert split_address("[::1]:50051") == ("::1", 50051)


def test_the_settings_cannot_change_later():
    with pytest.raises(AttributeError, match="assign"):
        load_config().cuda_graphs = False


@pytest.mark.parametrize("name", BAD_DEVICES)
def test_the_engine_refuses_a_device_by_its_name_too(name):
    with pytest.raises(ConfigError, match="must be auto, cpu, cuda or cuda:N") as caught:
        BaseConfig(device=name)
    assert caught.value.field == "device"


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:7", "cuda:10"])
def test_names_of_devices(name):
    assert BaseConfig(device=name).device == name


def device_settings(config):
    scheduler = config.scheduler
    return [scheduler.max_num_seqs, scheduler.max_num_batched_tokens, config.adapters.pool_bytes]


def test_what_is_not_set_is_fit_for_the_device(tmp_path, monkeypatch):
    asked = []
    defaults = DeviceDefaults(max_num_seqs=200, max_num_batched_tokens=3000, pool_bytes=5 << 30)
    monkeypatch.setattr(device, "device_defaults", lambda name: asked.append(name) or defaults)
    config = load_config(flags={"device": "cuda:1"})
    assert device_settings(config) == [200, 3000, 5 << 30]
    monkeypatch.setenv("LORAMUX_MAX_NUM_SEQS", "2")
    config = load_config(
        write(tmp_path, "max_num_batched_tokens: 900\n"), {"adapter_pool_bytes": 77}
    )
    assert device_settings(config) == [2, 900, 77]
    assert asked == ["cuda:1", "auto"]


def test_a_cpu_asks_for_no_device(monkeypatch):
    monkeypatch.setattr(device, "device_defaults", lambda name: 1 / 0)
    config = load_config(flags={"device": "cpu"})
    assert device_settings(config) == [64, 512, 512 << 20]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_num_batched_tokens": 100}, (100, 100)),
        ({"max_num_seqs": 8192}, (8192, 8192)),
        ({"max_num_seqs": 7}, (7, 4096)),
    ],
)
def test_rows_and_tokens_of_a_step_follow_the_one_that_is_set(monkeypatch, given, expected):
    defaults = DeviceDefaults(max_num_seqs=256, max_num_batched_tokens=4096, pool_bytes=1 << 20)
    monkeypatch.setattr(device, "device_defaults", lambda name: defaults)
    config = load_config(flags=given)
    assert tuple(device_settings(config)[:2]) == expected


def test_settings_that_do_not_fit_each_other_are_named(monkeypatch):
    defaults = DeviceDefaults(max_num_seqs=256, max_num_batched_tokens=4096, pool_bytes=1)
    monkeypatch.setattr(device, "device_defaults", lambda name: defaults)
    with pytest.raises(ConfigError, match="100.*at least max_num_seqs .200.") as caught:
        load_config(flags={"max_num_batched_tokens": 100, "max_num_seqs": 200})
    assert caught.value.field == "max_num_batched_tokens"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1GiB", 1 << 30), ("512MiB", 512 << 20), ("2GB", 2_000_000_000), ("1.5kib", 1536),
     ("4096", 4096), (4096, 4096)],
)  # fmt: skip
def test_bytes_have_units_wherever_they_are_written(tmp_path, monkeypatch, text, expected):
    monkeypatch.setenv("LORAMUX_KV_BYTES", str(text))
    config = load_config(write(tmp_path, f"max_upload_bytes: {text}"), {"adapter_pool_bytes": text})
    sizes = config.cache.kv_bytes, config.max_upload_bytes, config.adapters.pool_bytes
    assert sizes == (expected,) * 3


@pytest.mark.parametrize("text", ["1 parsec", "GiB", "-1GiB", "0", True])
def test_what_is_no_number_of_bytes_is_named(text):
    with pytest.raises(ConfigError, match=r"kv_bytes \(in the flags\) is") as caught:
        load_config(flags={"kv_bytes": text})
    assert caught.value.field == "kv_bytes"


def test_the_base_may_be_written_as_for_training(tmp_path):
    config = load_config(write(tmp_path, "base: {model: b, quantization: none}\ndtype: float32"))
    assert config.base == BaseConfig(model="b", quantization="none", dtype="float32")
    with pytest.raises(ConfigError, match="quantization and base.quantization are the same"):
        load_config(write(tmp_path, "base: {quantization: none}\nquantization: none"))


@pytest.mark.parametrize(
    "text", ["1,5GiB", "1,073,741,824", "1.5.5GiB", "1GiB-5", "1GiB junk", "8bit", "1.2B", "٣GiB"]
)
def test_a_size_is_read_whole(tmp_path, text):
    """Of each of these the beginning is a size: a byte, mostly."""
    with pytest.raises(ConfigError, match="a number of bytes, such as 1GiB") as refusal:
        load_config(write(tmp_path, f"device: cpu\nkv_bytes: '{text}'\n"))
    assert refusal.value.field == "kv_bytes"


@pytest.mark.parametrize("part", ["7", "null", "[]"])
@pytest.mark.parametrize("rest", ["", "num_blocks: 3\n"])
@pytest.mark.parametrize("flags", [{}, {"block_size": 4}])
def test_a_part_that_is_no_mapping_is_named_whatever_else_is_set(tmp_path, part, rest, flags):
    for text in (f"cache: {part}\n{rest}", f"{rest}cache: {part}\n"):
        with pytest.raises(ConfigError, match="cache .* must be a mapping of fields") as refusal:
            load_config(write(tmp_path, f"device: cpu\n{text}"), flags)
        assert refusal.value.field == "cache"


@pytest.mark.parametrize(
    ("field", "value"),
    [("adapter_roots", [""]), ("adapter", {"a": ""}), ("adapter_store", ""), ("base", "")],
)
def test_an_empty_path_is_not_the_working_directory(field, value):
    with pytest.raises(ConfigError, match="''; it must be") as refusal:
        load_config(None, {"device": "cpu", field: value})
    assert str(refusal.value.field).startswith(field)


def test_several_pairs_in_one_flag_are_never_taken_for_one(tmp_path) -> None:
    (tmp_path / "x").mkdir()
    one, two = f"a-*={tmp_path}/{{name}}", f"b={tmp_path}/x{{name}}"
    for given in ([f"{one},{two}"], [one, two], f"{one},{two}"):
        found = load_config(None, {"adapter_on_demand": given}).adapter_on_demand
        assert found == {"a-*": f"{tmp_path}/{{name}}", "b": f"{tmp_path}/x{{name}}"}
    with pytest.raises(ConfigError, match="--adapter A=… --adapter B=…"):
        load_config(None, {"adapter": [f"a={tmp_path}/x,b={tmp_path}/x"]})


@pytest.mark.parametrize("name", ["columns", "rank_pattern", "alpha_pattern", "sweep"])
def test_several_pairs_in_one_flag_of_train_are_refused_with_advice(name) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(typer.BadParameter, match=f"{flag} A=… {flag} B=…"):
        read_texts({name: ["a=1,b=2"]}, TRAIN_SETTINGS)
    assert read_texts({name: ["a=1", "b=2"]}, TRAIN_SETTINGS)
