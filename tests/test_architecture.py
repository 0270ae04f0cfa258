"""The table of docs/architecture.rst, held against the imports."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pulsar_api

PACKAGE = Path(pulsar_api.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.rst"


def module_files() -> Iterator[tuple[str, Path]]:
    """Yield each module by the name that the table uses."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, path


def imports(path: Path) -> Iterator[str]:
    """Yield what a module imports, with dots, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def table() -> dict[str, set[str]]:
    """Return the table of the page: module to modules."""
    rows = re.findall(
        r"^   \* - ``(\S+)``\n     - .*?\n     - (.*?)(?=^   \*|\Z|^\S)",
        PAGE.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    found = {name: set(re.findall(r"``(\S+?)``", may)) for name, may in rows}
    for name, may in rows:
        if may.strip() == "all":
            found[name] = {"all"}
    return found


TABLE = table()
FILES = dict(module_files())


def test_the_page_has_every_module() -> None:
    """And none that is gone."""
    assert set(TABLE) == set(FILES)


@pytest.mark.parametrize("name", list(FILES))
def test_modules_import_only_what_the_page_says(name: str) -> None:
    """Dependencies point one way."""
    used = set()
    for imported in imports(FILES[name]):
        if not imported.startswith("pulsar_api."):
            continue
        parts = imported.split(".")[1:]
        found = [".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in FILES]
        used |= set(found[:1])
    if TABLE[name] != {"all"}:
        assert used <= TABLE[name]


@pytest.mark.parametrize("name", list(FILES))
def test_only_tap_imports_the_reactor(name: str) -> None:
    """Everybody else is given it, or the part of it that is needed."""
    found = [i for i in imports(FILES[name]) if i == "twisted.internet.reactor"]
    assert found == [] or name == "tap"


CORE = "errors changes background task ports service retention command".split()


@pytest.mark.parametrize("name", CORE)
def test_the_core_knows_no_http_no_sql_and_no_process(name: str) -> None:
    """What it needs of the world it asks for by the ports."""
    for imported in imports(FILES[name]):
        top = imported.split(".")[0]
        assert top not in {"klein", "sqlite3", "subprocess", "treq", "werkzeug", "os"}
        assert not imported.startswith("twisted.web")


def test_the_shim_stands_alone() -> None:
    """Its start is paid by each task: nothing of ours, nothing that is slow to import."""
    quick = "_ctypes _signal errno fcntl posix resource select sys time".split()
    for name, allowed in (
        ("shim", quick),
        ("launcher", "_signal _socket errno gc posix pulsar_api select sys".split()),
        ("mask", ["ahocorasick_rs", "bisect", "collections"]),
    ):
        assert {i.split(".")[0] for i in imports(FILES[name])} <= set(allowed)
