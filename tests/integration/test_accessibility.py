"""Accessibility of the page: the findings of axe, and the fit on each screen."""

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
def test_view_is_accessible_and_fits_each_screen(shown: Stage, axe: str, name: str) -> None:
    """The smallest is a phone of 320 pixels. Axe checks light and dark colours."""
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


def test_axe_reports_low_contrast(shown: Stage, axe: str) -> None:
    """It proves that axe runs and checks the page."""
    VIEWS["list"](shown)
    shown.driver.execute_script(axe)
    shown.driver.execute_script("document.querySelector('h1').style.color = '#ddd'")
    shown.look(1440)
    assert [rule for rule, _ in shown.driver.execute_async_script(AXE)] == [
        "color-contrast"
    ]


def test_reduced_motion_stops_all_animations(shown: Stage) -> None:
    """Without that preference the icon of a running task pulses."""
    moving = "return document.getAnimations().length"
    shown.look(1440)
    VIEWS["list"](shown)
    assert shown.driver.execute_script(moving) > 0
    shown.look(1440, still=True)
    VIEWS["list"](shown)
    assert shown.driver.execute_script(moving) == 0
