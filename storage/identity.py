"""What a cache or a training state was made from: compared field by field, and the fields that differ named."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import Repr
from typing import Any

from tinymim.configs.errors import CheckpointError
from tinymim.storage.atomic import canonical_json

LISTED_DIFFERENCES = 8
ABSENT = "(absent)"
Difference = tuple[str, Any, Any]  # dotted field, stored value, wanted value

_short = Repr()
_short.maxstring = _short.maxother = 200


@dataclass(frozen=True)
class Identity:
    """What a state depends on.

    Attributes:
        digest: the digest of it, which decides.
        fields: its values by name, for messages; JSON values.
    """

    digest: str
    fields: Mapping[str, Any] = field(compare=False, repr=False)

    def stated(self) -> dict[str, Any]:
        """The entries of a state that hold its identity."""
        return {"identity": self.digest, "fields": dict(self.fields)}

    def require(self, state: Mapping[str, Any], what: str, hint: str) -> None:
        """Raise CheckpointError with the fields that differ if a state has another identity.

        Args:
            state: holds the entries of `stated`; states of older versions lack `fields`.
            what: the first words of the message.
            hint: its last line.
        """
        if state["identity"] == self.digest:
            return
        found = list(differences(state.get("fields", {}), self.fields)) if "fields" in state else []
        if not found:
            raise CheckpointError(what, got=state["identity"], expected=self.digest, hint=hint)
        listing, got, expected = named(found)
        raise CheckpointError(f"{what}: {listing}", got=got, expected=expected, hint=hint)


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[Difference]:
    """The leaves whose canonical JSON differs, with their dotted names."""
    for key in sorted(stored.keys() | wanted.keys()):
        ours, theirs = stored.get(key, ABSENT), wanted.get(key, ABSENT)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from differences(ours, theirs, f"{prefix}{key}.")
        elif canonical_json(ours) != canonical_json(theirs):
            yield f"{prefix}{key}", ours, theirs


def named(found: Sequence[Difference]) -> tuple[str, str, str]:
    """The names of the differing fields, and stored and wanted values of the first ones."""
    listed = found[:LISTED_DIFFERENCES]
    names = ", ".join(name for name, _, _ in listed)
    more = f" and {len(found) - len(listed)} more" if len(found) > len(listed) else ""
    stored = "; ".join(f"{name} = {_short.repr(value)}" for name, value, _ in listed)
    wanted = "; ".join(f"{name} = {_short.repr(value)}" for name, _, value in listed)
    return f"{len(found)} field(s) differ: {names}{more}", f"{stored} (stored)", f"{wanted} (wanted)"
