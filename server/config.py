"""The server's settings: YAML file < environment (LORAMUX_*) < flags; checked once, then frozen.

The only user of pydantic-settings. The runtime sees none of it, only the EngineConfig made here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    DirectoryPath,
    Field,
    PositiveInt,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from lora_runtime.config import (
    CPU_DEFAULTS,
    DEVICE_NAME,
    DEVICE_RULE,
    AdapterConfig,
    BaseConfig,
    CacheConfig,
    DeviceDefaults,
    DtypeName,
    EngineConfig,
    Quantization,
    SchedulerConfig,
)
from lora_runtime.errors import ConfigError
from lora_runtime.training.fields import parse_yaml


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port`; an IPv6 host stands in brackets. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("must be host:port with a port from 0 (any free one) to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _checked_address(address: str) -> str:
    split_address(address)
    return address


def _checked_device(name: str) -> str:
    if DEVICE_NAME.fullmatch(name) is None:
        raise ValueError(f"must be {DEVICE_RULE}")
    return name


def _split_paths(value: object) -> object:
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def _split_adapters(value: object) -> object:
    """NAME=PATH, in a list (flags) or one text (environment), to a mapping."""
    parts = _split_paths(value)
    if not isinstance(parts, list | tuple):
        return value
    pairs = [str(part).partition("=") for part in parts]
    if not all(name and path for name, _, path in pairs):
        raise ValueError("must be NAME=PATH")
    named = {name: path for name, _, path in pairs}
    if len(named) < len(pairs):
        raise ValueError("names an adapter twice")
    return named


PREFIX = "LORAMUX_"
OTHER_VARIABLES = ("ADDRESS", "CACHE", "CONFIG")
"""Variables of no setting: a client's server, the folder of bases, the file of settings."""
SERVICE_LINK = re.compile(
    r"(.+_)?(SERVICE_(HOST|PORT(_.+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""What Kubernetes puts into a pod's environment for every service, one called loramux among them.
Source: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
"""

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "json", "console"]
Address = Annotated[str, AfterValidator(_checked_address)]
DeviceName = Annotated[str, AfterValidator(_checked_device)]
Paths = Annotated[tuple[DirectoryPath, ...], NoDecode, BeforeValidator(_split_paths)]

NamedPaths = Annotated[dict[str, DirectoryPath], NoDecode, BeforeValidator(_split_adapters)]


class ServerConfig(BaseSettings):
    """Everything `loramux serve` can be told. Field names are the YAML keys and the flags."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    base: str = "smollm2-135m"
    """Catalog name, local folder, GGUF file or hub id."""
    quantization: Quantization = "nf4"
    """Format of the inner linear layers."""
    dtype: DtypeName = "auto"
    """Compute dtype."""
    device: DeviceName = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dequantized_cache: bool = True
    """CPU only: keep a dequantised copy of the weights; faster, more memory."""

    grpc_address: Address = "127.0.0.1:50051"
    """host:port of the gRPC services."""
    http_address: Address = "127.0.0.1:8080"
    """host:port of /metrics, /healthz and /readyz."""
    adapter_roots: Paths = ()
    """Folders that adapters may be loaded from, subfolders included; none: no loading by path."""

    adapter: NamedPaths = {}
    """Adapters that are loaded at the start, NAME=PATH, wherever they lie; each takes the place of
    what its name held."""
    wait_for_adapters: bool = True
    """Be ready only when the adapters of the last run, and those named, have been loaded or have
    failed; else at once, and each is there when it has been loaded."""

    adapter_store: Path | None = None
    """Folder that keeps the adapters' names over a restart, and uploaded adapters by content; one
    server at a time. None: `uploads` in the cache folder."""
    max_upload_bytes: PositiveInt = 2 << 30
    """Bytes of all files of one uploaded adapter."""

    max_store_bytes: PositiveInt = 100 << 30
    """Bytes of all uploaded adapters together; one more is refused until some are deleted."""

    max_num_seqs: PositiveInt = CPU_DEFAULTS.max_num_seqs
    """Sequences that run at once. On CUDA 128, or 256 from 40 GB of memory on."""
    max_num_batched_tokens: PositiveInt = CPU_DEFAULTS.max_num_batched_tokens
    """Tokens in one engine step. On CUDA 2048, or 4096 from 40 GB of memory on."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Longest prompt + output; none: the base's own limit."""
    block_size: PositiveInt = 16
    """Tokens in one KV block."""
    kv_bytes: PositiveInt | None = None
    """Bytes of the KV cache; none: what is left on CUDA (gpu_memory_utilization), else 1 GiB."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """CUDA only: share of the device's memory for base, adapters, steps and KV cache together."""
    cuda_graphs: bool = True
    """CUDA only: capture decode steps as graphs at the start, which makes each step faster."""
    adapter_pool_bytes: PositiveInt = CPU_DEFAULTS.pool_bytes
    """Bytes of device memory for adapters. On CUDA an eighth of the device's."""
    max_adapter_layers: PositiveInt | None = None
    """Layers to which an adapter may replicate the base's, where every other row of a step waits
    for them; none: four times the base's."""
    host_adapter_bytes: PositiveInt | None = None
    """Bytes of host memory for loaded adapters and their former contents; one more is refused.
    None: half of the machine's memory."""
    max_queued_requests: PositiveInt = 1024
    """Requests that may wait, three quarters of them of one client, before new ones are refused."""

    max_concurrent_calls: PositiveInt = 4096
    """Calls of any kind that may run or wait at once; one more is refused."""
    max_connection_age_s: Annotated[float, Field(gt=0, le=1_000_000)] = 3600.0
    """Seconds after which a connection takes no new calls and its client connects anew; running
    calls go on."""

    engine_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds without any progress after which a busy engine counts as hung: its requests end and
    so does the process. Probes turn earlier, after 4 seconds at most."""
    drain_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that running requests get to finish after SIGTERM."""
    log_level: LogLevel = "info"
    """Least severe messages to log."""
    log_format: LogFormat = "auto"
    """`auto`: console on a terminal, JSON elsewhere."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_args: PydanticBaseSettingsSource,
        **_others: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from the constructor only; `load_config` reads file and environment."""
        return (init_settings,)

    def to_engine_config(self) -> EngineConfig:
        """The part of the settings that the engine is built from. Raises ConfigError."""
        return EngineConfig(
            base=BaseConfig(
                model=self.base,
                quantization=self.quantization,
                dtype=self.dtype,
                device=self.device,
                dequantized_cache=self.dequantized_cache,
            ),
            cache=CacheConfig(
                block_size=self.block_size,
                kv_bytes=self.kv_bytes,
                gpu_memory_utilization=self.gpu_memory_utilization,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_model_len=self.max_model_len,
                max_queued_requests=self.max_queued_requests,
            ),
            adapters=AdapterConfig(
                pool_bytes=self.adapter_pool_bytes,
                max_layers=self.max_adapter_layers,
                host_bytes=self.host_adapter_bytes,
            ),
            cuda_graphs=self.cuda_graphs,
        )


def load_config(
    file: Path | None = None, flags: Mapping[str, object] | None = None
) -> ServerConfig:
    """Merge YAML file, environment and flags (None = not given) into checked settings.

    What none of them gives is fit for the device. Raises ConfigError; `field` is the key, the
    message says where it was set and what to change.
    """
    layers: dict[str, Mapping[str, Any]] = {
        str(file): _read_yaml(file) if file else {},
        "the environment": EnvSettingsSource(ServerConfig)(),
        "the flags": {name: value for name, value in (flags or {}).items() if value is not None},
    }
    given = {name: value for layer in layers.values() for name, value in layer.items()}
    try:
        config = ServerConfig(**given)
        config = ServerConfig(**{**_device_defaults(config, given.keys()), **given})
    except ValidationError as error:
        raise _config_error(error, layers) from None
    config.to_engine_config()
    return config


def check_environment(others: Collection[str] = ()) -> None:
    """Raise ConfigError for a variable LORAMUX_… that is none of the settings, nor of `others`,
    which are names without the prefix. One that is misspelt would change nothing, in silence.
    So would an empty one, or it would be a value of its own, as the setting has it: it is an error
    too.
    """
    known = {*map(str.upper, ServerConfig.model_fields), *others, *OTHER_VARIABLES}
    for variable in sorted(os.environ):
        name = variable.removeprefix(PREFIX)
        if name in known and not os.environ[variable]:
            raise ConfigError(
                f"{variable} is set in the environment and empty; give it a value or unset it",
                field=variable,
            )
        if name == variable or name in known or SERVICE_LINK.fullmatch(name):
            continue
        near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
        raise ConfigError(
            f"{variable} is set in the environment and is no setting; did you mean "
            f"{PREFIX}{near[0]}?",
            field=variable,
        )


def _device_defaults(config: ServerConfig, given: Collection[str]) -> Mapping[str, int]:
    """Defaults that depend on the device. Rows of a step that are not given follow its tokens if
    those are, and the other way round: a row takes a token at least.
    """
    defaults = _defaults_of(config.device)
    num_rows, num_tokens = defaults.max_num_seqs, defaults.max_num_batched_tokens
    if "max_num_batched_tokens" in given:
        num_rows = min(num_rows, config.max_num_batched_tokens)
    if "max_num_seqs" in given:
        num_tokens = max(num_tokens, config.max_num_seqs)
    return {
        "max_num_seqs": num_rows,
        "max_num_batched_tokens": num_tokens,
        "adapter_pool_bytes": defaults.pool_bytes,
    }


def _defaults_of(device: str) -> DeviceDefaults:
    """Imports torch where a GPU is possible."""
    if device == "cpu":
        return CPU_DEFAULTS
    from lora_runtime.base.device import device_defaults

    return device_defaults(device)


def _read_yaml(file: Path) -> Mapping[str, Any]:
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read settings from {file}: {error}", field="config") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{file} must hold `key: value` lines", field="config")
    return content


def _config_error(error: ValidationError, layers: Mapping[str, Mapping[str, Any]]) -> ConfigError:
    first = error.errors()[0]
    name = str(first["loc"][0])
    origin = [source for source, layer in layers.items() if name in layer][-1]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, ServerConfig.model_fields, n=1, cutoff=0.0)
        message = f"{name} (in {origin}) is not a setting; did you mean {near[0]}?"
    else:
        message = f"{name} (in {origin}) is {first['input']!r}: {first['msg']}"
    return ConfigError(message, field=name)
