"""`loramux serve`: a base and its adapters over gRPC, until a signal ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from lora_runtime.config import DtypeName, Quantization
from lora_runtime.terminal import write
from server.cli.settings import ConfigFile
from server.cli.settings import setting as _setting
from server.config import LogFormat, LogLevel, ServerConfig, load_config
from server.logs import setup_logging

ROOT_FLAGS = ("--adapter-roots", "--adapter-root")
"""One folder each time; the variable LORAMUX_ADAPTER_ROOTS and the file have them all."""


def serve(
    config: ConfigFile = None,
    base: Annotated[str | None, _setting("base")] = None,
    quantization: Annotated[Quantization | None, _setting("quantization")] = None,
    dtype: Annotated[DtypeName | None, _setting("dtype")] = None,
    device: Annotated[str | None, _setting("device")] = None,
    dequantized_cache: Annotated[bool | None, _setting("dequantized_cache")] = None,
    grpc_address: Annotated[str | None, _setting("grpc_address")] = None,
    http_address: Annotated[str | None, _setting("http_address")] = None,
    adapter_roots: Annotated[list[Path] | None, _setting("adapter_roots", *ROOT_FLAGS)] = None,
    adapter: Annotated[list[str] | None, _setting("adapter")] = None,
    wait_for_adapters: Annotated[bool | None, _setting("wait_for_adapters")] = None,
    adapter_store: Annotated[Path | None, _setting("adapter_store")] = None,
    max_upload_bytes: Annotated[int | None, _setting("max_upload_bytes")] = None,
    max_store_bytes: Annotated[int | None, _setting("max_store_bytes")] = None,
    max_num_seqs: Annotated[int | None, _setting("max_num_seqs")] = None,
    max_num_batched_tokens: Annotated[int | None, _setting("max_num_batched_tokens")] = None,
    max_model_len: Annotated[int | None, _setting("max_model_len")] = None,
    block_size: Annotated[int | None, _setting("block_size")] = None,
    kv_bytes: Annotated[int | None, _setting("kv_bytes")] = None,
    gpu_memory_utilization: Annotated[float | None, _setting("gpu_memory_utilization")] = None,
    cuda_graphs: Annotated[bool | None, _setting("cuda_graphs")] = None,
    adapter_pool_bytes: Annotated[int | None, _setting("adapter_pool_bytes")] = None,
    max_adapter_layers: Annotated[int | None, _setting("max_adapter_layers")] = None,
    host_adapter_bytes: Annotated[int | None, _setting("host_adapter_bytes")] = None,
    max_queued_requests: Annotated[int | None, _setting("max_queued_requests")] = None,
    max_concurrent_calls: Annotated[int | None, _setting("max_concurrent_calls")] = None,
    max_connection_age_s: Annotated[float | None, _setting("max_connection_age_s")] = None,
    engine_timeout_s: Annotated[float | None, _setting("engine_timeout_s")] = None,
    drain_s: Annotated[float | None, _setting("drain_s")] = None,
    log_level: Annotated[LogLevel | None, _setting("log_level")] = None,
    log_format: Annotated[LogFormat | None, _setting("log_format")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the settings and end.")
    ] = False,
) -> None:
    """Serve the base and its adapters over gRPC, with metrics and probes over HTTP.

    Settings come from the YAML file, then LORAMUX_<SETTING> in the environment, then these flags.
    SIGTERM drains; a second one ends at once.
    """
    flags = {name: value for name, value in locals().items() if name in ServerConfig.model_fields}
    settings = load_config(config, flags)
    if print_config:
        write(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
        return
    setup_logging(level=settings.log_level, log_format=settings.log_format)
    from server.app import run

    run(settings)
