"""`loramux merge`: base and adapter as one plain transformers checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_runtime.errors import ConfigError
from lora_runtime.terminal import Terminal
from server.cli_adapters import Folder, load_on_base, own_text
from server.cli_settings import BaseName, ConfigFile, Device, Format, engine_settings

if TYPE_CHECKING:
    from lora_runtime.adapters.merge import Merge


def merge(
    path: Folder,
    out: Annotated[Path, typer.Argument(help="A new folder for the checkpoint.")],
    config: ConfigFile = None,
    base: BaseName = None,
    quantization: Format = None,
    device: Device = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the written weights.")
    ] = "float32",
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
    settings = engine_settings(
        config, base=base, quantization=quantization, dtype="float32", device=device
    )
    load = load_on_base(path, settings)
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


def _loss_line(merging: Merge) -> str:
    worst = merging.worst
    return (
        f"lost to rounding: {merging.overall:.2g} of the adapter's change (‖error‖ / ‖ΔW‖); "
        f"at worst {worst.ratio:.2g}, {worst.name}"
    )
