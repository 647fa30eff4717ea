"""Frozen settings of a training run: one base, N units (adapters), from a YAML file or from code.

Values that do not depend on the base or the data are checked here, once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError
from lora_runtime.training.fields import convert, convert_fields, parse_yaml

Variant = Literal["lora", "rslora", "dora", "pissa", "olora", "loftq", "qera"]
INITS = r"default|pissa(_niter_\d{1,3})?|olora|loftq|qera"
INIT_RULE = "default, pissa, pissa_niter_ and a number, olora, loftq or qera"
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"]
"""Names of transformers' `get_scheduler` that need no further options."""

OptimizerName = Literal["adamw", "adamw-8bit", "adamw-paged", "adamw-paged-8bit"]
Truncation = Literal["end", "start", "error", "drop"]
InstructionStyle = Literal["chat", "alpaca"]
Column = Literal[
    "messages", "conversations", "prompt", "completion", "instruction", "input",
    "output", "system", "history", "text", "chosen", "rejected",
]  # fmt: skip
"""Keys that the formats of training data have."""

SweepValue = bool | int | str | float

MAX_EXAMPLES_PER_STEP = 1 << 20
"""An update holds the list of its examples."""
SEEDS = range(-(1 << 63), 1 << 64)
SEED_RULE = "a whole number of at most 64 bits, as torch takes it"

RESERVED_NAMES = ("checkpoints", "report")
"""Folders of a run that are not adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitConfig:
    """One adapter to train. Raises ConfigError naming the field."""

    name: str
    """Folder of the adapter below the run's output."""
    data: Path
    """JSONL, JSON (a list or one object), CSV, TSV or Parquet; the keys of its rows say which
    format it is: see `training/data/formats.py`. Preferences (`prompt`, `chosen`, `rejected`) are
    learned as `training/preferences.py` says."""
    columns: dict[str, str] = field(default_factory=dict)
    """Key of a format → the file's own name for it; all other columns are then left out and shown
    as not used."""
    instructions: InstructionStyle = "chat"
    """How `instruction` data is asked: as a message of the user by the base's chat template, or
    by the prompt of Stanford Alpaca."""
    truncation: Truncation = "end"
    """What examples over `max_seq_len` lose, or that they are an `error`, or that `drop` leaves
    them out and counts them."""
    eval_data: Path | None = None
    """Held-out examples in the same format; never trained on."""
    eval_fraction: float = 0.0
    """Share of `data` that is held out, chosen by the hash of each row's content."""
    variant: Variant = "lora"
    """`lora` scales by alpha / rank, `rslora` by alpha / sqrt(rank); `dora` is `use_dora`, the
    others are inits. They combine: `rslora` with `use_dora` and an `init`."""
    use_dora: bool = False
    """Also train the length of every row of W + ΔW."""
    init: str = "default"
    """Where training starts: `default` at no change, `pissa` (or faster and about the same,
    `pissa_niter_N`) and `olora` at factors of the weight, `loftq` at what quantisation lost,
    `qera` at the part of it that matters most for the inputs that the unit's own data make."""
    rank: int = 16
    alpha: float = 32.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names or ends of module paths, `embed_tokens` and `lm_head` among them, or every
    inner linear layer."""
    modules_to_save: tuple[str, ...] = ()
    """Trained as whole weights of their own: `embed_tokens`, `lm_head`."""
    trainable_token_indices: tuple[int, ...] = ()
    """Token ids whose rows of the embedding are trained, and with tied weights those of the output
    layer with them."""
    ensure_weight_tying: bool = False
    """With tied weights: what is trained of the embedding or the output layer is one for both."""
    layers_to_transform: tuple[int, ...] = ()
    """Layers that `target_modules` is limited to; empty: all."""
    layer_replication: tuple[tuple[int, ...], ...] = ()
    """Ranges [start, end) of base layers, run one after the other, each visit with an adapter of
    its own; empty: each layer once."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Regular expression of the end of a module's path → its own rank; the first match decides."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """The same for alpha."""
    dpo_beta: float = 0.1
    """Preferences: how dear it is to move away from the base."""
    label_smoothing: float = 0.0
    """Preferences: the share of pairs that is taken to be the wrong way round."""
    dpo_sft_weight: float = 0.0
    """Preferences: how much the chosen answer's own loss per token counts beside."""
    learning_rate: float = 2e-4
    loraplus_ratio: float = 1.0
    """LoRA+: B's learning rate is this many times `learning_rate`."""
    schedule: Schedule = "cosine"
    warmup: float = 0.03
    """Below 1 a share of all updates, from 1 a number of updates."""
    num_epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Number of updates; overrides `num_epochs`."""
    micro_batch_size: int = 4
    """Examples in one forward; of preferences, pairs."""
    max_tokens_per_batch: int | None = None
    """Forms the forwards by tokens instead: as many of the update's examples as fit, end to end.
    An update still takes `micro_batch_size` · `gradient_accumulation` examples. A GPU, which
    dequantises every layer once a forward, is best used by 8,192 or more."""
    gradient_accumulation: int = 1
    """Forwards in one update."""
    optimizer: OptimizerName = "adamw"
    """`8bit` keeps Adam's moments of tensors from 4,096 elements on in 8 bits, `paged` in memory
    that CUDA moves to the host when it must."""
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    """Gradients longer than this are scaled down to it; None leaves them."""
    seed: int | None = None
    """Order of the data and start of the weights; None takes the run's seed."""
    eval_interval: int = 50
    """Updates between two evaluations on held-out data; there is one after the last update too."""
    patience: int | None = None
    """Evaluations without a lower loss after which the unit stops; None never stops it."""
    export: Literal["best", "last"] = "best"
    """Weights of the lowest held-out loss, where there is one, or of the last update."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of A and B in the adapter's file; they are trained in float32, and all else stays so."""
    sweep: dict[str, tuple[SweepValue, ...]] = field(default_factory=dict)
    """Other fields and the values to try: see `training/sweep.py`."""
    dropout: float = 0.0
    """Must be 0: an adapter is trained as it is served."""

    def __post_init__(self) -> None:
        checks: list[tuple[str, bool, str]] = [
            ("name", _is_folder_name(self.name), f"letters, digits, . _ -, not {RESERVED_NAMES}"),
            ("init", re.fullmatch(INITS, self.init) is not None, INIT_RULE),
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", 0 < self.alpha < math.inf, "positive"),
            ("target_modules", len(self.target_modules) > 0, "'all-linear' or at least one name"),
            ("dpo_beta", 0 < self.dpo_beta < math.inf, "positive"),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "0 or more and below 0.5"),
            ("dpo_sft_weight", 0 <= self.dpo_sft_weight < math.inf, "0 or positive"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive"),
            ("loraplus_ratio", 0 < self.loraplus_ratio < math.inf, "positive"),
            ("warmup", 0 <= self.warmup < math.inf, "0 or positive"),
            ("num_epochs", self.num_epochs >= 1, "at least 1"),
            ("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1"),
            ("micro_batch_size", self.micro_batch_size >= 1, "at least 1"),
            (
                "columns",
                set(self.columns) <= set(get_args(Column)),
                f"of {', '.join(get_args(Column))}",
            ),
            ("eval_fraction", 0 <= self.eval_fraction < 1, "0 or more and below 1"),
            ("eval_fraction", not (self.eval_fraction and self.eval_data), "0 beside eval_data"),
            ("gradient_accumulation", self.gradient_accumulation >= 1, "at least 1"),
            (
                "gradient_accumulation",
                self.examples_per_step <= MAX_EXAMPLES_PER_STEP,
                f"so that an update takes at most {MAX_EXAMPLES_PER_STEP:,} examples, "
                "micro_batch_size · gradient_accumulation",
            ),
            ("seed", self.seed is None or self.seed in SEEDS, SEED_RULE),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or positive"),
            ("max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "above 0"),
            ("eval_interval", self.eval_interval >= 1, "at least 1"),
            ("patience", self.patience is None or self.patience >= 1, "at least 1"),
            ("dropout", self.dropout == 0, "0; adapters are trained as they are served"),
        ]
        rule = f"'default' or {self.start!r} with the variant {self.variant!r}"
        checks.append(("init", self.init in ("default", self.start), rule))
        _check(self, checks, f"unit {self.name!r}: ")

    @property
    def start(self) -> str:
        """The init that is used: the variant's own, if it is one."""
        return self.variant if re.fullmatch(INITS, self.variant) else self.init

    @property
    def has_gain(self) -> bool:
        """True when DoRA's magnitudes are trained."""
        return self.use_dora or self.variant == "dora"

    @property
    def has_root_scaling(self) -> bool:
        """True when the scaling is alpha / sqrt(rank)."""
        return self.variant == "rslora"

    @property
    def scaling(self) -> float:
        """s in ΔW = s·BA, where no pattern says otherwise."""
        return self.alpha / (math.sqrt(self.rank) if self.has_root_scaling else self.rank)

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
        """Updates before the learning rate is at its peak; the first has a part of it already."""
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
    """Longer examples are cut as the unit's `truncation` says, counted and reported."""
    log_interval: int = 10
    """Updates of a unit between two progress lines, where there is no terminal."""
    checkpoint_interval: int = 200
    """Forwards between two checkpoints."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and compute the layer again for its gradient: less memory, the
    same gradients, about a third more time."""
    tensorboard: bool = False
    """Also write curves for TensorBoard; needs the extra `tensorboard`."""
    resume: bool = False
    """Continue from the newest checkpoint in `output`, which must be of the same run."""

    def __post_init__(self) -> None:
        names = [unit.name for unit in self.units]
        checks: list[tuple[str, bool, str]] = [
            ("units", len(names) > 0, "at least one unit"),
            ("units", len(set(names)) == len(names), "units of different names"),
            ("seed", self.seed in SEEDS, SEED_RULE),
            ("max_seq_len", self.max_seq_len >= 2, "at least 2"),
            ("max_seq_len", self._fits_batches(), "at most the units' max_tokens_per_batch"),
            ("log_interval", self.log_interval >= 1, "at least 1"),
            ("checkpoint_interval", self.checkpoint_interval >= 1, "at least 1"),
        ]
        _check(self, checks)

    @classmethod
    def from_yaml(cls, path: Path) -> TrainConfig:
        """Read a run from a file whose keys are the fields of TrainConfig and UnitConfig.

        Relative paths are relative to the working directory. The base may be written as for the
        server: `base` a name, its other settings beside it. Raises ConfigError naming the key
        and, for an unknown one, the nearest valid one.
        """
        try:
            content = parse_yaml(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
        return convert(_with_base(content), cls, "")

    @staticmethod
    def unit_fields(text: str) -> dict[str, Any]:
        """Fields of a unit from a line like `name: a, data: a.jsonl, rank: 8`, which is a YAML
        mapping without its braces. Raises ConfigError as `from_yaml`.
        """
        try:
            content = parse_yaml(f"{{{text}}}")
        except ValueError as error:
            raise ConfigError(
                f"unit {text!r} cannot be read as YAML, as in name: a, rank: 8: {error}",
                field="unit",
            ) from error
        return convert_fields(content, UnitConfig, "unit")

    def _fits_batches(self) -> bool:
        budgets = [unit.max_tokens_per_batch or self.max_seq_len for unit in self.units]
        return all(budget >= self.max_seq_len for budget in budgets)

    def seed_of(self, unit: UnitConfig) -> int:
        """The seed a unit uses."""
        return self.seed if unit.seed is None else unit.seed


def _with_base(content: object) -> object:
    """A file's settings with those of the base below `base`."""
    if not isinstance(content, dict):
        return content
    names = [entry.name for entry in fields(BaseConfig)]
    beside = {name: content[name] for name in names if name in content}
    base = content.get("base", {})
    base = {"model": base} if isinstance(base, str) else base
    if not beside or not isinstance(base, dict):
        return {**content, "base": base} if "base" in content else content
    if twice := beside.keys() & base.keys():
        raise ConfigError(
            f"{min(twice)} stands in the file and below base too; remove one", field=min(twice)
        )
    rest = {name: value for name, value in content.items() if name not in beside}
    return {**rest, "base": {**base, **beside}}


def _is_folder_name(name: str) -> bool:
    is_plain = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._=-]*", name) is not None
    return is_plain and name not in RESERVED_NAMES


def _check(config: object, checks: list[tuple[str, bool, str]], where: str = "") -> None:
    for name, is_valid, rule in checks:
        if not is_valid:
            value = getattr(config, name)
            raise ConfigError(f"{where}{name} is {value!r}; it must be {rule}", field=name)
