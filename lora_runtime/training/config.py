"""Frozen settings of a training run: one base, N units (adapters), from a YAML file or from code.

Values that do not depend on the base or the data are checked here, once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field

from lora_runtime.config import MAX_ALPHA, MAX_DEPTH, MAX_RANK, MAX_TOKENS, BaseConfig
from lora_runtime.errors import ConfigError
from lora_runtime.settings import (
    FilePath,
    Float,
    Int,
    canonical_names,
    checked,
    entries,
    merged,
    nested,
    parse_yaml,
    read_yaml,
    setting,
    settings,
)

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

DEFAULT_WARMUP = 0.03
MAX_EXAMPLES_PER_STEP = 1 << 20
"""An update holds the list of its examples."""
SEEDS = range(-(1 << 63), 1 << 64)
SEED_RULE = "a whole number of at most 64 bits, as torch takes it"

RESERVED_NAMES = ("checkpoints", "report")
"""Folders of a run that are not adapters."""

DATA, ADAPTER, OBJECTIVE = "Data", "Adapter", "Preferences"
UPDATE, RUN = "Optimization", "Run"
"""Groups of settings, and headings of the help."""


def _checked_seed(seed: int) -> int:
    if seed not in SEEDS:
        raise ValueError(SEED_RULE)
    return seed


Seed = Annotated[Int, AfterValidator(_checked_seed)]
MAX_COUNT = 1_000_000_000
"""Updates, evaluations and the like: more than any run does."""
Rank = Annotated[Int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[Float, Field(gt=0, le=MAX_ALPHA)]
Layer = Annotated[Int, Field(ge=0, le=MAX_DEPTH)]
TokenId = Annotated[Int, Field(ge=0, lt=1 << 31)]
Share = Annotated[Float, Field(lt=1)]


@settings
class UnitConfig:
    """One adapter to train. Raises ConfigError naming the field."""

    name: str = setting(group=RUN, is_fixed=True)
    """Name of the adapter, and of its folder below the run's output."""
    data: FilePath = setting(group=DATA, is_fixed=True)
    """JSONL, JSON (a list or one object), CSV, TSV or Parquet. The keys of its rows say which
    format it is: messages; conversations; prompt, completion; instruction, input, output; text; or
    preferences, learned by DPO: prompt, chosen, rejected."""
    columns: dict[str, str] = setting(
        default_factory=dict, group=DATA, also=("column",), metavar="KEY=NAME"
    )
    """Key of a format → the file's own name for it; all other columns are then left out and shown
    as not used."""
    instructions: InstructionStyle = setting(default="chat", group=DATA)
    """How `instruction` data is asked: as a message of the user by the base's chat template, or
    by the prompt of Stanford Alpaca."""
    truncation: Truncation = setting(default="end", group=DATA)
    """How examples over `max_seq_len` are treated: their `end` or `start` is cut off, they are an
    `error`, or `drop` leaves them out and counts them."""
    eval_data: FilePath | None = setting(default=None, group=DATA, is_fixed=True)
    """Held-out examples in the same format; never trained on."""
    eval_fraction: Float = setting(default=0.0, ge=0, lt=1, group=DATA, is_fixed=True)
    """Share of `data` that is held out, chosen by the hash of each row's content."""
    variant: Variant = setting(default="lora", group=ADAPTER)
    """`lora` scales by alpha / rank, `rslora` by alpha / sqrt(rank); `dora` sets `use_dora`, the
    others set `init`. They can be combined: `rslora` with `use_dora` and an `init`."""
    use_dora: bool = setting(default=False, group=ADAPTER)
    """Also train the length of every row of W + ΔW."""
    init: str = setting(default="default", group=ADAPTER)
    """Start of the weights. `default` changes nothing at first; `pissa` (or `pissa_niter_N`:
    faster, about the same) and `olora` start from factors of the weight, `loftq` from what
    quantisation lost, `qera` from the part of that loss that matters most for the inputs of the
    unit's own data."""
    rank: Int = setting(default=16, ge=1, le=MAX_RANK, group=ADAPTER, also=("r",))
    """Rank r of the update BA."""
    alpha: Float = setting(default=32.0, gt=0, le=MAX_ALPHA, group=ADAPTER, also=("lora_alpha",))
    """Scale of the update: ΔW = alpha / rank · BA, or as `variant` says."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = setting(
        default="all-linear", group=ADAPTER, is_fixed=True
    )
    """Module names or ends of module paths, `embed_tokens` and `lm_head` among them, or every
    inner linear layer, but no fused experts and no routers."""
    target_parameters: tuple[str, ...] = setting(default=(), group=ADAPTER, is_fixed=True)
    """Ends of names of parameters, those of a mixture's experts among them:
    `experts.gate_up_proj`, `experts.down_proj`. Each expert has an adapter of the rank of its own.
    Routers are trained only where they are named here or in `target_modules`."""
    modules_to_save: tuple[str, ...] = setting(default=(), group=ADAPTER)
    """Modules whose whole weight is trained: `embed_tokens`, `lm_head`."""
    trainable_token_indices: tuple[TokenId, ...] = setting(default=(), group=ADAPTER)
    """Token ids whose embedding rows are trained; with tied weights the same rows of the output
    layer are trained with them."""
    ensure_weight_tying: bool = setting(default=False, group=ADAPTER)
    """With tied weights: whatever is trained of the embedding or the output layer is shared by
    both."""
    layers_to_transform: tuple[Layer, ...] = setting(default=(), group=ADAPTER)
    """Layers that `target_modules` is limited to; empty: all."""
    layer_replication: tuple[tuple[Layer, ...], ...] = setting(
        default=(), group=ADAPTER, metavar="[START,END],…"
    )
    """Ranges [start, end) of base layers that run one after the other; a layer that runs twice has
    an adapter for each time. Empty: each layer once."""
    rank_pattern: dict[str, Rank] = setting(
        default_factory=dict, group=ADAPTER, metavar="REGEX=RANK"
    )
    """Regular expression of the end of a module's path → its own rank; the first match decides."""
    alpha_pattern: dict[str, Alpha] = setting(
        default_factory=dict, group=ADAPTER, metavar="REGEX=ALPHA"
    )
    """Regular expression of the end of a module's path → its own alpha; the first match decides."""
    dpo_beta: Float = setting(
        default=0.1, gt=0, le=1e6, group=OBJECTIVE, also=("beta",), is_fixed=True
    )
    """Preferences: β of DPO, the strength of the KL penalty that holds the adapter to the base."""
    label_smoothing: Float = setting(default=0.0, ge=0, lt=0.5, group=OBJECTIVE, is_fixed=True)
    """Preferences: label noise rate ε, the share of pairs assumed to be labelled wrongly."""
    dpo_sft_weight: Float = setting(default=0.0, ge=0, le=1e6, group=OBJECTIVE, is_fixed=True)
    """Preferences: weight of the SFT term, the chosen answer's own loss per token."""
    router_aux_loss: Float = setting(default=0.0, ge=0, le=1e6, group=UPDATE)
    """Of a mixture of experts: weight of the auxiliary loss that spreads tokens over its experts.
    Routers themselves are trained only where they are targets."""
    learning_rate: Float = setting(default=2e-4, gt=0, le=1e300, group=UPDATE, also=("lr",))
    """Learning rate at its peak, after the warmup."""
    loraplus_ratio: Float = setting(
        default=1.0, gt=0, le=1e6, group=UPDATE, also=("loraplus_lr_ratio",)
    )
    """LoRA+: B's learning rate is this many times `learning_rate`."""
    schedule: Schedule = setting(default="cosine", group=UPDATE, also=("lr_scheduler_type",))
    """How the learning rate changes after the warmup."""
    warmup: Float = setting(
        default=DEFAULT_WARMUP,
        ge=0,
        le=MAX_COUNT,
        group=UPDATE,
        also=("warmup_ratio", "warmup_steps"),
        meanings={"warmup_ratio": Share},
    )
    """Updates in which the learning rate rises: below 1 a share of all, from 1 on a number."""
    num_epochs: Int = setting(
        default=1, ge=1, le=1_000_000, group=UPDATE, also=("num_train_epochs",)
    )
    """Passes over the data."""
    max_steps: Int | None = setting(default=None, ge=1, le=MAX_COUNT, group=UPDATE)
    """Number of updates; overrides `num_epochs`."""
    micro_batch_size: Int = setting(
        default=4,
        ge=1,
        le=MAX_COUNT,
        group=UPDATE,
        also=("per_device_train_batch_size",),
    )
    """Examples in one forward; with preferences, pairs."""
    max_tokens_per_batch: Int | None = setting(default=None, ge=1, le=MAX_TOKENS, group=UPDATE)
    """Tokens in one forward at most: it then takes as many of the update's examples as fit, end to
    end, not `micro_batch_size`. An update still takes `micro_batch_size` · `gradient_accumulation`
    examples. On a GPU, which dequantises every layer once a forward, 8,192 or more is fastest."""
    gradient_accumulation: Int = setting(
        default=1,
        ge=1,
        le=MAX_COUNT,
        group=UPDATE,
        also=("gradient_accumulation_steps",),
    )
    """Forwards in one update."""
    optimizer: OptimizerName = setting(default="adamw", group=UPDATE)
    """`8bit` keeps Adam's moments in 8 bits, for tensors of at least 4,096 elements; `paged` keeps
    them in memory that CUDA moves to the host when it must."""
    weight_decay: Float = setting(default=0.0, ge=0, le=1e6, group=UPDATE)
    """AdamW's weight decay, for everything that is trained."""
    max_grad_norm: Float | None = setting(default=1.0, gt=0, le=1e12, group=UPDATE)
    """Gradients longer than this are scaled down to it; None leaves them."""
    seed: Seed | None = setting(default=None, group=RUN)
    """Seed of the order of the data and of the starting weights; None takes the run's seed."""
    eval_interval: Int = setting(default=50, ge=1, le=MAX_COUNT, group=RUN, also=("eval_steps",))
    """Updates between two evaluations on held-out data; there is one after the last update too."""
    patience: Int | None = setting(default=None, ge=1, le=MAX_COUNT, group=RUN)
    """Evaluations without a lower loss after which the unit stops; None never stops it."""
    export: Literal["best", "last"] = setting(default="best", group=RUN, is_fixed=True)
    """Weights to save: those of the lowest held-out loss, if there is one, or the last ones."""
    adapter_dtype: Literal["float32", "bfloat16"] = setting(default="float32", group=RUN)
    """Dtype in which A and B are saved. Training is in float32; other tensors stay float32."""
    sweep: dict[str, tuple[SweepValue, ...]] = setting(
        default_factory=dict, group=RUN, metavar="FIELD=A,B,…", is_fixed=True
    )
    """Settings of the unit and the values to try: all are trained at once, the worse half stops
    early, and again, and the best gets the name. Needs held-out data."""
    dropout: Float = setting(default=0.0, ge=0, le=1, group=ADAPTER, also=("lora_dropout",))
    """Must be 0: an adapter is trained as it is served."""

    def __post_init__(self) -> None:
        rule = f"'default' or {self.start!r} with the variant {self.variant!r}"
        checks: list[tuple[str, bool, str]] = [
            ("name", _is_folder_name(self.name), f"letters, digits, . _ -, not {RESERVED_NAMES}"),
            ("init", re.fullmatch(INITS, self.init) is not None, INIT_RULE),
            ("init", self.init in ("default", self.start), rule),
            (
                "target_modules",
                len(self.target_modules) > 0 or len(self.target_parameters) > 0,
                "'all-linear' or at least one name, here or in target_parameters",
            ),
            (
                "columns",
                set(self.columns) <= set(get_args(Column)),
                "keys of a format, each with the file's own name for it: "
                f"{', '.join(get_args(Column))}",
            ),
            (
                "warmup",
                self.schedule != "constant" or self.warmup in (0, DEFAULT_WARMUP),
                "0 with the schedule constant, which has none; constant_with_warmup has one",
            ),
            (
                "ensure_weight_tying",
                not self.ensure_weight_tying or self._names_vocabulary(),
                "false where target_modules, modules_to_save and trainable_token_indices name "
                "neither embedding nor output layer: there is nothing to tie",
            ),
            ("eval_fraction", not (self.eval_fraction and self.eval_data), "0 beside eval_data"),
            (
                "gradient_accumulation",
                self.examples_per_step <= MAX_EXAMPLES_PER_STEP,
                f"so that an update takes at most {MAX_EXAMPLES_PER_STEP:,} examples, "
                "micro_batch_size · gradient_accumulation",
            ),
            ("dropout", self.dropout == 0, "0; adapters are trained as they are served"),
        ]
        _check(self, checks, f"unit {self.name!r}: ")

    def _names_vocabulary(self) -> bool:
        targets = () if self.target_modules == "all-linear" else self.target_modules
        named = [*self.modules_to_save, *targets]
        ends = {name.rpartition(".")[2] for name in named}
        return bool(self.trainable_token_indices or ends & {"embed_tokens", "lm_head"})

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


@settings
class TrainConfig:
    """One run: every unit is trained at the same time on one base. Raises ConfigError."""

    output: FilePath = setting(group=RUN, also=("output_dir",))
    """Folder that gets a folder for each unit, `checkpoints` and `report`."""
    units: tuple[UnitConfig, ...]
    """The adapters, each with settings of its own."""
    base: BaseConfig = setting(default_factory=BaseConfig)
    seed: Seed = setting(default=0, group=RUN)
    """Seed of the order of the data and of the starting weights."""
    max_seq_len: Int = setting(
        default=1024, ge=2, le=MAX_TOKENS, group=DATA, also=("max_length", "max_seq_length")
    )
    """Longer examples are cut as the unit's `truncation` says, counted and reported."""
    log_interval: Int = setting(default=10, ge=1, le=MAX_COUNT, group=RUN, also=("logging_steps",))
    """Updates of a unit between two progress lines, where there is no terminal."""
    checkpoint_interval: Int = setting(default=200, ge=1, le=MAX_COUNT, group=RUN)
    """Forwards between two checkpoints."""
    activation_checkpointing: bool = setting(
        default=False, group=RUN, also=("gradient_checkpointing",)
    )
    """Keep each layer's input only and compute the layer again for its gradient: less memory, the
    same gradients, about a third more time."""
    tensorboard: bool = setting(default=False, group=RUN)
    """Also write curves for TensorBoard; needs the extra `tensorboard`."""
    resume: bool = setting(default=False, group=RUN)
    """Continue from the newest checkpoint in `output`, which must be of the same run."""

    def __post_init__(self) -> None:
        names = [unit.name for unit in self.units]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"units has {twice!r} {names.count(twice)} times; give each unit a name of its own",
                field="units",
            )
        checks: list[tuple[str, bool, str]] = [
            ("units", len(names) > 0, "at least one unit"),
            ("max_seq_len", self._fits_batches(), "at most the units' max_tokens_per_batch"),
        ]
        _check(self, checks)

    @classmethod
    def from_yaml(cls, path: Path, flags: Mapping[str, Any] | None = None) -> TrainConfig:
        """Read a run from a file whose keys are the settings of TrainConfig and UnitConfig.

        Relative paths are relative to the working directory. The base may be written as for the
        server: `base` a name, its other settings beside it. `flags` go before what the file says,
        those of an adapter in each of its units. Raises ConfigError naming the key and, for an
        unknown one, the nearest valid one.
        """
        run, unit = _parted(flags or {})
        content = read_yaml(path)
        _check_place(content)
        values = merged(nested(content, cls), nested(run, cls))
        if isinstance(units := values.get("units"), list):
            each = nested(unit, UnitConfig)
            values["units"] = [
                {**nested(own, UnitConfig, f"units[{i}]."), **each}
                if isinstance(own, dict)
                else own
                for i, own in enumerate(units)
            ]
        return checked(values, cls)

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], units: Sequence[str] = ()) -> TrainConfig:
        """A run of one unit called `adapter`, or of several: each a line like
        `name: a, data: a.jsonl, rank: 8`, whose settings go before the flags. Raises ConfigError.
        """
        return cls.of(flags, list(map(unit_fields, units)) or [{}], "unit.")

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], units: Sequence[Mapping[str, Any]], where: str = ""
    ) -> TrainConfig:
        """A run of units by any of the settings' names; `settings` hold for the run and for every
        unit, before which its own go. `where` stands before a unit's names in messages.

        Raises ConfigError.
        """
        run, unit = _parted(settings)
        each = {"name": "adapter", **nested(unit, UnitConfig)}
        own = [nested(fields, UnitConfig, where) for fields in units]
        return checked({**nested(run, cls), "units": [{**each, **values} for values in own]}, cls)

    def _fits_batches(self) -> bool:
        budgets = [unit.max_tokens_per_batch or self.max_seq_len for unit in self.units]
        return all(budget >= self.max_seq_len for budget in budgets)

    def seed_of(self, unit: UnitConfig) -> int:
        """The seed a unit uses."""
        return self.seed if unit.seed is None else unit.seed


def unit_fields(text: str) -> dict[str, Any]:
    """What `name: a, data: a.jsonl, rank: 8` says, a YAML mapping without its braces. Raises
    ConfigError.
    """
    try:
        content = parse_yaml(f"{{{text}}}")
    except ValueError as error:
        raise ConfigError(
            f"unit {text!r} cannot be read as YAML, as in name: a, rank: 8: {error}", field="unit"
        ) from error
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _parted(flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What flags say of the run and of every unit; `seed` is the run's."""
    of_run = canonical_names(entries(TrainConfig))
    run = {name: value for name, value in flags.items() if name in of_run}
    return run, {name: value for name, value in flags.items() if name not in of_run}


def _check_place(content: Mapping[str, Any]) -> None:
    """Raise ConfigError where a file has a unit's setting beside `units`."""
    own = canonical_names(entries(UnitConfig)).keys() - canonical_names(entries(TrainConfig)).keys()
    for name in content:
        if name in own:
            raise ConfigError(
                f"{name} is a setting of a unit; write it into each of the units, as in units: "
                "[{name: support, data: support.jsonl, rank: 16}]",
                field=name,
            )


def _is_folder_name(name: str) -> bool:
    is_plain = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._=-]*", name) is not None
    return is_plain and name not in RESERVED_NAMES


def _check(config: object, checks: list[tuple[str, bool, str]], where: str = "") -> None:
    for name, is_valid, rule in checks:
        if not is_valid:
            value = getattr(config, name)
            raise ConfigError(f"{where}{name} is {value!r}; it must be {rule}", field=name)
