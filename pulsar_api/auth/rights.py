"""Rights: who may do what, where; and the caller who has them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from attrs import frozen

from pulsar_api.principal import Principal
from pulsar_api.tasks.targets import Target

EVERYBODY = "*"

_WHO = re.compile(r"\*|(user|token):[^\s\0]+|org:[^\s\0/]+|team:[^\s\0/]+/[^\s\0/]+")
_RULE = frozenset({"who", "on", "may"})


class Right(StrEnum):
    """What can be allowed. Each of the others implies `READ`, and `ADMIN` all."""

    READ = "read"
    RUN = "run"
    KILL = "kill"
    ADMIN = "admin"


_IMPLIED = {
    Right.READ: {Right.READ},
    Right.RUN: {Right.READ, Right.RUN},
    Right.KILL: {Right.READ, Right.KILL},
    Right.ADMIN: set(Right),
}


@frozen
class Grant:
    """Rights on some targets."""

    rights: frozenset[Right]
    targets: tuple[Target, ...] = (Target(),)

    @classmethod
    def parse(cls, may: Iterable[object], on: Iterable[object]) -> "Grant":
        """Read the names of rights, and targets; `ValueError` says which is wrong."""
        rights: set[Right] = set()
        for name in may:
            if name not in list(Right):
                known = ", ".join(Right)
                raise ValueError(f"{name!r} is no right; there are {known}")
            rights |= _IMPLIED[Right(str(name))]
        targets = tuple(Target.parse(str(text)) for text in on)
        if not rights or not targets:
            raise ValueError("names no right, or no target")
        return cls(frozenset(rights), targets)

    def allows(self, right: Right, app: str, env: str, action: str | None) -> bool:
        """Return whether it gives a right there; no action: for any action."""
        return right in self.rights and any(
            target.matches(app, env, action) for target in self.targets
        )


ALL = Grant(frozenset(Right))


@frozen
class Rule:
    """A grant and to whom: ``*``, ``user:U``, ``token:T``, ``org:O`` or ``team:O/T``."""

    who: frozenset[str]
    grant: Grant

    @classmethod
    def parse(cls, table: object) -> "Rule":
        """Read one of the tables ``[[rights]]``; `ValueError` says what is wrong."""
        if (
            not isinstance(table, Mapping)
            or set(table) - _RULE
            or not {"who", "may"} <= set(table)
        ):
            raise ValueError("each has who, may, and perhaps on: lists of texts")
        lists = {}
        for name in _RULE:
            value = table.get(name, ["*"])
            value = [value] if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise ValueError(f"{name} must be a list of texts")
            lists[name] = value
        for name in lists["who"]:
            if not _WHO.fullmatch(name):
                raise ValueError(
                    f"who: {name!r} must be *, user:NAME, token:NAME, org:NAME or "
                    "team:ORG/TEAM"
                )
        who = frozenset(name.casefold() for name in lists["who"])
        return cls(who, Grant.parse(lists["may"], lists["on"]))


@frozen
class Identity:
    """Somebody, as a provider or our own list of tokens knows them."""

    principal: Principal
    """The name of a token begins with ``token:``."""
    groups: frozenset[str] = frozenset()
    """What rules may call them, in lower case."""
    grants: tuple[Grant, ...] = ()
    """What they may beside all rules: the rights of a token."""


@frozen
class Caller:
    """Who sends a request, from where, and what they may do."""

    principal: Principal | None
    """None: nobody is asked who they are, or nobody knows."""
    address: str
    means: str = "anonymous"
    grants: tuple[Grant, ...] = (ALL,)

    @property
    def by(self) -> Principal:
        """Who it is; of whom nobody knows who they are, where the request comes from."""
        return self.principal or Principal("address", self.address, self.address)

    def may(self, right: Right, app: str, env: str, action: str | None) -> bool:
        """Return whether they may do this there; no action: with any action there."""
        return any(grant.allows(right, app, env, action) for grant in self.grants)

    def where(self, right: Right) -> tuple[Target, ...] | None:
        """Return where they have a right; None: everywhere."""
        found = [t for grant in self.grants if right in grant.rights for t in grant.targets]
        return None if Target() in found else tuple(dict.fromkeys(found))


@frozen
class Policy:
    """The rules of a daemon. Without any, whoever is let in may everything."""

    rules: Sequence[Rule] | None = None

    def grants(self, identity: Identity) -> tuple[Grant, ...]:
        """Return what somebody may."""
        own = identity.grants
        if self.rules is None:
            return own if identity.principal.provider == "token" else (ALL,)
        names = identity.groups | {EVERYBODY}
        return own + tuple(rule.grant for rule in self.rules if rule.who & names)

    def groups(self) -> frozenset[str]:
        """Return the users, organisations and teams that rules name."""
        named = {name for rule in self.rules or () for name in rule.who}
        kinds = ("user:", "org:", "team:")
        return frozenset(name for name in named if name.startswith(kinds))
