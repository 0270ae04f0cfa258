"""The house: which package may import which, held against the imports."""

import re
from pathlib import Path

import pytest

from docs import arrows

ROOT = Path(__file__).parents[1]

LAYERS = (
    {"__main__", "cli"},
    {"tap"},
    {"daemon"},
    {"web", "network"},
    {"config"},
    {"auth"},
    {"execution", "storage"},
    {"output"},
    {"tasks"},
    {"concurrency"},
    {"errors"},
    {"principal", "files", "globs", "memory", "bounded", "shim", "client"},
)
"""Each package or module of the top level, the highest first.

A layer imports lower ones only. Two packages of one layer do not import each other.
"""

MODULES = arrows.modules()


def test_every_package_has_its_layer() -> None:
    """A new package has to be given one, here and on the page."""
    named = [name for layer in LAYERS for name in layer]
    assert sorted(named) == sorted(arrows.packages())


def test_arrows_point_down() -> None:
    """No package imports one that is above it, or beside it."""
    height = {name: n for n, layer in enumerate(reversed(LAYERS)) for name in layer}
    wrong = [
        (before, after)
        for before, after in arrows.between_packages()
        if height[before] <= height[after]
    ]
    assert wrong == []


def test_the_page_shows_the_arrows_of_the_imports() -> None:
    """``python -m docs.arrows`` draws them."""
    assert arrows.PICTURE.read_text() == arrows.picture()
    assert arrows.tree() in arrows.PAGE.read_text()


FORBIDDEN = {
    "tasks": "klein sqlite3 subprocess treq werkzeug twisted.web",
    "output": "klein sqlite3 subprocess treq werkzeug twisted.web",
    "execution": "klein sqlite3 treq werkzeug twisted.web",
    "storage": "klein subprocess treq werkzeug twisted.web",
    "auth": "klein subprocess werkzeug twisted.web.server twisted.web.resource",
    "config": "klein sqlite3 subprocess treq werkzeug twisted.web",
    "web": "sqlite3 subprocess pulsar_api.storage",
    "web.server": "sqlite3 subprocess pulsar_api.tasks pulsar_api.auth",
    "client": "klein sqlite3 subprocess twisted.web.server twisted.web.resource",
    "shim": "asyncio json logging os subprocess threading twisted typing",
}
"""What a package must not import: others do that for it."""


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_leave_to_others_what_is_not_theirs(package: str) -> None:
    """The core, above all, knows no HTTP, no SQL and no process."""
    prefix = f"pulsar_api.{package}."
    found = [
        (name, imported)
        for name, all_imported in MODULES.items()
        if name.startswith(prefix)
        for imported in all_imported
        for wrong in FORBIDDEN[package].split()
        if f"{imported}.".startswith(f"{wrong}.")
    ]
    assert found == []


def test_only_tap_imports_the_reactor() -> None:
    """Everybody else is given it, or the part of it that is needed."""
    found = [name for name, all in MODULES.items() if "twisted.internet.reactor" in all]
    assert found == ["pulsar_api.tap"]


def test_the_shim_stands_alone() -> None:
    """Each task pays for its start: nothing of ours, nothing that is slow to import."""
    quick = "_ctypes _signal errno fcntl posix resource select sys time".split()
    for name, allowed in (
        ("shim", quick),
        ("launcher", "_signal _socket errno gc posix pulsar_api select sys".split()),
        ("masker", ["ahocorasick_rs", "bisect", "collections"]),
    ):
        imported = MODULES[f"pulsar_api.shim.{name}"]
        assert {module.split(".")[0] for module in imported} <= set(allowed)


TOO_LONG = """
""".split()
"""Modules that still have to become several."""


def test_no_module_is_long() -> None:
    """A reader takes in a module as a whole. The shim stays one file, see the page."""
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / "pulsar_api").rglob("*.py"))
        if (lines := len(path.read_text().splitlines())) > 350
    }
    del long["pulsar_api/shim/shim.py"]
    assert sorted(long) == TOO_LONG


def test_every_module_says_what_it_is_for() -> None:
    """In its first line."""
    for path in (ROOT / "pulsar_api").rglob("*.py"):
        text = path.read_text()
        assert not text or re.match('"""[A-Z`].*[.:]', text), path
