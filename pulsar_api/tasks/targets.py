"""Patterns of targets: which apps, envs and actions are meant."""

import re

from attrs import frozen

from pulsar_api.globs import matches

_PATTERN = re.compile(r"[^/\s\0\[\]]+(/[^/\s\0\[\]]+(/[^\s\0\[\]]+)?)?")


@frozen
class Target:
    """A pattern of apps, envs and actions: three texts with the wildcards * and ?."""

    app: str = "*"
    env: str = "*"
    action: str = "*"

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Return the pattern ``app``, ``app/env`` or ``app/env/action``.

        Raises:
            ValueError: The text has another form.
        """
        if not _PATTERN.fullmatch(text):
            raise ValueError(
                f"{text!r} must be like shop, shop/production or shop/*/deploy"
            )
        return cls(*text.split("/", 2))

    def matches(self, app: str, env: str, action: str | None) -> bool:
        """Return whether the pattern matches. Without an action, whether any action can."""
        pairs = [(self.app, app), (self.env, env)]
        if action is not None:
            pairs.append((self.action, action))
        return all(matches(glob, text) for glob, text in pairs)

    def __str__(self) -> str:
        return f"{self.app}/{self.env}/{self.action}"
