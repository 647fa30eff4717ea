"""`loramux generate` and `loramux adapters`: what a person asks of a running server."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from lora_runtime.errors import LoramuxError
from lora_runtime.terminal import Terminal, echo, write
from loramux.server.cli import sampling
from loramux.server.cli.command import Command
from loramux.server.cli.connection import connected
from loramux.server.cli.tables import show_json, show_table
from loramux.server.client import UPLOAD_TIMEOUT_S, Client
from loramux.v1 import adapters_pb2, generation_pb2, types_pb2

Name = Annotated[str, typer.Argument(help="The adapter's name on the server.")]
ChatOrText = Annotated[
    bool | None,
    typer.Option(
        "--chat/--text",
        help="A user's message, or text to be continued. Default: a message where there is a chat "
        "template, else text.",
    ),
]
Weighted = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=WEIGHT]",
        help="A loaded adapter; repeat it to add up several. Default: the base.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Show it as JSON, for programs.")]

PERIOD_S = 0.3
"""Between two questions about a download."""

adapters = typer.Typer(
    help="Load, unload and show the adapters of a running server.", no_args_is_help=True
)


@connected
def generate(
    client: Client,
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    adapter: Weighted = None,
    chat: ChatOrText = None,
    system: Annotated[str | None, typer.Option(help="System message, before a user's.")] = None,
    max_tokens: sampling.MaxTokens = None,
    temperature: sampling.Temperature = None,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = None,
    min_p: sampling.MinP = None,
    seed: sampling.Seed = None,
    presence_penalty: sampling.PresencePenalty = None,
    frequency_penalty: sampling.FrequencyPenalty = None,
    repetition_penalty: sampling.RepetitionPenalty = None,
    logit_bias: sampling.LogitBias = None,
    n: sampling.NumOutputs = None,
    prompt_logprobs: sampling.PromptLogprobs = None,
    stop: sampling.Stop = None,
    ignore_eos: sampling.IgnoreEos = None,
    base_text: sampling.BaseText = None,
    priority: sampling.Priority = None,
    tenant: sampling.Tenant = None,
    json_schema: sampling.JsonSchema = None,
    regex: sampling.Regex = None,
    grammar: sampling.Grammar = None,
    choice: sampling.Choices = None,
) -> None:
    """Stream a running server's answer: text to stdout, one line of counts to stderr."""
    content = sys.stdin.read() if prompt == "-" else prompt
    options = sampling.given(context.params)
    if form := sampling.structured_output(json_schema, regex, grammar, choice):
        options["structured_output"] = form
    chosen = weights(adapter or [])
    if chat is None:
        chat = _is_chat(client, chosen, system, bool(base_text))
    if chat:
        messages = [*_turn("system", system), *_turn("user", content)]
        _show_stream(client.generate(messages=messages, adapters=chosen, **options))
    else:
        _show_stream(client.generate(content, adapters=chosen, **options))


def _is_chat(client: Client, adapters: Iterable[str], system: str | None, base_text: bool) -> bool:
    """Tell whether the base or one of the adapters has a chat template; say so if none has."""
    if client.server_info().base.has_chat_template:
        return True
    if not base_text and any(client.get_adapter(name).has_chat_template for name in adapters):
        return True
    if system is not None:
        raise typer.BadParameter(
            "there is no chat template, so only text can be sent; leave it out",
            param_hint="--system",
        )
    echo("note: there is no chat template: the prompt is sent as text (--text)", is_error=True)
    return False


def weights(adapters: Iterable[str]) -> dict[str, float]:
    """Read `name` and `name=weight`; a name given twice would lose its first weight."""
    weights: dict[str, float] = {}
    for text in adapters:
        name, separator, weight = text.partition("=")
        if name in weights:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint="--adapter")
        try:
            weights[name] = float(weight) if separator else 1.0
        except ValueError:
            raise typer.BadParameter(
                f"{text!r}: the weight must be a number", param_hint="--adapter"
            ) from None
    return weights


def _turn(role: str, content: str | None) -> list[dict[str, str]]:
    return [] if content is None else [{"role": role, "content": content}]


def _show_stream(responses: Iterable[generation_pb2.GenerateResponse]) -> None:
    """The first output as it comes; the others, which come beside it, in their order at the end."""
    texts: defaultdict[int, str] = defaultdict(str)
    ends: dict[int, generation_pb2.Finished] = {}
    for response in responses:
        delta, finished = response.delta, response.finished
        match response.WhichOneof("event"):
            case "started":
                for note in response.started.notes:
                    echo(f"note: {note}", is_error=True)
            case "prompt_logprobs":
                _show_logprobs(response.prompt_logprobs.logprobs)
            case "delta" if delta.index == 0:
                write(delta.text)
            case "delta":
                texts[delta.index] += delta.text
            case "finished":
                ends[finished.index] = finished
                if finished.index == 0:
                    _show_end("", finished)
    for index in sorted(ends.keys() - {0}):
        _show_end(texts[index], ends[index])


def _show_end(text: str, finished: generation_pb2.Finished) -> None:
    echo(text)
    echo(_summary(finished), is_error=True)


def _show_logprobs(logprobs: Iterable[types_pb2.TokenLogprob]) -> None:
    """One line a token of the prompt after the first: its place, its own, and the likeliest."""
    for place, entry in enumerate(logprobs, 1):
        top = "".join(f"  {each.token_id}: {each.logprob:.4f}" for each in entry.top)
        echo(f"prompt token {place}: {entry.logprob:.4f}{top}", is_error=True)


def _summary(finished: generation_pb2.Finished) -> str:
    reason = types_pb2.FinishReason.Name(finished.finish_reason)
    usage = finished.usage
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    return (
        f"{usage.prompt_tokens} prompt{cached} + {usage.output_tokens} output tokens, "
        f"{reason.removeprefix('FINISH_REASON_').lower()}"
    )


@adapters.command("load", cls=Command)
@connected
def load(
    client: Client,
    name: Annotated[str, typer.Argument(help="The name that requests will use.")],
    source: Annotated[
        str,
        typer.Argument(
            help="The adapter's folder on the server, within its adapter roots, or where the "
            "server may fetch it from: hf:org/name@revision, s3://…, gs://…, https://…"
        ),
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace what the name holds.")
    ] = False,
    pin: Annotated[
        bool, typer.Option("--pin", help="Keep it in the device pool; default: no longer.")
    ] = False,
) -> None:
    """Load an adapter while the server runs."""
    with _download_shown(client, name):
        response = client.load_adapter(
            name, source, replace=replace, pin=pin, timeout_s=UPLOAD_TIMEOUT_S
        )
    if response.already_loaded:
        echo(f"{name} was loaded already, with the same content")
    show_loaded(response.adapter)


@contextmanager
def _download_shown(client: Client, name: str) -> Iterator[None]:
    """Draw what the server says of a download while the context lasts; on terminals only."""
    bar, is_over = _transfer_bar(), Event()

    def follow() -> None:
        task = bar.add_task(f"fetching {name}", total=None, visible=False)
        while not is_over.wait(PERIOD_S):
            with suppress(LoramuxError, TimeoutError):  # it has no name yet, or the call failed
                info = client.get_adapter(name)
                is_shown = info.state == adapters_pb2.ADAPTER_STATE_DOWNLOADING
                total = info.num_bytes_to_download or None
                bar.update(task, completed=info.num_downloaded_bytes, total=total, visible=is_shown)

    follower = Thread(target=follow, daemon=True)
    with bar:
        if not bar.disable:
            follower.start()
        try:
            yield
        finally:
            is_over.set()
            if not bar.disable:
                follower.join()


def show_loaded(adapter: adapters_pb2.AdapterInfo) -> None:
    """A row of the table, and below it what must be known of the adapter."""
    show_adapters([adapter])
    for note in adapter.notes:
        echo(f"note: {note}", is_error=True)


@adapters.command("unload", cls=Command)
@connected
def unload(
    client: Client,
    name: Name,
    cancel: Annotated[
        bool,
        typer.Option(
            "--cancel", help="End the adapter's running requests; default: let them finish."
        ),
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return only when the adapter's memory is free.")
    ] = False,
) -> None:
    """Unload an adapter and forget its name; new requests for it fail at once."""
    client.unload_adapter(name, cancel=cancel, wait=wait)
    echo(f"{name} is unloaded")


@adapters.command("upload", cls=Command)
@connected
def upload(
    client: Client,
    name: Annotated[str, typer.Argument(help="The name that requests will use.")],
    folder: Annotated[Path, typer.Argument(help="The adapter's folder on this machine.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace what the name holds.")
    ] = False,
) -> None:
    """Send an adapter's files to a running server and load them there."""
    info = send_folder(client, name, folder, replace=replace)
    show_loaded(info)


@adapters.command("rollback", cls=Command)
@connected
def rollback(client: Client, name: Name) -> None:
    """Go back to what a name held before its last replacement; a second rollback undoes that."""
    info = client.rollback_adapter(name)
    show_loaded(info)


@adapters.command("stored", cls=Command)
@connected
def stored(client: Client, as_json: AsJson = False) -> None:
    """Show what uploads have left in the server's store, and which adapters hold it."""
    found = client.list_stored_adapters()
    if as_json:
        return show_json(found)
    rows = [
        (
            entry.source,
            decimal(entry.num_bytes),
            datetime.fromtimestamp(entry.stored_at_s).strftime("%Y-%m-%d %H:%M"),
            ", ".join(entry.adapters),
        )
        for entry in found.stored
    ]
    show_table(("source", "size", "stored", "held by"), rows)
    echo(f"{decimal(found.num_bytes)} of {decimal(found.max_bytes)}")


@adapters.command("delete", cls=Command)
@connected
def delete(
    client: Client,
    source: Annotated[
        str, typer.Argument(help="The content's source, as `adapters stored` shows it.")
    ],
) -> None:
    """Delete content from the server's store that no adapter holds."""
    entry = client.delete_stored_adapter(source)
    echo(f"{entry.source} is deleted: {decimal(entry.num_bytes)}")


def send_folder(
    client: Client, name: str, folder: Path, *, replace: bool
) -> adapters_pb2.AdapterInfo:
    """Upload with a bar on stderr; it is shown on terminals only."""
    bar = _transfer_bar()
    with bar:
        task = bar.add_task(f"sending {name}", total=None)
        return client.upload_adapter(
            name,
            folder,
            replace=replace,
            on_progress=lambda num_sent, total: bar.update(task, completed=num_sent, total=total),
        )


def _transfer_bar() -> Progress:
    console = Terminal(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@adapters.command("list", cls=Command)
@connected
def list_adapters(client: Client, as_json: AsJson = False) -> None:
    """Show every adapter: loaded, loading, draining and failed ones."""
    infos = client.list_adapters()
    if as_json:
        return show_json(infos)
    show_adapters(infos)


@adapters.command("show", cls=Command)
@connected
def show(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Show everything the server knows of one adapter."""
    info = client.get_adapter(name)
    if as_json:
        return show_json(info)
    facts = [
        *_facts(info).items(),
        *((f"honoured {key}", value) for key, value in sorted(info.honoured.items())),
        *((f"inert {key}", reason) for key, reason in sorted(info.inert.items())),
        *(("note", note) for note in info.notes),
    ]
    show_table(("field", "value"), facts, title=name)


def show_adapters(infos: Iterable[adapters_pb2.AdapterInfo]) -> None:
    """One row per adapter, with what people look for first."""
    columns = ("name", "state", "variant", "ranks", "size", "tier", "in flight", "error")
    show_table(columns, [[_facts(info)[column] for column in columns] for info in infos])


def _facts(info: adapters_pb2.AdapterInfo) -> dict[str, str]:
    state = adapters_pb2.AdapterState.Name(info.state)
    return {
        "name": info.name,
        "state": state.removeprefix("ADAPTER_STATE_").lower(),
        "digest": info.digest,
        "former digest": info.former_digest or "none",
        "source": info.source,
        "variant": info.variant,
        "ranks": ", ".join(map(str, info.ranks)),
        "modules": ", ".join(info.target_modules),
        "layers": str(info.num_layers or "the base's"),
        "invocation tokens": ", ".join(map(str, info.invocation_tokens)),
        "chat template": "its own" if info.has_chat_template else "the base's",
        "parameters": f"{info.num_parameters:,}",
        "size": decimal(info.num_bytes),
        "in flight": str(info.num_in_flight),
        "tier": _tier(info),
        "downloaded": f"{decimal(info.num_downloaded_bytes)} of "
        f"{decimal(info.num_bytes_to_download)}"
        if info.state == adapters_pb2.ADAPTER_STATE_DOWNLOADING
        else "",
        "error": info.error,
    }


def _tier(info: adapters_pb2.AdapterInfo) -> str:
    """Where its weights are."""
    if info.is_pinned:
        return "device, pinned"
    return "device" if info.is_resident else "host" if info.digest else ""
