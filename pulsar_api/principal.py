"""Principals: people and tokens, identified by an id that never changes hands."""

from attrs import field, frozen


@frozen
class Principal:
    """A person or a token. Two are the same if a provider knows them by the same id."""

    provider: str
    """The namespace of the id: ``github``, ``static`` or ``token``, without a colon.

    ``address`` is for callers of a daemon without authentication, ``machine`` for users of
    the daemon's machine, and "" for older records, which have only the name.
    """
    id: str
    """At GitHub the number of the account, as logins change and are taken by others."""
    name: str = field(eq=False)
    """The display name."""

    @property
    def key(self) -> str:
        """The text by which a principal is stored and compared: ``github:583231``."""
        return f"{self.provider}:{self.id}"

    @classmethod
    def from_key(cls, key: str | None, name: str) -> "Principal":
        """Return the principal of a stored key; without a key only the name is known."""
        provider, _, id = (f":{name}" if key is None else key).partition(":")
        return cls(provider, id, name)

    def __str__(self) -> str:
        return self.name
