"""Which API answers a path, and which names no app can have: derived from the routes."""

from collections.abc import Iterable, Sequence
from typing import ClassVar
from urllib.parse import unquote_to_bytes

from attrs import field, frozen
from klein import Klein
from twisted.web.resource import IResource

from pulsar_api.web.responses import new_app

Pattern = tuple[bytes | None, ...]
"""The segments of a path; None stands for any segment."""


def patterns(app: Klein) -> frozenset[Pattern]:
    """Return the patterns of all routes of an application."""
    return frozenset(
        tuple(
            None if segment.startswith("<") else segment.encode()
            for segment in rule.rule.split("/")[1:]
        )
        for rule in app.url_map.iter_rules()
    )


@frozen(eq=False)
class Mount:
    """What an API contributes: its resource, and the paths that it answers."""

    resource: IResource
    patterns: frozenset[Pattern]
    reserved: frozenset[bytes] = frozenset()
    """Names beside those of its routes that no app can have."""
    identifies_later: bool = False
    """Whether callers identify themselves after the request, in a way of its own."""


def mount(api: object, reserved: frozenset[bytes] = frozenset()) -> Mount:
    """Return the contribution of an API whose ``app`` has all its routes."""
    app: Klein = api.app  # type: ignore[attr-defined]
    return Mount(app.resource(), patterns(type(api).app), reserved)  # type: ignore[attr-defined]


@frozen(eq=False)
class _Nothing:
    """An API without routes; the error handlers of `new_app` need an instance."""

    app: ClassVar[Klein] = new_app()


def _nothing() -> Mount:
    return mount(_Nothing())


@frozen(eq=False)
class Router:
    """Finds the API of a path by the routes of all APIs."""

    mounts: Sequence[Mount]
    reserved: frozenset[bytes] = field(init=False)
    """First segments of paths that are no app's name.

    A route collides with ``/:app/:env`` if it has one or two segments and begins with a
    name.
    """
    _routes: dict[tuple[int, bytes | None], list[tuple[Pattern, Mount]]] = field(init=False)
    """By the number of segments and the first one; the most specific first."""
    _nothing: Mount = field(factory=_nothing, init=False)

    @reserved.default
    def _derive_reserved(self) -> frozenset[bytes]:
        names = {
            pattern[0]
            for found in self.mounts
            for pattern in found.patterns
            if pattern[0] and len(pattern) <= 2
        }
        return frozenset(names).union(*(found.reserved for found in self.mounts))

    @_routes.default
    def _index(self) -> dict[tuple[int, bytes | None], list[tuple[Pattern, Mount]]]:
        index: dict[tuple[int, bytes | None], list[tuple[Pattern, Mount]]] = {}
        for found in self.mounts:
            for pattern in found.patterns:
                routes = index.setdefault((len(pattern), pattern[0]), [])
                routes.append((pattern, found))
        for routes in index.values():
            routes.sort(key=lambda route: route[0].count(None))
        return index

    def find(self, segments: Sequence[bytes]) -> Mount:
        """Return the API that answers a path; one that answers 404 if there is none.

        ``segments`` are percent-encoded. An empty one at the end does not count.
        """
        decoded = [unquote_to_bytes(segment) for segment in segments]
        if len(decoded) > 1 and not decoded[-1]:
            del decoded[-1]
        found = self._first(self._routes.get((len(decoded), decoded[0]), ()), decoded)
        # Without a first segment there is no app, and Klein would begin at the second one.
        if found is None and decoded[0] and decoded[0] not in self.reserved:
            found = self._first(self._routes.get((len(decoded), None), ()), decoded)
        return self._nothing if found is None else found

    @staticmethod
    def _first(
        routes: Iterable[tuple[Pattern, Mount]], segments: Sequence[bytes]
    ) -> Mount | None:
        for pattern, found in routes:
            if all(a is None or a == b for a, b in zip(pattern, segments, strict=True)):
                return found
        return None
