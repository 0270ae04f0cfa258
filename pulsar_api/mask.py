"""Replaces secrets in what a command prints, however it is cut into pieces.

Part of the shim, but only the shim of a task with secrets imports it.
"""

import _ctypes

MASK = b"***"

_HEAD = 48  # bytes that are searched for; of longer ones the search is slower
_SHARED = 24  # bytes with which two texts must begin to be searched for together
_TRIES = 64  # see `_begun`
_PERIODS = 64  # see `_period`; it has to be quick with long texts
_LARGE = 4096  # bytes from which on a call of C is worth its price


class _Size(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "L"


class _Bytes(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "z"


class _Address(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "P"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL
    _argtypes_ = (_Bytes, _Size, _Bytes, _Size)
    _restype_ = _Address


# memmem(3), two to four times as fast as `bytes.find`.
_memmem = _Function(_ctypes.dlsym(_ctypes.dlopen(None, 0), "memmem"))  # type: ignore[arg-type]


def _holds(data: bytes, text: bytes) -> bool:
    """Return whether a text is somewhere in the data; perhaps not, if that is small."""
    if len(data) < _LARGE:
        return True
    return _memmem(data, len(data), text, len(text)) is not None


def _period(text: bytes) -> int:
    """Return by how few bytes a text can be moved to lie on itself; 0 if by none."""
    for step in range(1, min(len(text) // 2, _PERIODS) + 1):
        if text.startswith(text[step:]):
            return step
    return 0


def _begun(text: bytes, data: bytes) -> int:
    """Return how many bytes at the end of the data may be the begin of a text.

    Rarely more than are: if nearly the begin of it comes again and again, it is not looked
    for longer than `_TRIES` times, as that would take the square of its length.
    """
    size = len(data)
    at = data.find(text[:4], max(0, size - len(text) + 1))
    for _ in range(_TRIES):
        if at < 0:
            break
        if text.startswith(data[at:]):
            return size - at
        at = data.find(text[:4], at + 1)
    if at >= 0:
        return size - at
    for length in range(min(3, len(text) - 1), 0, -1):
        if data.endswith(text[:length]):
            return length
    return 0


class _Family:
    """Texts that begin alike: one search finds them all."""

    def __init__(self, text: bytes) -> None:
        self.period = _period(text)
        self.head = text if self.period else text[:_HEAD]
        self.members = [text]

    def take(self, text: bytes) -> bool:
        """Take a text that comes after the others in order, if it begins as they do."""
        if self.period or _period(text):
            return False
        same = len(self.head)
        while not text.startswith(self.head[:same]):
            same -= 1
        if same < min(_SHARED, len(self.members[0])):
            return False
        self.head = self.head[:same]
        self.members.append(text)
        return True

    def spans(self, data: bytes) -> list[tuple[int, int]]:
        """Return where in the data members begin and end."""
        found: list[tuple[int, int]] = []
        if not _holds(data, self.head):
            return found
        at = data.find(self.head)
        while at >= 0:
            again = at + 1
            if self.period:
                # "aaaa" in a thousand "a": one span, not a thousand.
                end = at + len(self.head)
                while data.startswith(self.head[-self.period :], end):
                    end += self.period
                again = end - len(self.head) + 1
                found.append((at, end))
            else:
                fit = [len(one) for one in self.members if data.startswith(one, at)]
                if fit:
                    found.append((at, at + max(fit)))
            at = data.find(self.head, again)
        return found


class Masker:
    """Replaces every occurrence of some texts in one stream.

    Those that overlap become one ``***``; what lies beside them stays as it is. What may
    be the begin of a text is held back: fewer bytes than the longest text has.
    """

    def __init__(self, texts: list[bytes]) -> None:
        self.texts = sorted(set(texts))
        self.families: list[_Family] = []
        self.held = b""
        self.covered = 0  # how many bytes of that are behind a mask already
        for text in self.texts:
            if not self.families or not self.families[-1].take(text):
                self.families.append(_Family(text))

    def feed(self, data: bytes) -> bytes:
        """Return what is certain by now, with the masks in it."""
        data = self.held + data
        return self._mask(data, len(data) - max(_begun(text, data) for text in self.texts))

    def close(self) -> bytes:
        """Return what was held back: nothing comes any more."""
        return self._mask(self.held, len(self.held))

    def _mask(self, data: bytes, keep: int) -> bytes:
        """Return the first bytes of the data as they can be shown, and hold the others."""
        end = self.covered
        pieces = []
        spans = [span for family in self.families for span in family.spans(data)]
        for start, stop in sorted(spans):
            if start >= keep:
                break
            if start >= end:
                pieces += [data[end:start], MASK]
            end = max(end, stop)
        self.covered = max(0, end - keep)
        self.held = data[keep:]
        pieces.append(data[end:keep])
        return b"".join(pieces)


def masked(data: bytes, texts: tuple[bytes, ...]) -> bytes:
    """Return the data with the texts masked."""
    if not texts:
        return data
    masker = Masker(list(texts))
    return masker.feed(data) + masker.close()
