"""Whether everybody can use the page: what axe finds, and whether it fits each screen."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.stage import VIEWS, Stage, stage

WIDTHS = (390, 1440)

AXE = """
const done = arguments[arguments.length - 1];
axe.run(document, { resultTypes: ['violations'] }).then(
  (found) => done(found.violations.map(({ id, nodes }) => [
    id, nodes.slice(0, 5).map((node) => [node.html.slice(0, 200), node.failureSummary])])),
  (error) => done(String(error)));
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Return a daemon with a task in each state, and a browser."""
    with stage(tmp_path_factory.mktemp("stage")) as made:
        yield made
        assert "Traceback" not in made.daemon.log.read_text()


@pytest.fixture(scope="module")
def axe(npm: Path) -> str:
    """Return the source of axe."""
    return (npm / "node_modules" / "axe-core" / "axe.min.js").read_text()


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_for_everybody(shown: Stage, axe: str, name: str) -> None:
    """It fits the smallest phone, and axe finds nothing, light and dark, phone and desk."""
    found = {}
    for width in (320, *WIDTHS):
        shown.look(width)
        VIEWS[name](shown)
        wide = shown.driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        if width not in WIDTHS:
            continue
        shown.driver.execute_script(axe)
        for dark in (False, True):
            shown.look(width, dark=dark)
            if violations := shown.driver.execute_async_script(AXE):
                found[width, "dark" if dark else "light"] = violations
    assert found == {}


def test_axe_finds_what_is_wrong(shown: Stage, axe: str) -> None:
    """The judge is awake."""
    VIEWS["list"](shown)
    shown.driver.execute_script(axe)
    shown.driver.execute_script("document.querySelector('h1').style.color = '#ddd'")
    shown.look(1440)
    assert [rule for rule, _ in shown.driver.execute_async_script(AXE)] == [
        "color-contrast"
    ]


def test_nothing_moves_for_who_does_not_want_it(shown: Stage) -> None:
    """The sign of a running task beats for all others."""
    moving = "return document.getAnimations().length"
    shown.look(1440)
    VIEWS["list"](shown)
    assert shown.driver.execute_script(moving) > 0
    shown.look(1440, still=True)
    VIEWS["list"](shown)
    assert shown.driver.execute_script(moving) == 0
