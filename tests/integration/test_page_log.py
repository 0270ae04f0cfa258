"""Tests of the log on the page of a task, for any size and any output."""

import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.integration.conftest import Script, Start
from tests.integration.daemon import SHELL, Daemon, wait_for
from tests.integration.page import (
    FROM_END,
    click,
    clipboard,
    fill,
    find,
    latency,
    path,
    rows,
    shows,
    sized,
    status,
    until,
)

# -- the output of tasks

HOSTILE = b"".join(
    [
        b"<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>\n",
        b"\x1b]0;pwned\x07title\n",
        b"\x1b]8;;javascript:alert(1)\x1b\\link\x1b]8;;\x1b\\\n",
        b"a\x1b[2Jb\x1b[Hc\x1b[5Ad\x1b[?1049he\x1bcf\n",
        b"broken \xff\xfe\xc3( utf-8 \xed\xa0\x80\n",
        b"nul \x00 bell \x07 del \x7f\n",
        "right \u202eot tfel\n".encode(),
        b"10%\r50%\r100%\n",
        b"\x1b[31mred\x1b[0m \x1b[1;42mgreen\x1b[m \x1b[38;2;1;2;300mx\x1b[0m\n",
        b"\x1b[" + b"9" * 5000 + b"m\n",
        b"&lt;b&gt; {{constructor}} ${7*7}\n",
        b"x" * (1 << 20) + b"\n",
        b"\r" * (1 << 18) + b"the end\n",
    ]
)


def test_hostile_output_is_shown_as_text(
    browser: Chrome, daemon: Daemon, script: Script, tmp_path: Path
) -> None:
    """It runs no code, changes no title and moves no cursor, and it is complete."""
    (tmp_path / "corpus").write_bytes(HOSTILE)
    script("print", f"#!/bin/sh\ncat {tmp_path}/corpus")
    number = daemon.run("site", "staging", "print")
    daemon.ended(number)
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "the end")
    browser.execute_script(
        "window.broken = []; addEventListener('securitypolicyviolation', "
        "(event) => broken.push(event.blockedURI))"
    )
    assert browser.title.startswith("✓ finished")
    click(browser, ".bar button", "Top")
    until(browser, lambda: rows(browser)[:1] and rows(browser)[0][0] == "1", "the top")
    shown = {int(n): text for n, text in rows(browser) if n}
    assert shown[1] == HOSTILE.splitlines()[0].decode()
    assert shown[2] == "␛]0;pwned␇title"
    assert shown[3] == "␛]8;;javascript:alert(1)␛\\link␛]8;;␛\\"
    assert shown[4] == "a␛[2Jb␛[Hc␛[5Ad␛[?1049he␛cf"
    assert shown[5] == "broken \ufffd\ufffd\ufffd( utf-8 \ufffd\ufffd\ufffd"
    assert shown[6] == "nul ␀ bell ␇ del ␡"
    assert shown[7] == "right \u2039202E\u203aot tfel"
    assert shown[8] == "100%"
    assert shown[9] == "red green x"
    assert shown[10].startswith("␛[9999")
    assert shown[11] == "&lt;b&gt; {{constructor}} ${7*7}"
    red = find(browser, ".row .f1")
    assert red.text == "red"
    assert browser.execute_script("return window.pwned") is None
    assert browser.execute_script("return window.broken") == []
    # Every element in the log is one that the page itself makes.
    names = browser.execute_script(
        "return [...document.querySelectorAll('.log *')].map((element) => element.tagName)"
    )
    assert set(names) == {"DIV", "A", "SPAN"}
    long: list[str] = []

    def walked() -> bool:
        for n, text in rows(browser):
            if n == "12" or (long and not n and set(text) == {"x"}):
                long.append(text)
        return bool(long)

    until(browser, walked, "the line without an end")
    assert max(len(text) for text in long) == 2000


HEAP = """
const log = document.querySelector('.log');
return [log.querySelectorAll('*').length, log.textContent.length];
"""


@pytest.mark.parametrize(
    ("line", "end"),
    [
        (r"\033[2000Gx\n", "x"),
        (r"\033[1mx\033[mx\033[32mx\033[33mx", "xxxx"),
        (r"\t\t\t\t\t\t\033[999C\033[999Cx\033[3Dy\n", "y x"),
    ],
    ids=["cursor", "colours", "tabs"],
)
def test_expensive_output_needs_bounded_memory_in_a_tab(
    browser: Chrome, daemon: Daemon, script: Script, line: str, end: str
) -> None:
    """Blanks, styles and elements have limits for any sequence that asks for them."""
    printer = "BEGIN { while (n < 400000) { printf line; n += length(line) } print last }"
    arguments = f"-v 'line={line}' -v 'last=\\n\\033[mthe end'"
    script("print", f"#!/bin/sh\nawk {arguments} '{printer}'")
    number = daemon.run("site", "staging", "print")
    daemon.ended(number)
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "the end")
    click(browser, ".bar button", "Top")
    until(browser, lambda: rows(browser)[:1] and rows(browser)[0][0] == "1", "the top")
    assert rows(browser)[0][1].endswith(end)
    elements, characters = browser.execute_script(HEAP)
    assert elements < 25_000
    assert characters < 1_000_000
    browser.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
    heap = browser.execute_cdp_cmd("Runtime.getHeapUsage", {})
    assert heap["usedSize"] < 64_000_000
    # The text of a search can match everywhere.
    find(browser, ".find input").send_keys("x", Keys.ENTER)
    find(browser, ".row mark", "x")
    assert browser.execute_script(HEAP)[0] < 25_000


MATCHES = """
const { top, bottom } = document.querySelector('.log').getBoundingClientRect();
return [...document.querySelectorAll('.row')].filter((row) => {
  const box = row.getBoundingClientRect();
  return box.bottom > top && box.top < bottom;
}).map((row) => row.querySelectorAll('mark').length);
"""


def test_visible_matches_are_marked_in_any_number(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """Matches farther away are not marked, which limits the number of elements."""
    matches = 150
    script(
        "many",
        f"#!/bin/sh\nline=$(printf 'ab%.0s' $(seq {matches}))\n"
        'seq 1000 | sed "s/$/ $line/"\necho the end\n',
    )
    number = daemon.run("site", "staging", "many")
    daemon.ended(number)
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "the end")
    # The network is slow, so the box changes its size before the match arrives.
    latency(browser, 700)
    find(browser, ".find input").send_keys("ab", Keys.ENTER)
    find(browser, ".row.marked mark", "ab")
    latency(browser, 0)

    def marked(line: int) -> None:
        def all_marked() -> bool:
            found: list[int] = browser.execute_script(MATCHES)
            numbers = [int(n) for n, _ in rows(browser) if n]
            # The last line has no match.
            all_of_them = len(found) > 3 and found.count(matches) >= len(found) - 1
            return line in numbers and all_of_them

        until(browser, all_marked, f"matches of line {line}")
        assert browser.execute_script(HEAP)[0] < 25_000

    marked(1)
    for line in (500, 700):
        browser.execute_script(f"location.hash = '#L{line}'")
        marked(line)
    # Scroll down over rows whose matches were not marked before.
    for _ in range(8):
        browser.execute_script("document.querySelector('.log').scrollTop += 800")
        marked(720)
    browser.execute_script(
        "const log = document.querySelector('.log'); log.scrollTop = log.scrollHeight"
    )
    marked(1000)


def test_a_log_of_200000_lines_can_be_read_at_any_place(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """It opens at its end, and the page holds only a small part of it."""
    script("huge", "#!/bin/sh\nseq -f 'line %.0f of a huge log' 1 200000")
    number = daemon.run("site", "staging", "huge")
    daemon.ended(number)
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "line 200000 of a huge log")
    assert browser.execute_script(FROM_END) < 5
    log = "document.querySelector('.log')"
    # Go to the middle by the scroll bar.
    browser.execute_script(f"{log}.scrollTop = {log}.scrollHeight / 2")
    until(
        browser,
        lambda: any(80_000 < int(n) < 120_000 for n, _ in rows(browser)),
        "the middle",
    )
    # Scroll up row by row, beyond the loaded part, and see each row.
    seen: set[int] = set()

    def up() -> bool:
        numbers = [int(n) for n, _ in rows(browser)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        seen.update(numbers)
        browser.execute_script(f"{log}.scrollTop -= 1500")
        return max(seen) - min(seen) > 4000

    until(browser, up, "four thousand lines")
    assert len(seen) == max(seen) - min(seen) + 1
    # Go to a line by the address.
    browser.execute_script("location.hash = '#L120-L122'")
    shows(browser, "line 120 of a huge log")
    marked = (
        "return [...document.querySelectorAll('.row.marked .t')].map((r) => r.textContent)"
    )
    want = [f"line {n} of a huge log" for n in (120, 121, 122)]
    until(browser, lambda: browser.execute_script(marked) == want, "the marked lines")
    # Go to a line by a search.
    find(browser, ".find input").send_keys("LINE 15432 of", Keys.ENTER)
    find(browser, ".found", "1 of 1")
    shows(browser, "line 15432 of a huge log")
    assert find(browser, ".row mark").text == "line 15432 of"
    # Go back to the end.
    browser.execute_script(f"{log}.scrollTop = {log}.scrollHeight")
    shows(browser, "line 200000 of a huge log")
    browser.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
    browser.execute_cdp_cmd("Performance.enable", {})
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    heap = {one["name"]: one["value"] for one in metrics}["JSHeapUsedSize"]
    count = browser.execute_script("return document.querySelectorAll('*').length")
    print(f"heap {heap / 1e6:.1f} MB, {count} elements")
    assert heap < 60e6
    assert count < 4000


def test_the_log_stops_following_when_the_user_scrolls_up(
    browser: Chrome, daemon: Daemon, script: Script, tmp_path: Path
) -> None:
    """It follows again when the user comes back to the end."""
    script(
        "talk",
        "#!/bin/sh\nseq 1 100\nn=100\nwhile :; do "
        f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; rm {tmp_path}/go; "
        "n=$((n+1)); echo $n; done",
    )

    def go(line: int) -> None:
        (tmp_path / "go").touch()
        want = f"{line}\n".encode()
        wait_for(lambda: daemon.output_file(number).read_bytes().endswith(want), "a line")

    number = daemon.run("site", "staging", "talk")
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "100")
    until(browser, lambda: browser.execute_script(FROM_END) < 5, "the end")
    go(101)
    shows(browser, "101")
    until(browser, lambda: browser.execute_script(FROM_END) < 5, "the end again")
    browser.execute_script("document.querySelector('.log').scrollTop -= 400")
    button = find(browser, ".resume")
    before = browser.execute_script("return document.querySelector('.log').scrollTop")
    go(102)
    shows(browser, "102")
    assert (
        browser.execute_script("return document.querySelector('.log').scrollTop") == before
    )
    button.click()
    until(browser, lambda: browser.execute_script(FROM_END) < 5, "the end by the button")
    go(103)
    shows(browser, "103")
    until(browser, lambda: browser.execute_script(FROM_END) < 5, "the end that is followed")
    assert not button.is_displayed()


def test_a_flood_of_output_does_not_freeze_the_page(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """A task prints 300 MB at full speed. The page skips to the end."""
    script("flood", "#!/bin/sh\nseq 1 35000000\necho it is over")
    number = daemon.run("site", "staging", "flood")
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "it is over")
    status(browser, "finished")
    assert rows(browser)[-1][0] == "35000001"
    browser.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    heap = {one["name"]: one["value"] for one in metrics}.get("JSHeapUsedSize", 0)
    assert heap < 200e6


def test_the_log_follows_its_end_in_a_box_of_any_size(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """A turned phone or closed details are not a scroll by the user."""
    text = (
        "a line that has to be broken where there is little room for it, which is often so"
    )
    script("much", f"#!/bin/sh\nseq -f '%.0f {text} {text}' 1 900\nexec sleep 600")
    number = daemon.run("site", "staging", "much")
    browser.get(f"{daemon.base}/web/job/{number}")
    last = f"900 {text} {text}"
    shows(browser, last)
    sizes = ((1440, 700), (1440, 1000), (400, 900), (900, 900), (320, 600))
    with sized(browser) as resize:
        for width, height in sizes:
            resize(width, height)
            # Wait until the browser and the page have reacted to the new size.
            browser.execute_async_script(
                "const done = arguments[0]; "
                "requestAnimationFrame(() => requestAnimationFrame(done))"
            )
            until(browser, lambda: browser.execute_script(FROM_END) < 5, "the end")
            assert not browser.find_element(By.CSS_SELECTOR, ".resume").is_displayed()
            shows(browser, last)


def test_empty_lines_are_rows_of_their_own(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """64 KiB of empty lines have more rows than any other text of that size."""
    script("empty", "#!/bin/sh\nyes '' | head -n 400000; echo the end")
    number = daemon.run("site", "staging", "empty")
    daemon.ended(number)
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "the end")
    click(browser, ".bar button", "Top")
    until(browser, lambda: rows(browser)[:2] == [["1", ""], ["2", ""]], "the top")
    browser.execute_script("location.hash = '#L200000'")
    until(browser, lambda: "200000" in [n for n, _ in rows(browser)], "the middle")


def test_an_overwritten_line_is_one_row(
    browser: Chrome, daemon: Daemon, script: Script, tmp_path: Path
) -> None:
    """A progress bar prints megabytes. The page reads them live, and again later."""
    gate = tmp_path / "gate"
    script(
        "progress",
        f"#!/bin/sh\necho begin; while [ ! -e {gate} ]; do sleep 0.02; done\n"
        """awk 'BEGIN { for (i = 0; i < 100000; i++) printf "\\rprogress %d", i }'\n"""
        "echo; echo done",
    )
    number = daemon.run("site", "staging", "progress")
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "begin")
    gate.touch()
    want = [["1", "begin"], ["2", "progress 99999"], ["3", "done"]]
    until(browser, lambda: rows(browser) == want, "one row for it")
    browser.refresh()
    shows(browser, "done")
    click(browser, ".bar button", "Top")
    until(browser, lambda: rows(browser) == want, "one row for it")


def test_a_colour_goes_on_until_it_ends(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """The part of the output that the page loads first does not matter."""
    script("green", "#!/bin/sh\nprintf '\\033[1;32m'; seq 1 40000; printf '\\033[0mplain'")
    number = daemon.run("site", "staging", "green")
    daemon.ended(number)
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "plain")
    for line in ("39999", "20000", "1"):
        browser.execute_script(f"location.hash = '#L{line}'")
        row = find(browser, ".row.marked .t", line)
        assert row.find_elements(By.CSS_SELECTOR, ".bold.f2")


def test_the_view_stays_while_the_middle_is_cut(
    browser: Chrome, start: Start, tmp_path: Path
) -> None:
    """Lines before the cut keep their numbers, and the view keeps its place."""
    gate = tmp_path / "gate"
    daemon = start("--command", SHELL, "--kill-grace=1", "--max-output-size", "1000000")
    number = daemon.sh(
        "seq -f 'line %.0f of some length, as most are' 1 20000; "
        f"while [ ! -e {gate} ]; do sleep 0.02; done; "
        "seq -f 'line %.0f of some length, as most are' 20001 60000; exec sleep 600"
    )
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "line 20000 of some length, as most are")
    browser.execute_script("document.querySelector('.log').scrollTop -= 250000")

    def seen() -> list[str]:
        script = (
            "const top = document.querySelector('.log').getBoundingClientRect().top;"
            "const row = [...document.querySelectorAll('.row')]"
            ".find((row) => row.getBoundingClientRect().bottom > top);"
            "return row && ['.n', '.t'].map((it) => row.querySelector(it))"
            ".map((it) => it.dataset.n ?? it.textContent)"
        )
        found: list[str] = browser.execute_script(script)
        return found

    far_up = "what is far up"
    before = until(
        browser, lambda: (line := seen()) and int(line[0]) < 11_000 and line, far_up
    )
    assert before
    assert before[1] == f"line {before[0]} of some length, as most are"
    asked = (
        "return performance.getEntriesByType('resource')"
        ".filter((one) => one.name.endsWith('/lines?from=0')).length"
    )
    known = browser.execute_script(asked)
    gate.touch()
    cut = wait_for(lambda: daemon.get(f"/task/{number}/lines").json()["cut"], "a cut")
    assert cut[0] > 11_000 * len("line 10000 of some length, as most are\n")
    until(browser, lambda: browser.execute_script(asked) > known, "the page to notice")
    until(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, ".loading"), "it")
    assert until(browser, seen, "a line") == before


def test_a_search_begins_at_the_visible_lines(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """It goes in both directions, wraps around, and has more matches than one response."""
    script("many", "#!/bin/sh\nseq -f 'error %.0f' 1 5000")
    number = daemon.run("site", "staging", "many")
    daemon.ended(number)
    browser.get(f"{daemon.base}/web/job/{number}#L4000")
    until(browser, lambda: ["4000", "error 4000"] in rows(browser), "the line")

    def found(line: int) -> None:
        until(
            browser,
            lambda: find(browser, ".row.marked .n").get_attribute("data-n") == str(line),
            f"line {line}",
        )

    find(browser, ".find input").send_keys("error", Keys.ENTER)
    find(browser, ".found", "line ")
    first = int(find(browser, ".found").text.split()[-1])
    assert 3900 < first <= 4000
    found(first)
    click(browser, ".find [aria-label='Previous match']")
    found(first - 1)
    click(browser, ".find [aria-label='Next match']")
    found(first)
    field = find(browser, ".find input")
    for text, step, line in (
        ("error 4", "Previous match", 4999),
        ("error 50", "Next match", 50),
    ):
        field.clear()
        browser.execute_script("location.hash = ''; location.hash = '#L1'")
        until(browser, lambda: rows(browser)[0][0] == "1", "the first line")
        field.send_keys(text)
        click(browser, f".find [aria-label='{step}']")
        found(line)


def test_a_selection_is_copied_when_it_is_scrolled_away(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """The copy has the empty lines, and no line breaks at the ends of rows."""
    long = "x" * 4500
    script(
        "print",
        f"#!/bin/sh\nprintf 'one\\n\\n\\ntwo {long}\\n\\033[31mred\\033[0m\\n'; seq 6 3000",
    )
    number = daemon.run("site", "staging", "print")
    daemon.ended(number)
    browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]}
    )
    browser.get(f"{daemon.base}/web/job/{number}#L1")
    until(browser, lambda: rows(browser)[:1] == [["1", "one"]], "the first line")
    browser.execute_script(
        "const text = document.querySelector('.row .t').firstChild;"
        "getSelection().setBaseAndExtent(text, 1, text, 1)"
    )
    log = "document.querySelector('.log')"

    def away() -> bool:
        browser.execute_script(f"{log}.scrollTop += 600")
        return rows(browser)[0][0] != "1"

    until(browser, away, "the first line to be no element any more")
    last = browser.execute_script(
        "const last = [...document.querySelectorAll('.row .t')].at(-1);"
        "getSelection().extend(last.firstChild, 2); return last.textContent"
    )
    click(browser, ".bar button", "Copy")
    find(browser, ".copied", "the selection")
    lines = ["ne", "", "", f"two {long}", "red", *map(str, range(6, int(last))), last[:2]]
    assert clipboard(browser) == "\n".join(lines)


def test_a_late_response_does_not_move_the_view(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """The user has gone to another line meanwhile, on a slow network."""
    script("huge", "#!/bin/sh\nseq 1 200000")
    number = daemon.run("site", "staging", "huge")
    daemon.ended(number)
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "200000")
    browser.execute_script("location.hash = '#L5'")
    shows(browser, "5")
    asked = (
        "return performance.getEntriesByType('resource')"
        ".filter((one) => one.name.includes('/pieces?')).length"
    )
    before = browser.execute_script(asked)
    latency(browser, 500)
    try:
        browser.execute_script("location.hash = '#L150000'")
        browser.execute_script("location.hash = '#L6'")
        until(browser, lambda: browser.execute_script(asked) > before, "what comes late")
    finally:
        latency(browser, 0)
    frames = "const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 50))"
    browser.execute_async_script(frames)
    assert find(browser, ".row.marked").text == "6"
    assert rows(browser)[0] == ["1", "1"]


def test_a_task_that_was_left_has_no_open_stream(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """A browser has only six connections for a host."""
    script("long", "#!/bin/sh\nseq 1 100000; exec sleep 600")
    number = daemon.run("site", "staging", "long")
    wait_for(lambda: daemon.task(number)["outputSize"] > 500_000, "its output")
    browser.get(f"{daemon.base}/web/")
    browser.execute_script(
        "window.open_ = new Set(); const Real = EventSource;"
        "window.EventSource = class extends Real {"
        "constructor(url) { super(url); open_.add(this); } "
        "close() { super.close(); open_.delete(this); } }"
    )
    latency(browser, 500)
    asked = (
        "return performance.getEntriesByType('resource')"
        ".filter((one) => one.name.includes(arguments[0])).length"
    )

    def answered(what: str, count: int) -> None:
        ask = f"/task/{number}{what}"
        until(
            browser, lambda: browser.execute_script(asked, ask) >= count, f"{ask} {count}"
        )

    for count in range(1, 4):
        click(browser, ".tasks a")
        answered("?", count)
        browser.back()  # while the next request is under way
        until(browser, lambda: path(browser) == "/web/", "the list")
        answered("/lines?", count)
    latency(browser, 0)
    find(browser, ".tasks .running")
    until(browser, lambda: browser.execute_script("return open_.size") == 1, "one stream")


def test_a_repeated_form_creates_one_task(browser: Chrome, returning: Daemon) -> None:
    """The response is lost.

    The user changes a letter and back, and sends the form again.
    """
    browser.get(f"{returning.base}/web/")
    click(browser, "#run")
    fill(browser, "app", "site")
    fill(browser, "env", "staging")
    fill(browser, "action", "run")
    # The request arrives, and its response is lost.
    browser.execute_script(
        "const real = fetch; let lost = false; window.fetch = async (...all) => {"
        "const answer = await real(...all);"
        "if (!lost && all[1]?.method === 'POST') { lost = true; throw new TypeError(); }"
        "return answer; };"
    )
    click(browser, "dialog button.primary")
    find(browser, "dialog [role=alert]", "cannot be reached")
    find(browser, "dialog [name=env]").send_keys("x", Keys.BACKSPACE)
    click(browser, "dialog button.primary")
    until(browser, lambda: path(browser) == "/web/job/1", "the task")
    assert list(returning.get("/tasks").json()["tasks"]) == ["1"]


def test_lines_behind_a_cut_have_the_numbers_of_the_api(
    browser: Chrome, start: Start, repo: Path, script: Script, tmp_path: Path
) -> None:
    """A page that was open when they were printed has the same numbers."""
    script(
        "much",
        f"#!/bin/sh\nseq 1 100\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.02; done\n"
        "seq 101 400000\nexec sleep 600",
    )
    daemon = start(
        *("--command", "scripts", "--config-repo", str(repo), "--kill-grace", "1"),
        *("--max-output-size", "500000"),
    )
    number = daemon.run("site", "staging", "much")
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "100")
    (tmp_path / "go").touch()
    shows(browser, "400000")

    def line() -> int:
        found = daemon.get(f"/task/{number}/search?text=399990").json()["matches"]
        return int(found[0][0])

    want = wait_for(line, "the line's number")
    assert want < 200_000

    def same() -> bool:
        return [str(want), "399990"] in rows(browser)

    until(browser, same, "the number of the API")
    find(browser, ".find input").send_keys("399990", Keys.ENTER)
    find(browser, ".found", "1 of 1")
    assert find(browser, ".row mark").text == "399990"
    cut = daemon.get(f"/task/{number}/lines").json()["cut"]
    begin = daemon.get(f"/task/{number}/pieces?offset=0&end={cut[0]}").json()
    assert begin["nextOffset"] <= cut[0]


def test_a_search_finds_new_lines_and_text_far_into_a_line(
    browser: Chrome, daemon: Daemon, script: Script, tmp_path: Path
) -> None:
    """The page copies a long line completely."""
    (tmp_path / "line").write_text("begin " + "x" * 500_000 + " Needle end\n")
    script(
        "late",
        f"#!/bin/sh\ncat {tmp_path}/line\nseq 2 200000\n"
        f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done\necho a pearl\nexec sleep 600",
    )
    number = daemon.run("site", "staging", "late")
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "200000")
    field = find(browser, ".find input")
    field.send_keys("pearl", Keys.ENTER)
    find(browser, ".found", "Not found")
    (tmp_path / "go").touch()
    shows(browser, "a pearl")
    field.send_keys(Keys.ENTER)
    find(browser, ".found", "1 of 1")
    field.clear()
    field.send_keys("needle", Keys.ENTER)
    find(browser, ".found", "1 of 1")
    find(browser, ".row mark", "Needle")
    browser.execute_script("location.hash = '#L1'")
    until(browser, lambda: rows(browser)[0][0] == "1", "the first line")
    # After an earlier test has asked for permission to read, the clipboard denies writes.
    # The page then copies as it does without TLS. The browser allows that only within 5
    # seconds of the click, which a busy machine can exceed with this text.
    browser.execute_cdp_cmd("Browser.resetPermissions", {})
    click(browser, ".bar button", "Copy")
    find(browser, ".copied", "marked lines")
    browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]}
    )
    assert clipboard(browser) == (tmp_path / "line").read_text()[:-1]


def test_an_unknown_task_is_reported_once(
    browser: Chrome, start: Start, repo: Path, script: Script
) -> None:
    """The page does not treat it as an unreachable daemon."""
    script("end", "#!/bin/sh\necho done")
    daemon = start(
        *("--command", "scripts", "--config-repo", str(repo), "--keep-tasks", "1")
    )
    first = daemon.run("site", "staging", "end")
    daemon.ended(first)
    browser.get(f"{daemon.base}/web/job/{first + 1000}")
    find(browser, ".empty", str(first + 1000))
    assert not browser.find_element(By.ID, "away").is_displayed()


def test_the_log_has_times_a_copy_and_a_download(
    browser: Chrome, daemon: Daemon, script: Script
) -> None:
    """Times are shown on demand. The download has the raw bytes."""
    script("say", "#!/bin/sh\necho one\nsleep 1.1\necho two\nprintf '\\377'")
    number = daemon.run("site", "staging", "say")
    daemon.ended(number)
    browser.get(f"{daemon.base}/web/job/{number}")
    shows(browser, "two")
    click(browser, ".bar button", "Times")
    times = until(
        browser,
        lambda: [
            t.get_attribute("datetime")
            for t in browser.find_elements(By.CSS_SELECTOR, "time.at")
        ],
        "times",
    )
    log = daemon.get(f"/task/{number}/log?times=1").body.split(b"\n")
    assert [t for t in times if t][:2] == [line[:24].decode() for line in log[:2]]
    link = find(browser, ".bar a").get_attribute("href")
    assert link is not None
    assert daemon.get(urlsplit(link).path).body == b"one\ntwo\n\xff"
    browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]}
    )
    click(browser, ".row .n")
    assert browser.current_url.endswith("#L1")
    click(browser, ".bar button", "Copy")
    find(browser, ".copied", "marked lines")
    assert clipboard(browser) == "one"


# -- terminal sequences

CASES = [
    ("plain\n", ["plain"]),
    ("a\r\nb\r\n", ["a", "b"]),
    ("abc\rX\n", ["Xbc"]),
    ("abc\x1b[2DX\n", ["aXc"]),
    ("abc\r\x1b[Kd\n", ["d"]),
    ("abc\x1b[1Kd\n", ["   d"]),
    ("abc\b\bX\n", ["aXc"]),
    ("a\x1b[5Gb\n", ["a   b"]),
    ("a\x1b[3Cb\n", ["a   b"]),
    ("a\tb\n", ["a       b"]),
    ("\x1b[31mred\n", ["red"]),
    ("\x1b[999999999Cx\n", [" " * 1999 + "x"]),
    ("\x1b[\n", ["␛["]),
    ("end \x1b", ["end ␛"]),
    ("two\n\nthree", ["two", "", "three"]),
    ("x" * 4001, ["x" * 2000, "x" * 2000, "x"]),
    ("😀" * 3 + "\rab\n", ["ab😀"]),
    ("\r\n", [""]),
    ("abc\r\tX\n", ["abc     X"]),
    ("\x1b(B\x1b[?25lx\x1b[?2004h\n", ["x"]),
    ("\x1b[4:3;38:2::255:0:4mx\x1b[4:0m\n", ["x"]),
]
READ = """
const [cases, done] = arguments;
import('/pulsar/terminal.js').then(({ Terminal }) => {
  done(cases.map((pieces) => {
    const terminal = new Terminal(1, true);
    for (const piece of pieces) terminal.feed(piece, 'stdout', 0);
    terminal.flush();
    return terminal.rows.map((row) => row.plain());
  }));
});
"""


def test_a_line_is_read_as_a_terminal_shows_it_in_any_pieces(
    browser: Chrome, many: Daemon
) -> None:
    """The text comes whole, in two pieces cut at each place, and character by character."""
    browser.get(f"{many.base}/web/")
    for text, want in CASES:
        pairs = len(text.encode("utf-16-le")) // 2 == len(text)
        cuts = [[text], list(text)]
        if len(text) < 100 and pairs:
            cuts += [[text[:n], text[n:]] for n in range(len(text))]
        for cut, found in zip(cuts, browser.execute_async_script(READ, cuts), strict=True):
            assert found == want, cut


STYLES = """
const [text, done] = arguments;
import('/pulsar/terminal.js').then(({ Terminal }) => {
  const terminal = new Terminal(1, true);
  terminal.feed(text, 'stdout', 0);
  const pieces = terminal.rows[0].pieces();
  done(pieces.map(([part, { classes, fg, bg }]) => [part, classes, fg, bg]));
});
"""


def test_colours_are_those_of_a_terminal(browser: Chrome, many: Daemon) -> None:
    """The palettes have 16, 256 and 16 million colours. Colons separate parameters too."""
    browser.get(f"{many.base}/web/")
    text = (
        "a\x1b[1;31mb\x1b[22;94mc\x1b[0;42md\x1b[38;5;9;48;5;16me\x1b[m"
        "\x1b[38;2;1;2;999mf\x1b[39m\x1b[4:3;38:2::255:0:4mg\x1b[4:0;39mh\n"
    )
    assert browser.execute_async_script(STYLES, text) == [
        ["a", "", "", ""],
        ["b", "bold f1", "", ""],
        ["c", "f12", "", ""],
        ["d", "b2", "", ""],
        ["e", "f9 bg", "", "rgb(0,0,0)"],
        ["f", "fg", "rgb(1,2,255)", ""],
        ["g", "under fg", "rgb(255,0,4)", ""],
        ["h", "", "", ""],
    ]


def test_the_page_of_a_task_needs_less_than_50_kb(browser: Chrome, many: Daemon) -> None:
    """The browser loads everything from the daemon."""
    browser.get(f"{many.base}/web/job/1")
    status(browser, "finished")
    script = (
        "return performance.getEntriesByType('resource')"
        ".map((one) => [one.name, one.encodedBodySize])"
    )
    loaded = dict(browser.execute_script(script))
    assert all(url.startswith(many.base) for url in loaded)
    parts = {urlsplit(url).path: size for url, size in loaded.items()}
    files = set(os.listdir(Path(__file__).parents[2] / "pulsar_api" / "ui"))
    of_page = {f"/pulsar/{name}" for name in files if not name.endswith(".html")}
    assert of_page - {"/pulsar/login.js"} <= set(parts)
    html = len(many.get("/web/").body)
    sizes = [size for path, size in parts.items() if path.startswith("/pulsar/")]
    assert 2e4 < html + sum(sizes) < 5e4
