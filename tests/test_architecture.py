"""Tests of the architecture: the allowed imports between packages."""

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
    """A new package must be added here and on the page."""
    named = [name for layer in LAYERS for name in layer]
    assert sorted(named) == sorted(arrows.packages())


def test_arrows_point_down() -> None:
    """No package imports one above it or beside it."""
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
"""Modules that a package must not import, because another package uses them for it."""


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_do_not_import_what_others_provide(package: str) -> None:
    """Above all, the core knows no HTTP, no SQL and no processes."""
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
    """All other modules receive it, or the part that they need."""
    found = [name for name, all in MODULES.items() if "twisted.internet.reactor" in all]
    assert found == ["pulsar_api.tap"]


def test_the_shim_imports_few_modules() -> None:
    """Each task pays for the imports of its shim."""
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
"""Modules that still need to be split."""


def test_no_module_is_long() -> None:
    """A module should be readable as a whole. The page says why the shim stays one file."""
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / "pulsar_api").rglob("*.py"))
        if (lines := len(path.read_text().splitlines())) > 350
    }
    del long["pulsar_api/shim/shim.py"]
    assert sorted(long) == TOO_LONG


def test_every_module_has_a_docstring() -> None:
    """Its first line says what the module is for."""
    for path in (ROOT / "pulsar_api").rglob("*.py"):
        text = path.read_text()
        assert not text or re.match('"""[A-Z`].*[.:]', text), path
