"""Which modules an adapter's names and patterns mean: PEFT's rules, in bounded time.

Knows names and patterns; knows no tensor and no config file. Patterns come from untrusted files
and `re` has no time limit, so they run on `regex`, which has. Source: peft 0.21.2,
`check_target_module_exists`, `get_pattern_key`, `_maybe_include_all_linear_layers`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import regex

from lora_runtime.errors import AdapterRefused, nearest

MAX_PATTERN_LENGTH = 8192
MAX_MATCH_S = 0.1
"""One match takes microseconds; a tenth of a second means catastrophic backtracking."""
MAX_TOTAL_S = 5.0
"""Of the reading thread's own time, so that a busy machine refuses nothing."""
MAX_PATTERNS = 2048
"""In one config. Every pattern is tried on every module; PEFT writes one for each module at most,
and the largest bases have about a thousand."""

_READ_DIFFERENTLY = re.compile(r"\[\[|\[:|\{(?!\d+(,\d*)?\}|,\d+\})|--|&&|~~|\|\||[^\x00-\x7f]")
"""Nested sets, POSIX classes, braces that are no plain count ({e}, {1<=e<=2}: fuzzy matches) and,
without regard to case, letters beyond ASCII mean something else to `regex` than to PEFT's `re`."""
_NAME = re.compile(r"[A-Za-z0-9_.]+")
"""A pattern that is a name, as PEFT writes one for each module."""
_FIRST_INDEX = r".*?\.[^.]*\.(?P<idx>\d+)\."
_INDEX_AFTER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The fields that decide which modules are adapted; a tuple is a list, a string a pattern."""

    target_modules: str | tuple[str, ...]
    target_parameters: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()


class PatternMatcher:
    """Compiles and matches one config's regular expressions within one time budget, on one thread.

    Every method raises AdapterRefused, naming `field`, for a pattern that is too long, invalid,
    one too many, ambiguous between regex engines, or too slow.
    """

    def __init__(self) -> None:
        self._deadline = time.thread_time() + MAX_TOTAL_S
        self._num_patterns = 0

    def compile(
        self, pattern: str, field: str, template: str = "{}", *, is_whole: bool = False
    ) -> Callable[[str], regex.Match[str] | None]:
        """Return a matcher of `template` with `pattern` in its braces.

        It matches from the start of a name, or the whole of it.
        """
        self._check(pattern, field)
        whole = template.replace("{}", pattern)
        try:
            re.compile(whole)
            compiled = regex.compile(whole)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise AdapterRefused(
                f"{field} holds {pattern[:80]!r}, which is not a regular expression: {error}",
                field=field,
            ) from None
        run = compiled.fullmatch if is_whole else compiled.match

        def match(name: str) -> regex.Match[str] | None:
            self._check_time(field)
            try:
                return run(name, timeout=MAX_MATCH_S)
            except TimeoutError:
                raise _too_slow(field) from None

        return match

    def first_match(
        self, patterns: Mapping[str, Value], field: str
    ) -> Callable[[str], Value | None]:
        """Return a lookup of the first pattern that a name ends with, after a dot or as a whole."""
        compiled = [(self._at_end(pattern, field), value) for pattern, value in patterns.items()]
        return lambda name: next((value for match, value in compiled if match(name)), None)

    def _at_end(self, pattern: str, field: str) -> Callable[[str], object]:
        """A matcher of what a name ends with. Names, of which a config may have hundreds for as
        many modules, are compared without an engine: a hundredth of the time.
        """
        if not _NAME.fullmatch(pattern):
            return self.compile(pattern, field, r"(.*\.)?({})$")
        self._check(pattern, field)
        return partial(_ends_with, pattern, pattern.rpartition(".")[2])

    def _check(self, pattern: str, field: str) -> None:
        self._check_time(field)
        self._num_patterns += 1
        if self._num_patterns > MAX_PATTERNS:
            raise AdapterRefused(
                f"{field} holds too many patterns: at most {MAX_PATTERNS} are accepted in one "
                "config; write one for several modules",
                field=field,
            )
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise AdapterRefused(
                f"{field} holds a pattern of {len(pattern)} characters; "
                f"at most {MAX_PATTERN_LENGTH} are accepted",
                field=field,
            )
        if _READ_DIFFERENTLY.search(pattern):
            raise AdapterRefused(
                f"{field} holds {pattern[:80]!r}, which regex engines read differently; "
                "write it in ASCII, without nested sets, POSIX classes and braces but {n,m}",
                field=field,
            )

    def _check_time(self, field: str) -> None:
        if time.thread_time() > self._deadline:
            raise _too_slow(field)


def select_modules(
    selection: Selection,
    names: Collection[str],
    num_layers: int,
    matcher: PatternMatcher,
    *,
    ends: Collection[str] = (),
    may_be_none: bool = False,
) -> frozenset[str]:
    """Return the names that a selection adapts; "all-linear" leaves out `ends`.

    Raises: AdapterRefused for a layer that is not there and, unless it `may_be_none`, where no
    target matches.
    """
    _check_layers(selection.layers_to_transform, num_layers)
    is_target = _target_test(selection, names, ends, matcher)
    if not may_be_none:
        _check_targets(selection, names, is_target)
    is_excluded = _exclusion_test(selection.exclude_modules, matcher)
    is_in_layers = _layer_test(selection, matcher)
    selected = [
        name for name in names if is_target(name) and not is_excluded(name) and is_in_layers(name)
    ]
    if not selected and not may_be_none:
        raise AdapterRefused(
            "target_modules, exclude_modules, layers_to_transform and layers_pattern together "
            "select no module",
            field="target_modules",
        )
    return frozenset(selected)


def _ends_with(pattern: str, last: str, name: str) -> bool:
    """What `(.*\\.)?(pattern)$` says of a name in one line, for a pattern of letters, digits,
    underscores and dots, each of which stands for any character; `last`: what is behind all dots.
    """
    if not name.endswith(last):
        return False
    before = len(name) - len(pattern)
    if before < 0 or (before and name[before - 1] != "."):
        return False
    tail = name[before:]
    return tail == pattern or all(p in (".", own) for p, own in zip(pattern, tail, strict=True))


def _too_slow(field: str) -> AdapterRefused:
    return AdapterRefused(
        f"{field} holds patterns that take too long to match; write plain module names", field=field
    )


def tails(name: str) -> Iterator[str]:
    """Yield `a.b.c`, `b.c`, `c`: what a list entry may be to mean this name."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _target_test(
    selection: Selection, names: Collection[str], ends: Collection[str], matcher: PatternMatcher
) -> Callable[[str], bool]:
    """A function that tells whether PEFT takes a module's name for a target.

    Raises AdapterRefused for a target that PEFT cannot adapt.
    """
    targets = selection.target_modules
    if isinstance(targets, tuple):
        unmatched_targets(selection, names)
        entries = set(targets)
        return lambda name: not entries.isdisjoint(tails(name))
    if targets.lower() == "all-linear":
        return lambda name: name not in ends
    match = matcher.compile(targets, "target_modules", is_whole=True)
    return lambda name: match(name) is not None


def _check_targets(
    selection: Selection, names: Collection[str], is_target: Callable[[str], bool]
) -> None:
    """Raise AdapterRefused if no module of the base is a target."""
    targets, field = selection.target_modules, "target_modules"
    if any(map(is_target, names)):
        return
    if isinstance(targets, tuple):
        raise AdapterRefused(
            f"target_modules names {min(targets)[:80]!r}, which is no linear layer, embedding or "
            "output layer of this base, and neither is any other of its names: "
            f"{likely_meant(min(targets), names)}",
            field=field,
        )
    raise AdapterRefused(
        f"target_modules is {targets[:80]!r}, which matches no module of this base", field=field
    )


def unmatched_targets(selection: Selection, names: Collection[str]) -> list[str]:
    """Entries of target_modules that mean no module of this base, sorted; PEFT passes over them.

    Raises: AdapterRefused for one that means a module which holds others: PEFT cannot adapt it.
    """
    if isinstance(selection.target_modules, str):
        return []
    known = {tail for name in names for tail in tails(name)}
    unmatched = sorted(set(selection.target_modules) - known)
    holders = {name.rpartition(".")[0] for name in names}
    holders |= {outer for name in holders for outer in _outer(name)}
    held = {tail for name in holders for tail in tails(name)}
    for entry in unmatched:
        if entry in held:
            raise AdapterRefused(
                f"target_modules names {entry[:80]!r}, which holds other modules; name the linear "
                "layers in it",
                field="target_modules",
            )
    return unmatched


def likely_meant(entry: str, names: Iterable[str]) -> str:
    """A sentence that proposes the name nearest to an entry that means none of `names`. Of each the
    part behind the layer's number is looked at, and as much of it as the entry has.
    """
    wanted = _behind_number(entry)[:80]
    length = wanted.count(".") + 1
    ends = {_behind_number(name) for name in names}
    return nearest(wanted, {".".join(end.split(".")[-length:]) for end in ends})


def _behind_number(name: str) -> str:
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


def _outer(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _exclusion_test(
    excluded: str | tuple[str, ...], matcher: PatternMatcher
) -> Callable[[str], bool]:
    if isinstance(excluded, tuple):
        entries = set(excluded)
        return lambda name: not entries.isdisjoint(tails(name))
    match = matcher.compile(excluded, "exclude_modules", is_whole=True)
    return lambda name: match(name) is not None


def _layer_test(selection: Selection, matcher: PatternMatcher) -> Callable[[str], bool]:
    layers = selection.layers_to_transform
    if not layers:
        return lambda name: True
    field = "layers_pattern"
    patterns = [matcher.compile(p, field, _INDEX_AFTER) for p in selection.layers_pattern]
    patterns = patterns or [matcher.compile(_FIRST_INDEX, field)]

    def is_in_layers(name: str) -> bool:
        if name in selection.target_modules:  # PEFT: a whole name is adapted in any layer
            return True
        found = next((match for pattern in patterns if (match := pattern(name))), None)
        index = found["idx"] if found else None
        return index is not None and int(index) in layers

    return is_in_layers


def _check_layers(layers: tuple[int, ...], num_layers: int) -> None:
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise AdapterRefused(
            f"layers_to_transform names layer {outside[0]}; this base has layers 0 to "
            f"{num_layers - 1}",
            field="layers_to_transform",
        )
