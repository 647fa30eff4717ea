"""How settings are declared and read: one field with a docstring is YAML key, variable and flag.

A class under `@settings` is a frozen dataclass whose values pydantic checks when it is made. A
field that holds another such class is a part: its fields are read beside the others too, by keys of
their own, so `base: PATH` and `base: {model: PATH}` say the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform, get_type_hints

import pydantic.dataclasses
import yaml
from pydantic import BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from lora_runtime.errors import ConfigError, nearest, written
from lora_runtime.plain_file import read_plain_file

T = TypeVar("T")

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
_BYTES: TypeAdapter[int] = TypeAdapter(ByteSize)
_SIZE = re.compile(r"\s*(\d+\s*B?|(\d+|\d*\.\d+)\s*[KMGTPE](i?B)?)\s*", re.ASCII | re.IGNORECASE)


def _no_truth(value: object) -> object:
    """Python counts True as 1; who writes it for a number means something else."""
    if isinstance(value, bool):
        raise ValueError("a whole number")
    return value


def _no_truth_for_float(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        return _no_truth(value)
    if _SIZE.fullmatch(value) is None:  # pydantic reads the beginning: of 1,5GiB a byte
        raise ValueError("a number of bytes, such as 1GiB, 512MiB, 2GB or 1073741824")
    return int(_BYTES.validate_python(value))


def path_text(value: object) -> object:
    """An empty text would be the working directory."""
    if value == "":
        raise ValueError("a path")
    return value


Int = Annotated[int, BeforeValidator(_no_truth)]
Float = Annotated[float, BeforeValidator(_no_truth_for_float)]
"""Text such as 1e-4 counts as a number, which YAML 1.1 does not read as one."""
Bytes = Annotated[int, BeforeValidator(_bytes)]
FilePath = Annotated[Path, BeforeValidator(path_text)]


def setting(
    *,
    default: Any = ...,
    default_factory: Callable[[], Any] | None = None,
    group: str = "",
    key: str | None = None,
    also: tuple[str, ...] = (),
    meanings: Mapping[str, Any] | None = None,
    metavar: str | None = None,
    is_fixed: bool = False,
    **bounds: Any,
) -> Any:
    """A field of a class of settings; `bounds` are pydantic's `gt`, `ge`, `lt` and `le`.

    `group` is the heading in a command's help, and what the code sorts fields by. `key` is the
    field's name in files, variables and flags where it is not its own; `also` are other names that
    are taken there, and `meanings` has the type of a
    value under those of them that mean less than the field does. `is_fixed`: no sweep varies it.
    """
    facts = {"group": group, "key": key, "also": also, "meanings": meanings or {}}
    about: Any = {**facts, "metavar": metavar, "is_fixed": is_fixed}
    if default_factory is not None:
        return Field(default_factory=default_factory, json_schema_extra=about, **bounds)
    return Field(default=default, json_schema_extra=about, **bounds)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting, field))
def settings(cls: type[T]) -> type[T]:
    """Make a class of settings. A value that cannot be used raises ConfigError naming its field."""
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls)
    check = made.__init__

    def __init__(self: Any, **values: Any) -> None:
        try:
            check(self, **values)
        except ValidationError as error:
            raise explained(error, made) from None

    made.__init__ = __init__
    return made  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One setting as files, variables and flags see it."""

    key: str
    name: str
    """Name of the field."""
    part: str | None
    """The field of the class that holds this field's part; None for a field of the class itself."""
    hint: Any
    """Type of the field."""
    default: Any
    """Default of the field; ... if it has none."""
    help: str
    group: str
    also: tuple[str, ...]
    meanings: Mapping[str, Any]
    metavar: str | None
    is_fixed: bool
    most: float | None
    """The largest value of a number; None for what is none."""


def entries(kind: Any) -> dict[str, Entry]:
    """Key → setting, of a class of settings and of its parts."""
    return {entry.key: entry for entry in _entries(kind)}


def in_group(kind: Any, *groups: str) -> tuple[str, ...]:
    """Names of the fields of some groups."""
    return tuple(e.name for e in entries(kind).values() if e.part is None and e.group in groups)


def _entries(kind: Any, part: str | None = None) -> Iterator[Entry]:
    hints = get_type_hints(kind, include_extras=True)
    for name, info in kind.__pydantic_fields__.items():
        if part is None and is_dataclass(hints[name]):
            yield from _entries(hints[name], name)
            continue
        about = info.json_schema_extra or {}
        key = about.get("key") or name
        default = info.default if info.default_factory is None else info.default_factory()
        yield Entry(
            key=key,
            name=name,
            part=part,
            hint=hints[name],
            default=... if info.is_required() else default,
            help=_docstring(kind, name),
            group=about.get("group", ""),
            also=about.get("also", ()),
            meanings=about.get("meanings", {}),
            metavar=about.get("metavar"),
            is_fixed=about.get("is_fixed", False),
            most=next((b.le for b in info.metadata if hasattr(b, "le")), None),
        )


def _docstring(kind: Any, name: str) -> str:
    """pydantic reads the docstrings of the fields that stand in a class itself."""
    owners = (c for c in kind.__mro__ if name in getattr(c, "__pydantic_fields__", {}))
    texts = (owner.__pydantic_fields__[name].description for owner in owners)
    return " ".join(next(filter(None, texts), "").split())


def canonical_names(found: Mapping[str, Entry]) -> dict[str, str]:
    """Every name a setting may be called by → its key."""
    return {name: e.key for e in found.values() for name in (e.key, *e.also)}


def by_key(values: Mapping[str, Any], found: Mapping[str, Entry]) -> dict[str, Any]:
    """Values by any of their names → by key. Raises ConfigError for two names of one setting."""
    names, result, said = canonical_names(found), dict[str, Any](), dict[str, str]()
    for name, value in values.items():
        _say(said, names[name], name)
        check_meaning(found[names[name]], name, value, name)
        result[names[name]] = value
    return result


def check_meaning(entry: Entry, name: str, value: object, shown: str) -> None:
    """Raise ConfigError for a value that another library's name of a setting does not have there.
    `shown` names it in the message.
    """
    if name in entry.meanings:
        converted(value, replace(entry, hint=entry.meanings[name]), shown)


def _say(said: dict[str, str], key: str, name: str, where: str = "") -> None:
    first = said.setdefault(key, name)
    if first != name:
        raise ConfigError(
            f"{where}{name} and {where}{first} are the same setting; remove one", field=name
        )


def nested(
    values: Mapping[str, Any], kind: Any, where: str = "", source: str = ""
) -> dict[str, Any]:
    """Values by the names of a file as fields of `kind`, those of a part below its field.

    Raises ConfigError for a name that is none, with the nearest that is, and for two names of one
    setting. `where` goes before names in messages, `source` says where they stand.
    """
    found, parts = entries(kind), _parts(kind)
    names, made, said = canonical_names(found), dict[str, Any](), dict[str, str]()

    def put(name: str, value: Any, entry: Entry) -> None:
        _say(said, entry.key, name, where)
        check_meaning(entry, name, value, f"{where}{name}")
        target = made if entry.part is None else made.setdefault(entry.part, {})
        target[entry.name] = value

    for name, value in values.items():
        if name in parts and isinstance(value, Mapping):
            inside = {e.name: e for e in found.values() if e.part == name}
            aliases = {alias: e for e in inside.values() for alias in (e.key, *e.also)} | inside
            _check_names(value, aliases, f"{where}{name}.", source)
            for own, each in value.items():
                put(f"{name}.{own}", each, aliases[own])
        elif name in names:
            put(name, value, found[names[name]])
        else:
            _check_names([name], {*names, *parts}, where, source)
            raise ConfigError(
                f"{where}{name}{source} is {written(value)}; it must be a mapping of fields",
                field=f"{where}{name}",
            )
    return made


def _parts(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {name: hint for name, hint in hints.items() if is_dataclass(hint)}


def _check_names(given: Collection[Any], valid: Collection[str], where: str, source: str) -> None:
    for name in given:
        if name not in valid:
            raise ConfigError(
                f"{where}{name}{source} is not a setting; {nearest(str(name), valid)}",
                field=f"{where}{name}",
            )


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later values over earlier ones, part by part."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if isinstance(value, Mapping) and isinstance(result.get(name), Mapping):
                value = {**result[name], **value}
            result[name] = value
    return result


def checked(values: Mapping[str, Any], kind: type[T], origin: Callable[[str], str] = str) -> T:
    """An instance of `kind` from nested values. Raises ConfigError.

    `origin` writes a key as the message shall show it.
    """
    validator: Any = kind.__pydantic_validator__  # type: ignore[attr-defined]
    try:
        return validator.validate_python(dict(values))  # type: ignore[no-any-return]
    except ValidationError as error:
        raise explained(error, kind, origin) from None


def converted(value: object, entry: Entry, name: str) -> Any:
    """One value as a setting's type, without its bounds. Raises ConfigError with `name`."""
    try:
        return TypeAdapter(entry.hint).validate_python(value)
    except ValidationError as error:
        rule = " or ".join(dict.fromkeys(map(_rule, error.errors(include_url=False))))
        message = f"{name} is {written(value)}; it must be {rule}"
        raise ConfigError(message, field=name) from None


_RULES = {
    "int_type": "a whole number", "int_parsing": "a whole number",
    "int_from_float": "a whole number", "float_type": "a number", "float_parsing": "a number",
    "finite_number": "a number", "string_type": "text", "bool_type": "true or false",
    "bool_parsing": "true or false", "path_type": "a path", "none_required": "null",
    "tuple_type": "a list", "dict_type": "a mapping", "dataclass_type": "a mapping of fields",
    "path_not_directory": "a folder that exists", "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}", "less_than": "below {lt}",
    "less_than_equal": "at most {le}", "literal_error": "one of {expected}",
    "enum": "{expected}",
    "too_short": "a list of at least {min_length}", "string_too_short": "text, not empty",
    "value_error": "{error}",
}  # fmt: skip
"""pydantic's type of an error → what a value must be."""


def explained(error: ValidationError, kind: Any, origin: Callable[[str], str] = str) -> ConfigError:
    """pydantic's first error as a sentence that names field, value and what to change."""
    found = error.errors(include_url=False)
    first = found[0]
    name = _path(first["loc"], kind)
    field_name = re.sub(r"\[\d+\]$", "", name) or None  # of a list the setting, not the member
    if first["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return ConfigError(f"{name} is missing", field=field_name)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        own, fields = str(first["loc"][-1]), entries(kind).values()
        others = {alias: each.name for each in fields for alias in each.also}
        advice = nearest(others.get(own, own), [each.name for each in fields])
        return ConfigError(f"{name} is not a setting; {advice}", field=field_name)
    same = [e for e in found if _path(e["loc"], kind) == name]
    rule = " or ".join(dict.fromkeys(map(_rule, same)))
    shown = name if origin is str else origin(name)
    value = written(first["input"])
    return ConfigError(f"{shown or 'the file'} is {value}; it must be {rule}", field=field_name)


def _rule(error: Any) -> str:
    facts = error.get("ctx", {})
    if error["type"] == "greater_than" and facts["gt"] == 0:
        return "positive"
    return str(_RULES.get(error["type"], error["msg"])).format(**facts)


def _path(place: tuple[int | str, ...], kind: Any) -> str:
    """`units[0].rank`: a place in the settings; a part's field by its key. What pydantic adds for
    the members of a union is left out.
    """
    keys = {(e.part, e.name): e.key for e in _entries(kind) if e.part is not None}
    if len(place) > 1 and place[:2] in keys:
        place = (keys[place[:2]], *place[2:])  # type: ignore[index]
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"[\w./*+^$-]+", step) and step not in ("int", "str", "float", "bool"):
            text += f".{step}" if text else step
    return text


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML lets the last of two equal keys win, as no reader of the file would expect."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping. Raises ConstructorError naming a key that stands twice."""
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice; remove one", key.start_mark
                )
            seen.add(str(key.value))
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def parse_yaml(text: str) -> object:
    """The value of a YAML text in which no key stands twice. Raises ValueError."""
    try:
        return yaml.load(text, _UniqueKeys)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def read_yaml(file: Path) -> dict[str, Any]:
    """The `key: value` lines of a YAML file; none of an empty one. Raises ConfigError."""
    try:
        content = parse_yaml(read_plain_file(file).decode())
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file} cannot be read as YAML: {problem}", field="config") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"the file is {content!r:.200}; it must be a mapping: {file} must hold `key: value` "
            "lines",
            field="config",
        )
    return content
