"""`loramux merge`, `adapters verify` and `adapters convert`: commands on an adapter's folder that
need no server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.filesize import decimal
from rich.table import Table

from lora_runtime.adapters.config.verdicts import field_refusals, field_verdicts
from lora_runtime.config import BaseConfig, EngineConfig
from lora_runtime.errors import AdapterRefused, ConfigError
from lora_runtime.terminal import Terminal, echo
from loramux.server.cli.settings import BASE_FLAGS, ConfigFile, with_flags
from loramux.server.config import load_config

if TYPE_CHECKING:
    from lora_runtime.adapters.merge import Merge
    from lora_runtime.adapters.parity import Parity
    from lora_runtime.adapters.serving_form import ModuleForm, ServingForm
    from lora_runtime.base.loader import Base
    from lora_runtime.engine.load import AdapterLoad
    from lora_runtime.text.text_side import TextSide

MAX_SHOWN = 60
"""Characters of a field's value in the table."""

Folder = Annotated[Path, typer.Argument(help="The adapter's folder.")]


@with_flags(BASE_FLAGS)
def verify(
    path: Folder,
    config: ConfigFile = None,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Check the config's fields alone; load no base.")
    ] = False,
    **flags: Any,
) -> None:
    """Check whether an adapter would be served, and how. Exit code 0 if so, 1 if it is refused.

    Shows every field of its config, what it changes, and whether its logits here are those that
    were recorded where it was made.
    """
    console = Terminal(markup=False)
    fields = _read_config(path)
    refusal = next(field_refusals(fields), None)
    if config_only or refusal:
        console.print(_field_table(fields))
        if refusal:
            raise refusal
        console.print(
            "honoured as far as the config alone says: --config-only looked at no modules, "
            "parameters, tokens or tensors; leave it out, and name the base with --base NAME, to "
            "check these too"
        )
        return
    settings = load_config(config, flags)
    try:
        load = load_on_base(path, settings)
    except AdapterRefused as error:
        console.print(_field_table(fields, error=error))
        raise
    console.print(_field_table(load.config, form=load.form))
    console.print(_module_table(load.form))
    packed = load.pack(settings.adapters.layer_limit(load.base.spec.num_layers))
    console.print(_fact_table(load.form, load.base, packed.nbytes, settings))
    console.print(_parity_line(load.gate(packed)))


@with_flags(BASE_FLAGS[:-1])
def convert(
    path: Folder,
    out: Annotated[Path, typer.Argument(help="A new folder for the converted adapter.")],
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Convert an adapter to a plain LoRA that PEFT loads on the unmodified base, if that is exact.

    Scalings are folded in, and what PiSSA or OLoRA took out of the base becomes part of the
    change. DoRA, layer replication and activated LoRA are refused: no plain LoRA does the same.
    """
    from lora_runtime.adapters.convert import plain_files
    from lora_runtime.adapters.files.folder import read_adapter, write_file
    from lora_runtime.adapters.files.parity_record import write_parity_record

    if out.exists():
        raise ConfigError(f"{out} exists already; name a folder that does not", field="out")
    load = load_on_base(path, load_config(config, {**flags, "dtype": "float32"}))
    form, record = load.form, load.record
    files = plain_files(form, load.base.spec, load.base.weights, load.metadata)
    files.write(out)
    for name, text in form.text_files.items():
        write_file(out, name, text)
    if record is not None:
        if record.tensors_sha256 == form.facts.tensors_sha256:
            record = replace(record, tensors_sha256=read_adapter(out).tensors_sha256)
        write_parity_record(out, record)
    echo(f"{out} holds it as a plain LoRA of rank {', '.join(map(str, form.ranks))}")


@with_flags(BASE_FLAGS[:-1])
def merge(
    path: Folder,
    out: Annotated[Path, typer.Argument(help="A new folder for the checkpoint.")],
    config: ConfigFile = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Dtype of the written weights."),
    ] = "float32",
    **flags: Any,
) -> None:
    """Add an adapter to the dequantised base that serves it; transformers loads the result.

    float32 gives the served adapter's own logits. 16 bits round every weight: what that takes from
    the adapter's change is printed. Layer replication and activated LoRA are refused.
    """
    import torch

    from lora_runtime.adapters.merge import Merge
    from lora_runtime.base.dense_checkpoint import dense_tensors, write_checkpoint
    from lora_runtime.text.text_files import TEMPLATE_FILE

    if out.exists():
        raise ConfigError(f"{out} exists already; name a folder that does not", field="out")
    load = load_on_base(path, load_config(config, {**flags, "dtype": "float32"}))
    loaded, form = load.base, load.form
    merging = Merge(form, loaded.spec, getattr(torch, dtype))
    side, _ = own_text(form, loaded)
    text = dict(form.text_files)
    if side is not None and side.template is not None:
        text[TEMPLATE_FILE] = side.template.encode()
    write_checkpoint(
        out, loaded, merging.merged(dense_tensors(loaded)), getattr(torch, dtype), text
    )
    console = Terminal(markup=False, soft_wrap=True, highlight=False)
    console.print(f"{out} holds {loaded.spec.name} with {form.facts.variant}, {dtype}")
    console.print(_loss_line(merging))


def _read_config(path: Path) -> Mapping[str, object]:
    """The config alone, so that its table is shown whatever is wrong with the tensors."""
    from lora_runtime.adapters.files.file_names import CONFIG_FILE, MAX_CONFIG_BYTES
    from lora_runtime.adapters.files.folder import read_optional
    from lora_runtime.strict_json import parse_object

    content = read_optional(path, CONFIG_FILE, MAX_CONFIG_BYTES)
    if content is None:
        raise AdapterRefused(f"{CONFIG_FILE} is missing from the folder", field=CONFIG_FILE)
    return parse_object(content, CONFIG_FILE)


def load_on_base(path: Path, settings: EngineConfig) -> AdapterLoad:
    """Load the base and read the adapter for it. Raises BaseRefused, AdapterRefused, which says
    that the base is the default one where nobody may have chosen it.
    """
    from lora_runtime.base.loader import load_base
    from lora_runtime.engine.load import AdapterLoad

    with Terminal(stderr=True).status("loading the base") as status:
        base = load_base(settings.base, on_progress=status.update)
        status.update("reducing the adapter")
        try:
            return AdapterLoad.read(path, base)
        except AdapterRefused as error:
            if settings.base.model != BaseConfig().model:
                raise
            raise type(error)(
                f"{error.message}; this base is the default one, {settings.base.model}: --base "
                "names another",
                field=error.field,
            ) from None


def _field_table(
    config: Mapping[str, object],
    *,
    form: ServingForm | None = None,
    error: AdapterRefused | None = None,
) -> Table:
    """One row a field. What a base was needed for comes from the form, or from its refusal."""
    table = Table("field", "value", "verdict", "why", title="adapter_config.json")
    for field in field_verdicts(config):
        treatment, reason = str(field.treatment), field.reason
        if form is not None and field.name in form.facts.inert:
            treatment, reason = "inert", form.facts.inert[field.name]
        if error is not None and field.name == error.field:
            treatment, reason = "refused", error.message
        table.add_row(field.name[:MAX_SHOWN], _short(field.value), treatment, reason)
    return table


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def _module_table(form: ServingForm) -> Table:
    """One row for each kind of module: how many, their ranks, and what else changes them."""
    groups: dict[str, list[ModuleForm]] = {}
    for key, module in form.modules.items():
        groups.setdefault(key.path.rpartition(".")[2], []).append(module)
    table = Table("modules", "count", "ranks", "and", title="what it changes")
    for name, modules in sorted(groups.items()):
        ranks = ", ".join(map(str, sorted({module.rank for module in modules} - {0})))
        extras = sorted({extra for module in modules for extra in _extras(module)})
        table.add_row(name, str(len(modules)), ranks, ", ".join(extras))
    return table


def _extras(module: ModuleForm) -> Iterator[str]:
    if module.gain is not None:
        yield "gain"
    if module.bias is not None:
        yield "bias"
    if module.patch is not None:
        ids = module.patch.ids
        yield "all rows replaced" if ids is None else f"{len(ids)} rows replaced"


def _fact_table(form: ServingForm, base: Base, num_bytes: int, settings: EngineConfig) -> Table:
    """Notes that a server would add. Raises AdapterTooLarge for more than its pool holds."""
    from lora_runtime.adapters.slot_table import SlotTable

    SlotTable(settings.adapters.pool_bytes, 1).register(form.digest, num_bytes)
    side, text_notes = own_text(form, base)
    invocation = ", ".join(map(str, form.facts.invocation_tokens))
    facts = {
        "digest": form.digest,
        "variant": form.facts.variant,
        "base": f"{base.spec.name} ({base.spec.quantization}, {base.spec.dtype})",
        "parameters": f"{form.num_parameters:,}",
        "device memory": decimal(num_bytes),
        "layer map": _layers(form.facts.layer_map),
        "invocation tokens": invocation or "none: acts everywhere",
        **_text_facts(side),
        **{f"note {n}": note for n, note in enumerate((*form.facts.notes, *text_notes), start=1)},
    }
    table = Table("fact", "value")
    for fact, value in facts.items():
        table.add_row(fact, value)
    return table


def own_text(form: ServingForm, base: Base) -> tuple[TextSide | None, tuple[str, ...]]:
    """The adapter's own text side, None for the base's, and notes. Raises AdapterRefused."""
    from lora_runtime.text.text_workers import TextWorkers

    if not form.text_files:
        return None, ()
    workers = TextWorkers(base.folder, base.spec.vocab_size)
    try:
        return asyncio.run(workers.read(form.text_files))
    finally:
        workers.close()


def _text_facts(side: TextSide | None) -> dict[str, str]:
    base, own = "the base's", "its own"
    if side is None:
        return {"chat template": base, "tokens": base, "end tokens": base}
    length = len(side.template or "")
    return {
        "chat template": f"{own}, {length} characters" if side.is_own_template else base,
        "tokens": base if side.tokenizer is None else own,
        "end tokens": ", ".join(map(str, side.eos_token_ids)) or "none",
    }


def _layers(layer_map: tuple[int, ...] | None) -> str:
    if layer_map is None:
        return "the base's"
    return f"{len(layer_map)} layers: {', '.join(map(str, layer_map))}"


def _parity_line(parity: Parity | None) -> str:
    if parity is None:
        return "parity: no parity record"
    return (
        f"parity: error {parity.error:.2g} of an effect of {parity.effect_rms:.3g} logits, "
        f"limit {parity.limit:.2g}: passed"
    )


def _loss_line(merging: Merge) -> str:
    worst = merging.worst
    return (
        f"lost to rounding: {merging.overall:.2g} of the adapter's change (‖error‖ / ‖ΔW‖); "
        f"at worst {worst.ratio:.2g}, {worst.name}"
    )
