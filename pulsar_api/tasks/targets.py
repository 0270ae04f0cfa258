"""Patterns of targets: which apps, envs and actions are meant."""

import re

from attrs import frozen

from pulsar_api.globs import matches

_PATTERN = re.compile(r"[^/\s\0\[\]]+(/[^/\s\0\[\]]+(/[^\s\0\[\]]+)?)?")


@frozen
class Target:
    """Which apps, envs and actions are meant: three texts in which * and ? are wild."""

    app: str = "*"
    env: str = "*"
    action: str = "*"

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read ``app``, ``app/env`` or ``app/env/action``; `ValueError` if it is none."""
        if not _PATTERN.fullmatch(text):
            raise ValueError(
                f"{text!r} must be like shop, shop/production or shop/*/deploy"
            )
        return cls(*text.split("/", 2))

    def matches(self, app: str, env: str, action: str | None) -> bool:
        """Return whether something is meant. No action: whether any there is."""
        pairs = [(self.app, app), (self.env, env)]
        if action is not None:
            pairs.append((self.action, action))
        return all(matches(glob, text) for glob, text in pairs)

    def __str__(self) -> str:
        return f"{self.app}/{self.env}/{self.action}"
