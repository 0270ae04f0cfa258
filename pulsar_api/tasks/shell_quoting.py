"""How bash, dash, zsh, busybox and GNU programs quote a text."""

import re
import unicodedata
from collections.abc import Callable, Iterator

_NAMED = dict(zip(b"\a\b\t\n\v\f\r", "abtnvfr", strict=True))
_UNPRINTABLE = frozenset({"Cc", "Zl", "Zp", "Cn"})  # as the C library's iswprint says


class _Table(dict[int, str]):
    """Maps the code of each character to its quoted form, for `str.translate`.

    ``plain`` has the ASCII characters that get a backslash. ``odd`` returns the form of an
    unprintable character, from its code and its bytes in UTF-8.
    """

    def __init__(self, plain: str, odd: Callable[[int, bytes], str]) -> None:
        super().__init__({n: chr(n) for n in range(32, 127)})
        self.update({ord(character): f"\\{character}" for character in plain})
        self.update({n: odd(n, bytes((n,))) for n in (*range(32), 127)})
        self.odd = odd
        self.ascii_only = {**self, **{n: odd(n, bytes((n,))) for n in range(128, 256)}}

    def __missing__(self, code: int) -> str:
        # Do not store the result: there are a million characters.
        character = chr(code)
        odd = unicodedata.category(character) in _UNPRINTABLE
        return self.odd(code, character.encode()) if odd else character

    def written(self, text: str) -> Iterator[bytes]:
        """Yield a text as quoted in a UTF-8 locale, and as quoted in an ASCII locale."""
        yield text.translate(self).encode()
        if not text.isascii():
            coded = text.encode().decode("latin-1")
            yield coded.translate(self.ascii_only).encode("latin-1")


def _octal(data: bytes, escape: str = "\\033") -> str:
    names = {code: f"\\{name}" for code, name in _NAMED.items()} | {27: escape}
    return "".join(names.get(byte, f"\\{byte:03o}") for byte in data)


def _caret(code: int) -> str:
    """Return an unprintable byte as zsh writes it, in caret notation."""
    if code >= 128:
        return f"\\M-{_caret(code - 128)}"
    if code in {9, 10}:
        return f"\\{_NAMED[code]}"
    return chr(code) if 32 <= code < 127 else f"\\C-{chr(code ^ 64)}"


def _zsh_odd(code: int, _: bytes) -> str:
    if code < 256:
        return _caret(code)
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


# The form $'...' in bash and in zsh.
_BASH = _Table("\\'", lambda _, data: _octal(data, "\\E"))
_ZSH = _Table("\\'", _zsh_odd)
# The output of printf %q in zsh and in GNU, with marks where `quoted` sets quotes.
_ZSH_Q = _Table(" \"#$&'()*;<>?[\\]^`{|}", lambda _, data: f"$'{_octal(data)}'")
_GNU = _Table("", lambda _, data: f"\0{_octal(data)}\1")

_DOUBLE = str.maketrans({character: f"\\{character}" for character in '\\"$`'})
_BASH_Q = str.maketrans({c: f"\\{c}" for c in " !\"$&'()*,;<>?[\\]^`{|}"})


def quoted(text: str) -> Iterator[bytes]:
    """Yield a text as shells quote it, without the outer quotes.

    The forms are those of ``set``, ``export -p``, ``declare -p``, ``printf %q``,
    ``${x@Q}`` and ``set -x``, and of the error messages of ``ls`` and other GNU programs.
    """
    yield text.replace("'", "'\\''").encode()
    # Several quotes in a row, as dash and busybox and as zsh write them. Quotes at either
    # end merge with the outer quotes.
    dash = re.sub("'+", lambda found: f"'\"{found[0]}\"'", text)
    yield dash.removesuffix("'").encode()
    zsh = re.sub("'+", lambda found: "'" + "\\'" * len(found[0]) + "'", text)
    yield zsh.removeprefix("'").removesuffix("'").encode()
    # When zsh traces "for" and "case", it prints these bytes in its internal encoding.
    yield re.sub(b"[\x83-\xa2]", lambda it: bytes((0x83, it[0][0] ^ 32)), text.encode())
    yield text.translate(_DOUBLE).encode()
    yield re.sub("(?<=[:=])~", r"\\~", text.translate(_BASH_Q)).encode()
    for table in (_BASH, _ZSH, _ZSH_Q):
        yield from table.written(text)
    for written in _GNU.written(text.replace("'", "'\\''")):
        # Several unprintable characters in a row share one pair of quotes.
        runs = written.replace(b"\1\0", b"").replace(b"\0", b"'$'")
        runs = runs.removeprefix(b"'$'")  # at the beginning this prefix may be cut
        yield runs.removesuffix(b"\1").replace(b"\1'", b"'").replace(b"\1", b"''")
