"""Every error the project raises on purpose. `server/errors.py` maps each class to a wire status.

LoramuxError
├── InvalidRequest              a client sent a value that cannot be used
│   ├── UnsupportedFeature      a value that is understood but not served yet
│   └── PromptTooLong           the prompt leaves no room for an output
├── ConfigError                 an operator's setting, file or flag cannot be used
├── BaseRefused                 this base model cannot be served
├── AdapterError
│   ├── AdapterNotFound         no adapter of that name
│   ├── AdapterExists           the name is taken by other content
│   ├── AdapterInUse            a name holds what was to be deleted
│   ├── AdapterRefused          its files cannot be honoured exactly
│   │   ├── AdapterSourceRefused  its location is not allowed
│   │   ├── BaseMismatch        it was made for another base
│   │   └── ParityFailed        it does not do here what it did where it was made
│   ├── AdapterTooLarge         it can never fit the adapter pool
│   └── AdapterFailed           it produced non-finite values while serving
├── DataError                   a training example cannot be used
├── Unauthenticated             no key or certificate that the server knows
├── PermissionDenied            the caller's key is not for this
├── RequestFailed               something unforeseen ended one request
├── Overloaded                  a queue or a pool is full; try again later
│   └── QuotaUsed               the caller's tenant has all that it may have for now
└── Unavailable                 the engine is stopping or has died, or an adapter is not there yet
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path

MAX_WRITTEN = 200
"""Characters of a value in a message."""


class LoramuxError(Exception):
    """Base of all errors raised on purpose.

    `message` says what is wrong and what to change; `field` is the dotted name of the offending
    input where one is known, for example `sampling.temperature`. `retry_after_s`: seconds until
    the same call may succeed, where that is known.
    """

    def __init__(
        self, message: str, *, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequest(LoramuxError):
    """A client sent a value that cannot be used."""


class UnsupportedFeature(InvalidRequest):
    """A client asked for something that is defined but not served yet."""


class PromptTooLong(InvalidRequest):
    """The prompt has more tokens than fit before the first token of an output."""


class ConfigError(LoramuxError):
    """An operator's setting, file or flag cannot be used."""


class BaseRefused(LoramuxError):
    """This base model cannot be served; the message names the module or setting."""


class AdapterError(LoramuxError):
    """Something about one adapter."""


class AdapterNotFound(AdapterError):
    """No adapter of that name is loaded."""


class AdapterExists(AdapterError):
    """The name is taken by an adapter with other content."""


class AdapterInUse(AdapterError):
    """What was to be deleted is held by a name, or is being loaded."""


class AdapterRefused(AdapterError):
    """The adapter's files cannot be honoured exactly; `field` names the key or tensor."""


class AdapterSourceRefused(AdapterRefused):
    """The adapter's location is missing, outside the allowed roots, or not plain files."""


class BaseMismatch(AdapterRefused):
    """The adapter was made for another base than the one served."""


class ParityFailed(AdapterRefused):
    """The adapter's effect here is not the one recorded beside it where it was made."""


class AdapterTooLarge(AdapterError):
    """The adapter can never fit the adapter pool, however empty it is."""


class AdapterFailed(AdapterError):
    """The adapter produced non-finite values; only its own requests fail."""


class DataError(LoramuxError):
    """A training example cannot be used; the message names file and line."""


class RequestFailed(LoramuxError):
    """Something unforeseen ended this request, and no other; the log has the cause."""


class Unauthenticated(LoramuxError):
    """The server has keys, and the call has none that it knows."""


class PermissionDenied(LoramuxError):
    """The caller is known, and its key is not for this."""


class Overloaded(LoramuxError):
    """A queue or pool is full for now; the same call may succeed later."""


class QuotaUsed(Overloaded):
    """The caller's tenant has all that its limits allow, for now; the server itself has room."""


class Unavailable(LoramuxError):
    """The engine is stopping, hangs or has died, or an adapter is being loaded after a restart."""


def check_options(given: Collection[str], valid: Collection[str]) -> None:
    """Raise InvalidRequest for a keyword argument of a request that is none of the valid ones."""
    for name in given:
        if name not in valid:
            raise InvalidRequest(
                f"{name} is no option of a request; {nearest(name, valid)}", field=name
            )


def nearest(name: str, valid: Collection[str]) -> str:
    """A sentence that proposes the most similar valid name, or lists them all."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(sorted(set(valid)))}"


def written(value: object) -> str:
    """A value as a person would write it, cut where it is long."""
    try:
        text = repr(str(value)) if isinstance(value, Path) else repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= MAX_WRITTEN else f"{text[:MAX_WRITTEN]}…"
