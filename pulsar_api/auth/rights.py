"""Rights: what callers are allowed to do, and on which targets."""

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
    """What a caller can be allowed to do. Each right implies `READ`, and `ADMIN` all."""

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
        """Parse names of rights and targets.

        Raises:
            ValueError: A name is unknown or a target is malformed; the text says which.
        """
        rights: set[Right] = set()
        for name in may:
            if name not in list(Right):
                known = ", ".join(Right)
                raise ValueError(f"{name!r} is not a right; use one of {known}")
            rights |= _IMPLIED[Right(str(name))]
        targets = tuple(Target.parse(str(text)) for text in on)
        if not rights or not targets:
            raise ValueError("needs at least one right and one target")
        return cls(frozenset(rights), targets)

    def allows(self, right: Right, app: str, env: str, action: str | None) -> bool:
        """Return whether this grants a right on a target; None stands for any action."""
        return right in self.rights and any(
            target.matches(app, env, action) for target in self.targets
        )


ALL = Grant(frozenset(Right))


@frozen
class Rule:
    """A grant, and to whom: ``*``, ``user:U``, ``token:T``, ``org:O`` or ``team:O/T``."""

    who: frozenset[str]
    grant: Grant

    @classmethod
    def parse(cls, table: object) -> "Rule":
        """Parse one of the tables ``[[rights]]``.

        Raises:
            ValueError: The table is malformed; the text says how.
        """
        if (
            not isinstance(table, Mapping)
            or set(table) - _RULE
            or not {"who", "may"} <= set(table)
        ):
            raise ValueError(
                "each table needs who and may, and can have on: lists of strings"
            )
        lists = {}
        for name in _RULE:
            value = table.get(name, ["*"])
            value = [value] if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise ValueError(f"{name} must be a list of strings")
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
    """A user as a provider knows them, or an API token."""

    principal: Principal
    """The name of a token begins with ``token:``."""
    groups: frozenset[str] = frozenset()
    """The names by which rules refer to them, in lower case."""
    grants: tuple[Grant, ...] = ()
    """The rights of a token, which it has beside all rules."""


@frozen
class Caller:
    """The sender of a request, as far as known: who, from where, with which rights."""

    principal: Principal | None
    """None if callers do not authenticate, or if this one has not."""
    address: str
    means: str = "anonymous"
    grants: tuple[Grant, ...] = (ALL,)

    @property
    def actor(self) -> Principal:
        """The principal, or else one that stands for the address."""
        return self.principal or Principal("address", self.address, self.address)

    def has_right(self, right: Right, app: str, env: str, action: str | None) -> bool:
        """Return whether the caller has a right on a target; None stands for any action."""
        return any(grant.allows(right, app, env, action) for grant in self.grants)

    def targets_of(self, right: Right) -> tuple[Target, ...] | None:
        """Return the targets on which the caller has a right; None for all."""
        found = [t for grant in self.grants if right in grant.rights for t in grant.targets]
        return None if Target() in found else tuple(dict.fromkeys(found))


@frozen
class Policy:
    """The rules of a daemon. Without rules, every authenticated user has all rights."""

    rules: Sequence[Rule] | None = None

    def grants(self, identity: Identity) -> tuple[Grant, ...]:
        """Return the grants of an identity."""
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
