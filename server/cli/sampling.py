"""The options of a request on the command line; they are named as in the protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias, cast

import typer

from loramux.server.client.requests import Options

MaxTokens: TypeAlias = Annotated[int | None, typer.Option(help="Most tokens to generate.")]
Temperature: TypeAlias = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopK: TypeAlias = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")]
TopP: TypeAlias = Annotated[float | None, typer.Option(help="Keep this total probability.")]
MinP: TypeAlias = Annotated[float | None, typer.Option(help="Least share of the top probability.")]
Seed: TypeAlias = Annotated[int | None, typer.Option(help="Equal seeds draw equal answers.")]
PresencePenalty: TypeAlias = Annotated[
    float | None, typer.Option(help="Taken off tokens that the output has.")
]
FrequencyPenalty: TypeAlias = Annotated[
    float | None, typer.Option(help="Taken off each time that it has them.")
]
RepetitionPenalty: TypeAlias = Annotated[
    float | None, typer.Option(help="Above 1: fewer tokens of prompt and output.")
]
LogitBias: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKEN=NUMBER", help="Added to a token id's logit; repeat it."),
]
NumOutputs: TypeAlias = Annotated[
    int | None, typer.Option("--n", help="Answers to the one prompt.")
]
PromptLogprobs: TypeAlias = Annotated[
    int | None,
    typer.Option(help="Show log probabilities of the prompt, and of this many others."),
]
Stop: TypeAlias = Annotated[list[str] | None, typer.Option(help="Text that ends the output.")]
IgnoreEos: TypeAlias = Annotated[
    bool | None, typer.Option("--ignore-eos", help="Go on after end tokens.")
]
BaseText: TypeAlias = Annotated[
    bool | None, typer.Option("--base-text", help="Use the base's template.")
]
Priority: TypeAlias = Annotated[
    int | None, typer.Option(help="Per tenant, lower values run first.")
]
Tenant: TypeAlias = Annotated[str | None, typer.Option(help="Who asks. Default: the address.")]

JsonSchema: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The answer is JSON that this schema allows.")
]
Regex: TypeAlias = Annotated[
    str | None, typer.Option(help="The answer is text that this expression matches as a whole.")
]
Grammar: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The answer is text that this grammar (Lark) derives."),
]
Choices: TypeAlias = Annotated[
    list[str] | None, typer.Option(help="The answer is this text; repeat it for others.")
]


def given(parameters: Mapping[str, Any]) -> Options:
    """Return those of a command's parameters that are options of a request and were given."""
    named = {name: parameters.get(name) for name in Options.__annotations__}
    options = {name: value for name, value in named.items() if value not in (None, [], ())}
    if "logit_bias" in options:
        options["logit_bias"] = _biases(options["logit_bias"])
    return cast(Options, options)


def _biases(texts: Iterable[str]) -> dict[int, float]:
    """Read `token=number`."""
    biases: dict[int, float] = {}
    for text in texts:
        token_id, _, bias = text.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise typer.BadParameter(
                f"{text!r}; it must be a token id and a number, as 42=-5", param_hint="--logit-bias"
            ) from None
    return biases


def structured_output(
    json_schema: Path | None, regex: str | None, grammar: Path | None, choice: list[str] | None
) -> dict[str, object] | None:
    """Return the one form that the answer must have, or None."""
    given: dict[str, object] = {} if regex is None else {"regex": regex}
    given |= {"choice": choice} if choice else {}
    for name, file in (("json_schema", json_schema), ("grammar", grammar)):
        if file is not None:
            given[name] = _text_of(file, f"--{name.replace('_', '-')}")
    if len(given) > 1:
        raise typer.BadParameter("give one of --json-schema, --regex, --grammar and --choice")
    return given or None


def _text_of(file: Path, flag: str) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeError) as error:
        raise typer.BadParameter(str(error), param_hint=flag) from None
