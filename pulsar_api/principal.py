"""Who somebody is: a person or a token, known by an id that never changes hands."""

from attrs import field, frozen


@frozen
class Principal:
    """A person or a token. Two are the same if a provider knows them by the same id."""

    provider: str
    """Who knows the id: ``github``, ``static`` or ``token``. It has no colon.

    ``address`` stands for callers of a daemon that asks nobody who they are, ``machine``
    for users of the daemon's machine, and "" for those of older records, of whom only the
    name is known.
    """
    id: str
    """At GitHub the number of the account: logins change, and others take them."""
    name: str = field(eq=False)
    """What people see."""

    @property
    def key(self) -> str:
        """The text by which a principal is stored and compared: ``github:583231``."""
        return f"{self.provider}:{self.id}"

    @classmethod
    def from_key(cls, key: str | None, name: str) -> "Principal":
        """Return the principal of a stored key; without one, only the name is known."""
        provider, _, id = (f":{name}" if key is None else key).partition(":")
        return cls(provider, id, name)

    def __str__(self) -> str:
        return self.name
