"""The speed of the page: ``python -m benchmarks.page``.

A real Chromium measures by its own clocks. Where there is a bare page, its figure from the
same browser stands next to ours. The bare pages are one document with all rows, the lines
of an ``EventSource`` as one element each, and the whole log in one ``<pre>``.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median, quantiles
from threading import Thread
from typing import Any

from attrs import define, field
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.support.wait import WebDriverWait

from benchmarks.client import Connection
from benchmarks.place import Place, create, finished, place, program
from tests.integration.browser import chromium
from tests.integration.daemon import Daemon

TASKS = 100
LINES = 100
"""Lines whose delay to the screen is measured."""
LOGS = (200_000, 1_000_000)
SCROLLING = 4.0
"""Seconds of turning the wheel."""
JUMPS = 20
PATIENCE = 120

Row = tuple[str, float, float | None, float | None, str]
"""Name, ours, bare, upper limit, unit."""

# Milliseconds from the start of the navigation to the frame in which a condition holds.
SEEN = """
(() => {
  const there = () => {CONDITION};
  const look = () => {
    if (window.seen || !document.body || !there()) return;
    watch.disconnect();
    requestAnimationFrame(() => setTimeout(() => { window.seen = performance.now(); }));
  };
  const watch = new MutationObserver(look);
  watch.observe(document, { subtree: true, childList: true, attributes: true });
  document.addEventListener('scroll', look, true);
  addEventListener('load', look);
})();
"""
ROWS = f"document.querySelectorAll('.tasks li').length >= {TASKS}"
LAST = """(() => {
  const place = document.querySelector('.log')?.getBoundingClientRect();
  const row = [...document.querySelectorAll('.row')].at(-1)?.getBoundingClientRect();
  return row && document.querySelector('[data-n="COUNT"]')
    && row.top >= place.top - 1 && row.bottom <= place.bottom + 1;
})()"""

# Milliseconds from the time in a line to the frame that shows the line.
CLOCK = """
window.late = new Map();
new MutationObserver((found) => {
  for (const { addedNodes } of found) for (const node of addedNodes) {
    const said = /^\\d{19}$/.exec((node.querySelector?.('.t') ?? node).textContent?.trim());
    if (!said || window.late.has(said[0])) continue;
    window.late.set(said[0], null);
    requestAnimationFrame(() => window.late.set(said[0],
      performance.timeOrigin + performance.now() - Number(BigInt(said[0]) / 1000n) / 1000));
  }
}).observe(document.body, { subtree: true, childList: true });
"""
FRAMES = """
window.frames_ = [];
window.looking = true;
let before = performance.now();
requestAnimationFrame(function frame(now) {
  window.frames_.push(now - before);
  before = now;
  if (window.looking) requestAnimationFrame(frame);
});
"""
# Jump to a place, and return the milliseconds to the frame in which rows are there.
JUMP = """
const [log, part, done] = arguments;
const it = log ? document.querySelector('.log') : document.documentElement;
const began = performance.now();
it.scrollTop = it.scrollHeight * part;
requestAnimationFrame(function look() {
  const { top, height } = it.getBoundingClientRect();
  const middle = document.elementFromPoint(200, log ? top + height / 2 : innerHeight / 2);
  if (!log || middle?.closest('.row')) setTimeout(() => done(performance.now() - began));
  else requestAnimationFrame(look);
});
"""
BARE_LINES = """<!doctype html><title>bare</title><body><script>
new EventSource('/events').onmessage = (event) => {
  const line = document.createElement('div');
  line.textContent = event.data;
  document.body.append(line);
};
</script>"""


@define
class Bare:
    """The responses of the bare server: bodies, and a command's output at ``/events``."""

    command: list[str]
    pages: dict[str, bytes] = field(factory=dict)
    port: int = 0

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """Return the class that handles requests."""
        bare = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                if self.path == "/events":
                    self.send_header("Content-Type", "text/event-stream")
                    self.end_headers()
                    with subprocess.Popen(bare.command, stdout=subprocess.PIPE) as process:
                        assert process.stdout is not None
                        with suppress(BrokenPipeError, ConnectionResetError):
                            for line in process.stdout:
                                self.wfile.write(b"data: " + line + b"\n")
                        process.kill()
                    return
                body = bare.pages.get(self.path, b"")
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

        return Handler


@contextmanager
def serving(bare: Bare) -> Iterator[Bare]:
    """Serve bare pages from a thread of this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), bare.handler())
    server.daemon_threads = True
    bare.port = server.server_port
    Thread(target=server.serve_forever, daemon=True).start()
    yield bare
    server.shutdown()
    server.server_close()


@define
class Browser:
    """The browser, and the questions that it answers."""

    driver: Chrome

    def screen(self, height: int) -> None:
        """Set the height of the screen."""
        screen = {"width": 1440, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def seen(self, url: str, condition: str, **cache: bool) -> float:
        """Open a page, and return the milliseconds until the condition holds."""
        source = {"source": SEEN.replace("{CONDITION}", condition)}
        command = self.driver.execute_cdp_cmd
        script = command("Page.addScriptToEvaluateOnNewDocument", source)
        command("Network.enable", {})
        command("Network.setCacheDisabled", {"cacheDisabled": cache.get("cold", False)})
        try:
            self.driver.get("about:blank")
            self.driver.get(url)
            return float(self.value("window.seen"))
        finally:
            command("Page.removeScriptToEvaluateOnNewDocument", script)

    def value(self, expression: str) -> Any:
        """Wait until an expression is true, and return its value."""
        wait = WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05)
        return wait.until(lambda d: d.execute_script(f"return {expression}"), expression)

    def metrics(self) -> tuple[float, float]:
        """Return the megabytes of JavaScript's heap in use, and the number of elements."""
        command = self.driver.execute_cdp_cmd
        command("HeapProfiler.collectGarbage", {})
        command("Performance.enable", {})
        metrics = command("Performance.getMetrics", {})["metrics"]
        heap = next(m["value"] for m in metrics if m["name"] == "JSHeapUsedSize")
        nodes = self.driver.execute_script("return document.querySelectorAll('*').length")
        return heap / 1e6, nodes

    def wheel(self) -> tuple[float, float]:
        """Turn the wheel; return the frames per second and the longest frame."""
        self.driver.execute_script(FRAMES)
        until = time.monotonic() + SCROLLING
        step = {"type": "mouseWheel", "x": 600, "y": 500, "deltaX": 0}
        while time.monotonic() < until:
            self.driver.execute_cdp_cmd(
                "Input.dispatchMouseEvent",
                {**step, "deltaY": -random.choice((100, 400, 1200))},
            )
        found = self.driver.execute_script("window.looking = false; return window.frames_")
        frames = [float(one) for one in found][1:]
        return 1000 * len(frames) / sum(frames), max(frames)

    def jumps(self, *, log: bool) -> list[float]:
        """Jump to random places; return the milliseconds until each showed rows."""
        self.driver.set_script_timeout(PATIENCE)
        return [
            float(self.driver.execute_async_script(JUMP, log, random.random()))
            for _ in range(JUMPS)
        ]


def a_list(browser: Browser, daemon: Daemon, bare: Bare, loads: int) -> list[Row]:
    """Measure the time of the list, and the bytes that it loads."""
    client = Connection(daemon.port)
    for _ in range(TASKS):
        finished(client, create(client, "true"))
    client.close()
    browser.screen(TASKS * 45)  # high enough for all tasks
    page = f"{daemon.base}/web/"
    first = browser.seen(page, ROWS, cold=True)
    html = browser.driver.execute_script("return document.querySelector('main').outerHTML")
    sizes = dict(
        browser.driver.execute_script(
            "return performance.getEntries().filter((one) => one.transferSize)"
            ".map((one) => [one.name, one.transferSize])"
        )
    )
    files = sum(size for name, size in sizes.items() if "/pulsar/" in name or name == page)
    css = Path(__file__).parents[1] / "pulsar_api" / "ui" / "style.css"
    bare.pages["/list"] = f"<style>{css.read_text()}</style>{html}".encode()
    ours, cold, other = [], [], []
    for _ in range(loads):
        ours.append(browser.seen(page, ROWS))
        cold.append(browser.seen(page, ROWS, cold=True))
        other.append(browser.seen(f"http://localhost:{bare.port}/list", ROWS))
    print(f"the very first load took {first:.0f} ms", file=sys.stderr)
    return [
        (f"list of {TASKS} tasks, cache warm", median(ours), median(other), 300, "ms"),
        (f"list of {TASKS} tasks, cache empty", median(cold), median(other), 300, "ms"),
        ("files of the page", files / 1000, None, 100, "KB"),
        (f"all that is loaded, {TASKS} tasks", sum(sizes.values()) / 1000, None, 100, "KB"),
    ]


def lines(browser: Browser, daemon: Daemon, bare: Bare) -> list[Row]:
    """Measure the delay of a line to the screen."""
    browser.screen(900)
    found = []
    for url in ("", f"http://localhost:{bare.port}/lines"):
        if url:
            browser.driver.get(url)
        else:
            client = Connection(daemon.port)
            number = create(client, "clock")
            client.close()
            browser.driver.get(f"{daemon.base}/web/job/{number}")
            browser.value("document.querySelector('.row')")
        browser.driver.execute_script(CLOCK)
        browser.value(f"window.late.size >= {LINES}")
        late = browser.value("[...window.late.values()].filter((one) => one !== null)")
        # Lines from before the observer started have no delay to measure.
        found.append([float(one) for one in late[10:]])
    ours, other = found
    p99 = [quantiles(side, n=100)[98] for side in found]
    return [
        ("line to screen, p50", median(ours), median(other), 150, "ms"),
        ("line to screen, p99", p99[0], p99[1], None, "ms"),
    ]


def a_log(browser: Browser, daemon: Daemon, bare: Bare, count: int) -> list[Row]:
    """Measure a long log."""
    browser.screen(900)
    client = Connection(daemon.port)
    number = create(client, f"rows{count}")
    finished(client, number)
    client.close()
    text = daemon.get(f"/task/{number}/log").body
    bare.pages["/log"] = (
        b"<!doctype html><pre>" + text + b"</pre><i id=end></i>"
        b"<script>scrollTo(0, document.body.scrollHeight)</script>"
    )
    pages = (
        (f"{daemon.base}/web/job/{number}", LAST.replace("COUNT", str(count))),
        (f"http://localhost:{bare.port}/log", "document.querySelector('#end')"),
    )
    columns: list[list[float | None]] = []
    for url, condition in pages:
        print(f"{count:,} lines: {url} ...", file=sys.stderr)
        loads = 5 if count < 500_000 else 1 if columns else 3  # bare takes a minute
        column: list[float | None] = []
        columns.append(column)
        try:
            column.append(median(browser.seen(url, condition) for _ in range(loads)))
            before = browser.metrics()
            frames = browser.wheel()
            jumps = browser.jumps(log=url == pages[0][0])
            column += [*before, *browser.metrics(), *frames, median(jumps), max(jumps)]
        except WebDriverException as e:
            if len(columns) == 1:
                raise
            print(f"the bare page has failed: {e.msg}", file=sys.stderr)
            column += [None] * (9 - len(column))
    names = (
        ("last line seen", "ms"),
        ("heap", "MB"),
        ("elements", ""),
        ("heap after scrolling", "MB"),
        ("elements after scrolling", ""),
        ("frames while scrolling", "1/s"),
        ("longest frame", "ms"),
        ("jump, median", "ms"),
        ("jump, longest", "ms"),
    )
    return [
        (f"{count:,} lines: {name}", ours, other, None, unit)
        for (name, unit), ours, other in zip(names, *columns, strict=True)
        if ours is not None
    ]


def run(here: Place, loads: int, logs: Sequence[int]) -> list[Row]:
    """Measure the whole page."""
    here.link("true", "/bin/true")
    clock = program("clock", str(LINES + 20))
    here.action("clock", *clock)
    for count in logs:
        here.action(f"rows{count}", *program("rows", str(count)))
    daemon = here.daemon("--max-requests-per-address", "0")
    with serving(Bare(clock)) as bare, chromium() as driver:
        driver.set_page_load_timeout(PATIENCE)
        bare.pages["/lines"] = BARE_LINES.encode()
        browser = Browser(driver)
        found = a_list(browser, daemon, bare, loads)
        found += lines(browser, daemon, bare)
        for count in logs:
            found += a_log(browser, daemon, bare, count)
        return found


def table(rows: list[Row]) -> str:
    """Return the rows as a table in reStructuredText."""

    def short(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    cells: list[tuple[str, ...]] = [("what", "ours", "bare", "ratio", "below", "unit")]
    for name, ours, bare, below, unit in rows:
        ratio = ours / bare if bare else None
        cells.append(
            (name, short(ours), short(bare), short(ratio), short(below), unit or "-")
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = "  ".join("=" * width for width in widths)
    text = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join([rule, text[0], rule, *text[1:], rule])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.page", description=__doc__)
    parser.add_argument("--loads", type=int, default=20, help="loads of the list [20]")
    parser.add_argument(
        "--lines",
        type=int,
        nargs="*",
        default=LOGS,
        help="lines of the logs [200000 1000000]",
    )
    parser.add_argument("--folder", type=Path, help="folder for the temporary state")
    options = parser.parse_args()
    with place(options.folder) as here:
        rows = run(here, options.loads, options.lines)
    print(table(rows))
    missed = [name for name, ours, _, below, _ in rows if below and ours >= below]
    if missed:
        sys.exit(f"above the limit: {', '.join(missed)}")


if __name__ == "__main__":
    main()
