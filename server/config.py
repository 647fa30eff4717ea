"""The server's settings: YAML file < environment (LORAMUX_*) < flags; checked once, then frozen."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, DirectoryPath

from lora_runtime.config import CPU_DEFAULTS, LIMITS, MAX_BYTES, DeviceDefaults, EngineConfig
from lora_runtime.errors import ConfigError, written
from lora_runtime.settings import (
    Bytes,
    Entry,
    FilePath,
    Float,
    Int,
    canonical_names,
    checked,
    entries,
    merged,
    nested,
    path_text,
    read_yaml,
    setting,
    settings,
)


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port`; an IPv6 host stands in brackets. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("host:port with a port from 0 (any free one) to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _checked_address(address: str) -> str:
    split_address(address)
    return address


def _checked_url(url: str) -> str:
    if url and not re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", url):
        raise ValueError("a URL, http://host:port or https://host:port")
    return url


def _split_paths(value: object) -> object:
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def _split_adapters(value: object) -> object:
    """NAME=PATH, in a list (flags) or one text (environment), to a mapping."""
    parts = _split_paths(value)
    if not isinstance(parts, list | tuple):
        return value
    pairs = [str(part).partition("=") for part in parts]
    if not all(name and path for name, _, path in pairs):
        raise ValueError("NAME=PATH")
    named = {name: path for name, _, path in pairs}
    if len(named) < len(pairs):
        raise ValueError("NAME=PATH with each name once")
    return named


PREFIX = "LORAMUX_"
OTHER_VARIABLES = ("ADDRESS", "API_KEY", "CACHE", "CONFIG", "TLS_CA")
"""Variables of no setting: a client's server, key and roots of TLS; the folder of bases; the file
of settings.
"""
SERVICE_LINK = re.compile(
    r"(.+_)?(SERVICE_(HOST|PORT(_.+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""What Kubernetes puts into a pod's environment for every service, one called loramux among them.
Source: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
"""

LogLevel = Literal["debug", "info", "warning", "error"]
ToolCallParser = Literal[
    "auto", "none", "hermes", "qwen3_coder", "llama3_json", "mistral", "mistral_named"
]
LogFormat = Literal["auto", "json", "console"]
Url = Annotated[str, AfterValidator(_checked_url)]
Address = Annotated[str, AfterValidator(_checked_address)]
Folder = Annotated[DirectoryPath, BeforeValidator(path_text)]
Paths = Annotated[tuple[Folder, ...], BeforeValidator(_split_paths)]
NamedPaths = Annotated[dict[str, Folder], BeforeValidator(_split_adapters)]

MAX_SECONDS = 1_000_000
"""Eleven days: longer waits mean that something else is wanted."""

NETWORK, ACCESS, ADAPTERS, TEXT = "Network", "Access", "Adapters", "Text"
PROCESS = "Logs and shutdown"


@settings
class ServerConfig(EngineConfig):
    """Everything `loramux serve` can be told: the engine's settings, and these."""

    grpc_address: Address = setting(default="127.0.0.1:50051", group=NETWORK)
    """host:port of the gRPC services."""
    http_address: Address = setting(default="127.0.0.1:8080", group=NETWORK)
    """host:port of /metrics, /healthz and /readyz."""
    max_concurrent_calls: Int = setting(default=4096, gt=0, le=1_000_000, group=NETWORK)
    """Calls of any kind that may run or wait at once; a further one is refused."""
    max_connection_age_s: Float = setting(default=3600.0, gt=0, le=MAX_SECONDS, group=NETWORK)
    """Seconds after which a connection takes no new calls and its client connects anew; running
    calls go on."""

    keys: FilePath | None = setting(default=None, group=ACCESS)
    """File of API keys, tenants and what each may do (docs/access.md); it is read again when it
    changes. None: everybody may do everything, so both addresses must be this machine's own."""
    insecure: bool = setting(default=False, group=ACCESS)
    """Listen on addresses that others reach without keys: everybody who does may do everything."""
    tls_cert: FilePath | None = setting(default=None, group=ACCESS)
    """PEM file of the server's certificate, for both ports; read again when it changes."""
    tls_key: FilePath | None = setting(default=None, group=ACCESS)
    """PEM file of the certificate's key."""
    tls_client_ca: FilePath | None = setting(default=None, group=ACCESS)
    """PEM file of the roots of clients' certificates, which everybody but probes must have then."""

    adapter_roots: Paths = setting(
        default=(), group=ADAPTERS, also=("adapter_root",), metavar="FOLDER"
    )
    """Folders that adapters may be loaded from, subfolders included; none: no loading by path."""
    adapter: NamedPaths = setting(default_factory=dict, group=ADAPTERS, metavar="NAME=PATH")
    """Adapters to load at the start, each as NAME=PATH, from any folder; it replaces what its name
    held before."""
    wait_for_adapters: bool = setting(default=True, group=ADAPTERS)
    """Report ready only when the adapters of the last run and of `adapter` have been loaded or
    have failed. False: report ready at once; each adapter can be used when it has been loaded."""
    adapter_store: FilePath | None = setting(default=None, group=ADAPTERS)
    """Folder that keeps the adapters' names over a restart, and uploaded adapters by content; one
    server at a time. None: `uploads` in the cache folder."""
    max_upload_bytes: Bytes = setting(default=2 << 30, gt=0, le=MAX_BYTES, group=LIMITS)
    """Bytes of all files of one uploaded adapter."""
    max_store_bytes: Bytes = setting(default=100 << 30, gt=0, le=MAX_BYTES, group=LIMITS)
    """Bytes of all uploaded adapters together; beyond them uploads are refused until some adapters
    are deleted."""

    tool_call_parser: ToolCallParser = setting(default="auto", group=TEXT)
    """Format in which the models' calls of tools are read from their text. `auto`: the one that the
    chat template shows. `none`: calls stay in the text."""

    engine_timeout_s: Float = setting(default=10.0, gt=0, le=MAX_SECONDS, group=PROCESS)
    """Seconds without any progress after which a busy engine counts as hung: its requests and the
    process end. Probes fail earlier, after 4 seconds at most."""
    drain_s: Float = setting(default=30.0, ge=0, le=MAX_SECONDS, group=PROCESS)
    """Seconds that running requests get to finish after SIGTERM."""
    log_level: LogLevel = setting(default="info", group=PROCESS)
    """Least severe messages to log."""
    log_format: LogFormat = setting(default="auto", group=PROCESS)
    """`auto`: console on a terminal, JSON elsewhere."""
    log_requests: bool = setting(default=True, group=PROCESS)
    """Log a line for every generation that ends: ids, tokens, reason and seconds; no text."""
    otlp_endpoint: Url = setting(default="", group=PROCESS, metavar="URL")
    """Collector of OpenTelemetry traces, as http://localhost:4318 (OTLP over HTTP); it needs the
    extra `tracing`. Empty: as OTEL_EXPORTER_OTLP_ENDPOINT says, else no traces."""


SETTINGS = entries(ServerConfig)
"""Key → setting of the server."""


def load_config(
    file: Path | None = None, flags: Mapping[str, object] | None = None
) -> ServerConfig:
    """Merge YAML file, environment and flags (None = not given) into checked settings.

    What none of them gives is fit for the device. Raises ConfigError; `field` is the key, the
    message says where it was set and what to change.
    """
    given_flags = {name: value for name, value in (flags or {}).items() if value is not None}
    sources = {
        str(file): read_yaml(file) if file else {},
        "the environment": environment(SETTINGS),
        "the flags": given_flags,
    }
    layers = {
        where: nested(values, ServerConfig, source=f" (in {where})")
        for where, values in sources.items()
    }

    def origin(key: str) -> str:
        entry = SETTINGS.get(re.split(r"[.\[]", key)[0])
        if entry is None:
            return key
        part = entry.part
        given = [
            where
            for where, layer in layers.items()
            if entry.name in (layer if part is None else layer.get(part, {}))
        ]
        return f"{key} (in {given[-1]})" if given else key

    given = merged(*layers.values())
    device = checked({"base": given.get("base", {})}, ServerConfig, origin).base.device
    return checked(merged(_device_defaults(device, given), given), ServerConfig, origin)


def environment(found: Mapping[str, Entry]) -> dict[str, str]:
    """Values of the variables LORAMUX_<NAME> that stand for settings."""
    names = canonical_names(found)
    variables = {name.upper(): value for name, value in os.environ.items()}
    given = {name: variables.get(f"{PREFIX}{name.upper()}") for name in names}
    return {name: value for name, value in given.items() if value is not None}


def check_environment(others: Collection[str] = ()) -> None:
    """Raise ConfigError for a variable LORAMUX_… that is none of the settings, nor of `others`,
    which are names without the prefix. One that is misspelt would change nothing, in silence.
    So would an empty one, or it would be a value of its own, as the setting has it: it is an error
    too.
    """
    known = {*map(str.upper, canonical_names(SETTINGS)), *others, *OTHER_VARIABLES}
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


def _device_defaults(device: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that depend on the device, beside what is given."""
    scheduler = given.get("scheduler", {})
    return _defaults_of(device).by_part(
        _whole(scheduler.get("max_num_seqs")), _whole(scheduler.get("max_num_batched_tokens"))
    )


def _whole(value: object) -> int | None:
    """A positive number of a setting that is not checked yet; what is none is named later."""
    text = written(value).strip("'")
    return int(text) or None if text.isdecimal() else None


def _defaults_of(device: str) -> DeviceDefaults:
    """Imports torch where a GPU is possible."""
    if device == "cpu":
        return CPU_DEFAULTS
    from lora_runtime.base.device import device_defaults

    return device_defaults(device)
