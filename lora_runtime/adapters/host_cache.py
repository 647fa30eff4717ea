"""Adapters kept on the host, by content: loading the same files twice keeps one copy."""

from __future__ import annotations

from lora_runtime.adapters.serving_form import ServingForm


class HostCache:
    """Reference-counted serving forms, keyed by digest."""

    def __init__(self) -> None:
        self._forms: dict[str, ServingForm] = {}
        self._references: dict[str, int] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._forms

    def __getitem__(self, digest: str) -> ServingForm:
        return self._forms[digest]

    @property
    def nbytes(self) -> int:
        return sum(form.nbytes for form in self._forms.values())

    def add(self, form: ServingForm) -> None:
        """Keep `form`, or gain a reference if its content is here already."""
        self._forms.setdefault(form.digest, form)
        self._references[form.digest] = self._references.get(form.digest, 0) + 1

    def drop(self, digest: str) -> bool:
        """Give up one reference; True when it was the last. The form stays until `remove`."""
        self._references[digest] -= 1
        return self._references[digest] == 0

    def is_referenced(self, digest: str) -> bool:
        """True while a load of it has not been undone."""
        return self._references.get(digest, 0) > 0

    def unreferenced(self) -> list[str]:
        """Digests that were dropped and still wait for `remove`."""
        return [digest for digest, count in self._references.items() if count == 0]

    def remove(self, digest: str) -> None:
        """Forget a form without references."""
        assert not self.is_referenced(digest)
        del self._forms[digest], self._references[digest]
