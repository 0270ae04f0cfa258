"""Tests with real shells, which print secrets in every form that they have."""

import random
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from pulsar_api.shim.masker import Masker
from pulsar_api.tasks.secret_forms import forms

# Every byte but NUL, alone or in a UTF-8 character, and characters with an odd form.
CHARACTERS = [*map(chr, range(1, 256)), *"日😀\u0378\u200b\u2028\ufeff\U000e0001"]


def _around(character: str, number: int) -> Iterator[str]:
    """Yield values with a character among many others, between two marks."""
    begin, end = f"M{number}x", f"y{number}M"
    yield f"{begin}{character}{end}"
    yield f"{character}{begin} {end}{character}"
    yield f"{begin}{character * 2}7{end}"
    yield f"{begin}'{character}'{character}''{end}"
    yield f"'{character}{begin}\x1b{character}\x07 \x7f{character}{end}'"
    yield f'"{begin}:{character}=~{character}ü"$x`{character}\\{end}"'
    yield f"#{begin}\n{character}\t{character}é{end}~"


def _values() -> Iterator[str]:
    for n, character in enumerate(CHARACTERS):
        for m, value in enumerate(_around(character, 1000 + n)):
            # Each has a mark of its own: the numbers of the character and of the value.
            yield re.sub(
                r"M(\d+)x", rf"M\g<1>{m}x", re.sub(r"y(\d+)M", rf"y\g<1>{m}M", value)
            )
    some = random.Random(1)
    for n in range(300):
        inner = "".join(some.choices([*CHARACTERS, *"''\\\"$!~ \n"], k=some.randint(1, 12)))
        yield f"{some.choice(CHARACTERS)}M9{n:03}x{inner}y9{n:03}M{some.choice(CHARACTERS)}"


VALUES = list(_values())
MARKS = re.compile(rb"M\d+x|y\d+M")
EACH = "for V do {}; done"
VARIABLES = "set", "export -p"
TRACED = "set -x; " + EACH.format(': "$V"; W=$V; case $V in a) ;; esac')
QUOTED = EACH.format("printf '%q\\n' \"$V\"")
SHELLS = {
    "bash": (
        *VARIABLES,
        "declare -p",
        "set -o posix; set",
        TRACED,
        QUOTED,
        EACH.format('echo "${V@Q}" "${V@A}"'),
        'declare -a A=("$@"); declare -p A',
        EACH.format('[[ $V == x ]]; alias "v=$V"; alias; trap -- "$V" USR1; trap'),
    ),
    "dash": (*VARIABLES, TRACED, EACH.format('alias "v=$V"; alias')),
    "zsh": (*VARIABLES, "typeset -p", TRACED, QUOTED, 'A=("$@"); typeset -p A'),
    "busybox": (*VARIABLES, TRACED, EACH.format('alias "v=$V"; alias')),
    "GNU": (EACH.format("env printf '%q\\n' \"$V\""),),
}
START = {"zsh": ("zsh", "-f"), "busybox": ("busybox", "sh"), "GNU": ("sh",)}


@pytest.fixture(scope="module")
def masker() -> Masker:
    """Return a masker for all of the values."""
    return Masker(list(forms(VALUES)))


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize(
    ("shell", "script"),
    [
        pytest.param(
            *(shell, script),
            marks=[] if shell == "GNU" else pytest.mark.needs(shell),
        )
        for shell in SHELLS
        for script in SHELLS[shell]
    ],
)
def test_every_form_in_which_a_shell_prints_a_secret_is_masked(
    masker: Masker, shell: str, script: str, locale: str
) -> None:
    """The secret has any bytes, next to any others, in a UTF-8 locale and in ASCII."""
    program, *options = START.get(shell, (shell,))
    path = shutil.which(program)
    assert path is not None
    printed = b""
    some = VALUES if shell != "GNU" else VALUES[::9]
    for at in range(0, len(some), 1000):
        part = some[at : at + 1000]
        done = subprocess.run(
            [path, *options, "-c", script, "x", *part],
            env={"PATH": "/usr/bin:/bin", "LC_ALL": locale}
            | {f"V{n}": value for n, value in enumerate(part)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        printed += done.stdout + done.stderr
    marks = {mark for value in some for mark in MARKS.findall(value.encode())}
    assert marks <= set(MARKS.findall(printed))
    seen = masker.feed(printed) + masker.close()
    left = [line[:200] for line in seen.split(b"\n") if MARKS.search(line)]
    assert left == [], f"{len(left)} of {len(some)}"
