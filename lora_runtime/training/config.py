"""Frozen settings of a training run: one base, N units (adapters), from a YAML file or from code.

Values that do not depend on the base or the data are checked here, once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError

Variant = Literal["lora", "rslora"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"]
"""Names of transformers' `get_scheduler` that need no further options."""

RESERVED_NAMES = ("checkpoints", "report")
"""Folders of a run that are not adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitConfig:
    """One adapter to train. Raises ConfigError naming the field."""

    name: str
    """Folder of the adapter below the run's output."""
    data: Path
    """JSONL of chat `messages` or of `prompt` and `completion`."""
    variant: Variant = "lora"
    """`lora` scales by alpha / rank, `rslora` by alpha / sqrt(rank)."""
    rank: int = 16
    alpha: float = 32.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names or ends of module paths, or every inner linear layer."""
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.03
    """Below 1 a share of all updates, from 1 a number of updates."""
    num_epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Number of updates; overrides `num_epochs`."""
    micro_batch_size: int = 4
    """Examples in one forward."""
    gradient_accumulation: int = 1
    """Forwards in one update."""
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    """Gradients longer than this are scaled down to it; None leaves them."""
    seed: int | None = None
    """Order of the data and start of the weights; None takes the run's seed."""
    dropout: float = 0.0
    """Must be 0: an adapter is trained as it is served."""

    def __post_init__(self) -> None:
        checks: list[tuple[str, bool, str]] = [
            ("name", _is_folder_name(self.name), f"letters, digits, . _ -, not {RESERVED_NAMES}"),
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", 0 < self.alpha < math.inf, "positive"),
            ("target_modules", len(self.target_modules) > 0, "'all-linear' or at least one name"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive"),
            ("warmup", 0 <= self.warmup < math.inf, "0 or positive"),
            ("num_epochs", self.num_epochs >= 1, "at least 1"),
            ("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1"),
            ("micro_batch_size", self.micro_batch_size >= 1, "at least 1"),
            ("gradient_accumulation", self.gradient_accumulation >= 1, "at least 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or positive"),
            ("max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "above 0"),
            ("dropout", self.dropout == 0, "0; adapters are trained as they are served"),
        ]
        _check(self, checks, f"unit {self.name!r}: ")

    @property
    def scaling(self) -> float:
        """s in ΔW = s·BA."""
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)

    @property
    def examples_per_step(self) -> int:
        """Examples in one update."""
        return self.micro_batch_size * self.gradient_accumulation

    def num_steps(self, num_examples: int) -> int:
        """Updates of the whole run; the last one of `num_epochs` takes what is left."""
        if self.max_steps is not None:
            return self.max_steps
        return math.ceil(num_examples * self.num_epochs / self.examples_per_step)

    def num_warmup_steps(self, num_steps: int) -> int:
        """Updates over which the learning rate rises from 0."""
        return math.ceil(self.warmup * num_steps if self.warmup < 1 else self.warmup)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run: every unit is trained at the same time on one base. Raises ConfigError."""

    output: Path
    """Gets a folder per unit, `checkpoints` and `report`."""
    units: tuple[UnitConfig, ...]
    base: BaseConfig = field(default_factory=BaseConfig)
    seed: int = 0
    max_seq_len: int = 1024
    """Longer examples are cut at the end, counted and reported."""
    log_interval: int = 10
    """Updates of a unit between two progress lines, where there is no terminal."""
    checkpoint_interval: int = 200
    """Forwards between two checkpoints."""
    resume: bool = False
    """Continue from the newest checkpoint in `output`, which must be of the same run."""

    def __post_init__(self) -> None:
        names = [unit.name for unit in self.units]
        checks: list[tuple[str, bool, str]] = [
            ("units", len(names) > 0, "at least one unit"),
            ("units", len(set(names)) == len(names), "units of different names"),
            ("max_seq_len", self.max_seq_len >= 2, "at least 2"),
            ("log_interval", self.log_interval >= 1, "at least 1"),
            ("checkpoint_interval", self.checkpoint_interval >= 1, "at least 1"),
        ]
        _check(self, checks)

    @classmethod
    def from_yaml(cls, path: Path) -> TrainConfig:
        """Read a run from a file whose keys are the fields of TrainConfig and UnitConfig.

        Relative paths are relative to the working directory. Raises ConfigError naming the key
        and, for an unknown one, the nearest valid one.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
        return _convert(content, cls, "")

    def seed_of(self, unit: UnitConfig) -> int:
        """The seed a unit uses."""
        return self.seed if unit.seed is None else unit.seed


def nearest(name: str, valid: Sequence[str]) -> str:
    """A sentence that proposes the most similar valid name, or lists them all."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(sorted(valid))}"


def _is_folder_name(name: str) -> bool:
    is_plain = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) is not None
    return is_plain and name not in RESERVED_NAMES


def _check(config: object, checks: list[tuple[str, bool, str]], where: str = "") -> None:
    for name, is_valid, rule in checks:
        if not is_valid:
            value = getattr(config, name)
            raise ConfigError(f"{where}{name} is {value!r}; it must be {rule}", field=name)


def _convert(value: object, hint: Any, name: str) -> Any:
    """`value` of a YAML file as the type `hint`, or a ConfigError naming the dotted key `name`."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        if is_dataclass(kind) and isinstance(value, dict):
            return _build(value, kind, name)
        if get_origin(kind) is tuple and isinstance(value, list):
            item_kind = get_args(kind)[0]
            return tuple(_convert(v, item_kind, f"{name}[{i}]") for i, v in enumerate(value))
        if get_origin(kind) is Literal and value in get_args(kind):
            return value
        if kind in (int, str, bool) and type(value) is kind:
            return value
        if kind is NoneType and value is None:
            return None
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and _is_number(value):
            return float(value)  # type: ignore[arg-type]
    rule = " or ".join(_describe(kind) for kind in kinds)
    raise ConfigError(f"{name or 'the file'} is {value!r}; it must be {rule}", field=name or None)


def _build(values: dict[Any, object], kind: Any, name: str) -> Any:
    hints = get_type_hints(kind)
    prefix = f"{name}." if name else ""
    for key in values:
        if key not in hints:
            advice = nearest(str(key), list(hints))
            raise ConfigError(f"{prefix}{key} is not a field; {advice}", field=f"{prefix}{key}")
    for entry in fields(kind):
        if entry.name not in values and entry.default is entry.default_factory is MISSING:
            raise ConfigError(f"{prefix}{entry.name} is missing", field=f"{prefix}{entry.name}")
    return kind(**{key: _convert(v, hints[key], f"{prefix}{key}") for key, v in values.items()})


def _is_number(value: object) -> bool:
    """True for numbers and for text like 1e-4, which YAML 1.1 does not read as a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    names |= {Path: "a path", NoneType: "null"}
    return names.get(kind, "a mapping of fields")
