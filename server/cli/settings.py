"""Settings as flags: made from the fields, their types and docstrings, for every command alike."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ByteSize

from lora_runtime.errors import ConfigError
from lora_runtime.settings import Bytes, Entry, FilePath, canonical_names, entries, parse_yaml
from lora_runtime.training.config import TrainConfig, UnitConfig
from loramux.server.config import PREFIX, SETTINGS


def flag_of(name: str) -> str:
    """The flag that a setting's name stands for: `learning_rate` → `--learning-rate`."""
    return f"--{name.replace('_', '-')}"


RUN_SETTINGS = entries(TrainConfig)
TRAIN_SETTINGS = {k: v for k, v in {**entries(UnitConfig), **RUN_SETTINGS}.items() if k != "units"}
"""Key → setting of a run and of its adapters; a seed given beside a file is the run's."""
VARIABLES = {name.upper() for name in canonical_names(TRAIN_SETTINGS)}
"""Names of the environment's variables that stand for flags of `train`, without LORAMUX_."""
OTHER_FLAGS = {
    flag_of(name): flag_of(key)
    for found in (SETTINGS, TRAIN_SETTINGS)
    for name, key in canonical_names(found).items()
}
"""Every name of a flag → the flag, so that --lr is --learning-rate."""

NAMED_FLAGS = {
    flag_of(name): (name, entry)
    for entry in (*SETTINGS.values(), *TRAIN_SETTINGS.values())
    for name in entry.meanings
}
"""Flags by another library's name that mean less than the setting does."""

ConfigFile = Annotated[
    Path | None, typer.Option(envvar=f"{PREFIX}CONFIG", help="YAML file of settings.")
]


def with_flags(settings: Iterable[Entry]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with a flag for each setting, handed to its parameter `flags`; None: not given.

    typer reads a command's flags from its signature, so they are written into that.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        made = [
            inspect.Parameter(
                entry.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(entry)
            )
            for entry in settings
        ]
        signature = inspect.Signature([*own, *made])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return command

    return decorate


BASE_FLAGS = [SETTINGS[key] for key in ("base", "quantization", "device", "dtype")]


def _flag(entry: Entry) -> Any:
    name = flag_of(entry.key)
    kind = _kind(entry)
    names = f"{name}/--no{name[1:]}" if kind is bool and entry.default else name
    metavar = "SIZE" if _is(entry, Bytes) else "PATH" if _is_path(entry) else entry.metavar
    if metavar is None and _is_list(entry):
        metavar = "A,B,…"
    about = typer.Option(
        names, help=_help(entry), rich_help_panel=entry.group, metavar=metavar, show_default=False
    )
    return Annotated[kind | None, about]


def _kind(entry: Entry) -> Any:
    """The type in which typer takes a flag; what is no plain value comes as text."""
    if _is_mapping(entry) or entry.key == "adapter_roots":
        return list[str]
    hint = _members(entry.hint)[0]
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if _is(entry, Bytes) or _is_list(entry):
        return str
    return hint if hint in (int, float, bool) or get_origin(hint) is Literal else str


def _members(hint: Any) -> list[Any]:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [member for member in members if member is not NoneType]


def _is(entry: Entry, hint: Any) -> bool:
    return hint in _members(entry.hint)


def _plain(hint: Any) -> Any:
    return get_origin(get_args(hint)[0] if get_origin(hint) is Annotated else hint)


def _is_path(entry: Entry) -> bool:
    """A path is read as text: typer would make the working directory of an empty one."""
    return _is(entry, FilePath)


def _is_mapping(entry: Entry) -> bool:
    return any(_plain(member) is dict for member in _members(entry.hint))


def _is_list(entry: Entry) -> bool:
    return any(_plain(member) is tuple for member in _members(entry.hint))


def _help(entry: Entry) -> str:
    default = entry.default
    if default is None or default is ... or default == {}:
        return entry.help
    if default == ():
        text = "none"
    elif _is(entry, Bytes):
        text = ByteSize(default).human_readable(separator="")
    else:
        text = str(default) if not isinstance(default, bool) else "on" if default else "off"
    return f"{entry.help} Default: {text}."


def read_texts(values: Mapping[str, Any], found: Mapping[str, Entry]) -> dict[str, Any]:
    """What flags and variables say, by key: `q_proj,v_proj` as a list, `KEY=VALUE` as a mapping."""
    names, result = canonical_names(found), dict[str, Any]()
    for name, value in values.items():
        entry = found[names[name]]
        if value is None:
            continue
        if _is_mapping(entry):
            value = _mapping(entry, value.split() if isinstance(value, str) else value)
        elif _is_list(entry) and isinstance(value, str):
            choices = [get_args(m) for m in _members(entry.hint) if get_origin(m) is Literal]
            value = value if value in sum(choices, ()) else _listed(entry, value)
        result[name] = value
    return result


def _listed(entry: Entry, text: str) -> object:
    try:
        return parse_yaml(f"[{text}]")
    except ValueError:
        raise ConfigError(
            f"{entry.key} is {text!r}; it must be values with commas between", field=entry.key
        ) from None


def _mapping(entry: Entry, texts: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        key = key.strip()
        flag = flag_of(entry.key)
        if not separator:
            form = entry.metavar or "KEY=VALUE"
            raise typer.BadParameter(f"{flag} {text} has no value; write {flag} {form}")
        if re.search(r",[^,=]+=", value):
            raise typer.BadParameter(
                f"{flag} {text} has several values; give each by a flag of its own: "
                f"{flag} A=… {flag} B=…"
            )
        if key in found:
            raise typer.BadParameter(f"{flag} gives {key} twice; give it once")
        found[key] = value.split(",") if entry.key == "sweep" else value
    if entry.key == "sweep":
        return {key.replace("-", "_"): [_number(v) for v in found[key]] for key in found}
    return found


def _number(text: str) -> int | float | str:
    """A number if it is one, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()
