"""The server's settings: YAML file < environment (LORAMUX_*) < flags; checked once, then frozen."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, DirectoryPath, StringConstraints

from lora_runtime.config import CPU_DEFAULTS, LIMITS, MAX_BYTES, DeviceDefaults, EngineConfig
from lora_runtime.errors import AdapterSourceRefused, ConfigError, written
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
from loramux.server.adapters.sources.location import PLACE, REMOTE, check_prefix, is_remote, parse


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


def _split_commas(value: object) -> object:
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


def _split_adapters(value: object) -> object:
    """NAME=SOURCE, in a list (flags) or one text (environment), to a mapping. In a text a colon
    parts two of them only where a name and = follow, so that a source may have one."""
    parts = NEXT_NAME.split(value) if isinstance(value, str) else value
    if isinstance(parts, list) and any(re.search(r",[^,=/]+=", str(part)) for part in parts):
        raise ValueError("one NAME=SOURCE; give two by --adapter A=… --adapter B=…, or in a file")
    return _named(parts, "NAME=SOURCE")


def _split_on_demand(value: object) -> object:
    """PATTERN=SOURCE with commas between, in a text or in each text of a list."""
    parts = [value] if isinstance(value, str) else value
    if isinstance(parts, list):
        parts = [pair for part in parts for pair in str(part).split(",") if pair]
    return _named(parts, "PATTERN=SOURCE")


def _named(parts: object, form: str) -> object:
    if not isinstance(parts, list | tuple):
        return parts
    pairs = [str(part).partition("=") for part in parts if part]
    if not all(name and source for name, _, source in pairs):
        raise ValueError(form)
    named = {name: source for name, _, source in pairs}
    if len(named) < len(pairs):
        raise ValueError(f"{form} with each {form.partition('=')[0].lower()} once")
    return named


def _checked_source(value: object) -> object:
    """A source elsewhere stays text, anything else becomes a path."""
    if not isinstance(value, str) or not is_remote(value):
        return path_text(value)
    try:
        parse(value)
    except AdapterSourceRefused as error:
        raise ValueError(f"a folder, or a source elsewhere: {error.message}") from None
    return value


def _checked_template(source: str) -> str:
    if PLACE not in source:
        raise ValueError(f"a source with {PLACE} in it")
    if is_remote(source):
        _checked_source(source.replace(PLACE, "name"))
    return source


def _checked_network(value: str) -> str:
    try:
        ip_network(value)
    except ValueError as error:
        raise ValueError(f"a network as 10.0.0.0/8 ({error})") from None
    return value


def _checked_host_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", value):
        raise ValueError("a host name as gpu.example, without a port")
    return value


NEXT_NAME = re.compile(r":(?=[A-Za-z0-9][A-Za-z0-9._@/-]*=)")
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
ReasoningParser = Literal["auto", "none"]
LogFormat = Literal["auto", "json", "console"]
Url = Annotated[str, AfterValidator(_checked_url)]
Address = Annotated[str, AfterValidator(_checked_address)]
Folder = Annotated[DirectoryPath, BeforeValidator(path_text)]
Paths = Annotated[tuple[Folder, ...], BeforeValidator(_split_paths)]
RemoteSource = Annotated[str, BeforeValidator(_checked_source), StringConstraints(pattern=REMOTE)]
NamedSources = Annotated[dict[str, RemoteSource | Folder], BeforeValidator(_split_adapters)]
Prefixes = Annotated[
    tuple[Annotated[str, AfterValidator(check_prefix)], ...], BeforeValidator(_split_commas)
]
HostNames = Annotated[
    tuple[Annotated[str, AfterValidator(_checked_host_name)], ...], BeforeValidator(_split_commas)
]
Networks = Annotated[
    tuple[Annotated[str, AfterValidator(_checked_network)], ...], BeforeValidator(_split_commas)
]
Templates = Annotated[
    dict[str, Annotated[str, AfterValidator(_checked_template)]], BeforeValidator(_split_on_demand)
]

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
    """host:port of OpenAI's API, the status page, /metrics, /healthz and /readyz."""
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
    http_names: HostNames = setting(default=(), group=ACCESS, also=("http_name",))
    """Host names by which clients call HTTP, beside localhost and addresses, where there are no
    keys, as behind a proxy that passes its own name on; another name is refused, because a page in
    a browser may use it. None: on an address that others reach, every name is taken."""
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
    adapter: NamedSources = setting(default_factory=dict, group=ADAPTERS, metavar="NAME=SOURCE")
    """Adapters to load at the start, each as NAME=SOURCE, from any folder or place; it replaces
    what its name held before."""
    adapter_sources: Prefixes = setting(default=(), group=ADAPTERS, also=("adapter_source",))
    """Where clients may have adapters fetched from: prefixes of sources, as hf:acme/, s3://bucket/,
    gs://bucket/adapters/ or https://host/; none: nothing is fetched that clients name."""
    adapter_source_networks: Networks = setting(default=(), group=ADAPTERS)
    """Networks, as 10.0.0.0/8, that https sources may be in although they are not public. An
    address that a prefix itself names needs none."""
    adapter_on_demand: Templates = setting(
        default_factory=dict, group=ADAPTERS, metavar="PATTERN=SOURCE"
    )
    """Adapters to load when a request first names them, each as PATTERN=SOURCE with {name} in the
    source, as team-*=hf:acme/{name} or *=folder/{name}; the first pattern that matches counts."""
    adapter_fetch_timeout_s: Float = setting(default=1800.0, gt=0, le=1_000_000, group=LIMITS)
    """Seconds that fetching one adapter may take, three attempts together."""
    adapter_fetch_idle_s: Float = setting(default=30.0, gt=0, le=1_000_000, group=LIMITS)
    """Seconds without a byte after which an attempt to fetch an adapter is given up."""
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

    reasoning_parser: ReasoningParser = setting(default="auto", group=TEXT)
    """Whether what models think before they answer is given apart from their text, and comes before
    the form of an answer that has one. `auto`: where the chat template knows tags for it. `none`:
    it stays in the text, and a form begins with the first token."""

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
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else "--help shows those there are"
        raise ConfigError(
            f"{variable} is set in the environment and is no setting; {hint}", field=variable
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
