"""Replaces secrets in what a command prints, however it is cut into pieces.

Part of the shim. The launcher imports it once; where a shim has an interpreter of its own,
it does so for a task with secrets.
"""

from bisect import bisect

from ahocorasick_rs import BytesAhoCorasick, Implementation, MatchKind

TYPE_CHECKING = False  # mypy knows the name; to import what has it costs a task 2 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

MASK = b"***"

_HEAD = 16  # bytes of a text that are searched for first
_TOGETHER = 28  # heads that are searched for at once, see `_quick`
_SEARCHES = 48  # of them; more are slower than one for all heads
_START = 4  # bytes by which the begin of a text at the end of the data is found
_TRIES = 64  # see `_begun`
_PIECE = 1 << 17  # bytes in which heads are searched for at a time
_BLOCK = 1 << 14  # bytes that are looked at closely at a time
_WINDOW = 256  # bytes that are looked at first for the begin of a text


def _search(texts: list[bytes], kind: MatchKind) -> BytesAhoCorasick:
    # Not what the library would choose: for long texts a table takes minutes to make.
    return BytesAhoCorasick(
        texts, matchkind=kind, implementation=Implementation.ContiguousNFA
    )


def _quick(heads: list[bytes]) -> BytesAhoCorasick:
    """Return a search for a few short texts that is as fast as memory.

    It looks at 32 bytes at once for 32 texts at most ("Teddy"). If they begin with less
    than four different bytes, or have such in common, the library searches for those
    bytes by themselves, which in base64 are everywhere; so there are four texts more,
    that no stream of text has.
    """
    never = [bytes((0xF8 + n, 0xFC + n)) * 8 for n in range(4)]
    return _search([*heads, *never], MatchKind.LeftmostFirst)


def _begins(texts: set[bytes]) -> dict[bytes, int]:
    """Return of each text how long the longest other one is that it begins with."""
    found: dict[bytes, int] = {}
    outer: list[bytes] = []  # each begins with the one before
    for text in sorted(texts):
        while outer and not text.startswith(outer[-1]):
            outer.pop()
        found[text] = len(outer[-1]) if outer else 0
        outer.append(text)
    return found


def _needed(texts: set[bytes]) -> list[bytes]:
    """Return the texts, in order, without those that others hide anyway.

    Where a text begins with a shorter one and ends with a shorter one, and these overlap,
    both are found and become one mask, which is that of the text. So of all lengths of
    one letter, say, the shortest is enough.
    """
    begins = _begins(texts)
    ends = _begins({text[::-1] for text in texts})
    return [text for text in begins if begins[text] + ends[text[::-1]] <= len(text)]


class Masker:
    """Replaces every occurrence of some texts in one stream.

    Those that overlap become one ``***``; what lies beside them stays as it is. What may
    be the begin of a text is held back: fewer bytes than the longest text has.
    """

    def __init__(self, texts: list[bytes]) -> None:
        self.texts = _needed(set(texts))
        self.longest = max(map(len, self.texts))
        heads: list[bytes] = []
        for text in self.texts:
            if not heads or not text.startswith(heads[-1]):
                heads.append(text[:_HEAD])
        some = range(0, len(heads), _TOGETHER)
        self.quick = [_quick(heads[at : at + _TOGETHER]) for at in some[:_SEARCHES]]
        if len(some) > _SEARCHES:
            self.quick = [_search(heads, MatchKind.LeftmostFirst)]
        self.exact: BytesAhoCorasick | None = None  # made when something is found
        starts = {text[:_START] for text in self.texts if len(text) > _START}
        self.start = _search(sorted(starts), MatchKind.Standard)
        self.shorter = {
            text[:n] for text in self.texts for n in range(1, min(_START, len(text)))
        }
        self.held = b""
        self.covered = 0  # how many bytes of that are behind a mask already

    def feed(self, data: bytes) -> bytes:
        """Return what is certain by now, with the masks in it."""
        data = self.held + data
        return self._mask(data, len(data) - self._begun(data))

    def close(self) -> bytes:
        """Return what was held back: nothing comes any more."""
        return self._mask(self.held, len(self.held))

    def _begun(self, data: bytes) -> int:
        """Return how many bytes at the end of the data may be the begin of a text.

        Rarely more than are: if nearly the begin of one comes again and again, it is not
        looked for more than `_TRIES` times, as that would take the square of its length.
        """
        at, step, tries = max(0, len(data) - self.longest + 1), _WINDOW, 0
        while at < len(data):
            part = data[at : at + step + _START - 1]
            for _, start, _ in self.start.find_matches_as_indexes(part, overlapping=True):
                begun = data[at + start :]
                # If any begins with it, the next one in order does.
                place = bisect(self.texts, begun)
                near = self.texts[place : place + 1]
                if tries == _TRIES or (near and near[0].startswith(begun)):
                    return len(begun)
                tries += 1
            at += step
            step *= 2  # the first one that is found is the longest; most have it soon
        for length in range(min(_START, self.longest, len(data) + 1) - 1, 0, -1):
            if data[-length:] in self.shorter:
                return length
        return 0

    def _mask(self, data: bytes, keep: int) -> bytes:
        """Return the first bytes of the data as they can be shown, and hold the others."""
        end = self.covered
        pieces = []
        for start, stop in self._spans(data):
            if start >= keep:
                break
            if start >= end:
                pieces += [data[end:start], MASK]
            end = max(end, stop)
        self.covered = max(0, end - keep)
        self.held = data[keep:]
        pieces.append(data[end:keep])
        return b"".join(pieces)

    def _spans(self, data: bytes) -> "Iterator[tuple[int, int]]":
        """Yield where in the data texts begin and end, in order."""
        view = memoryview(data)
        for at in range(0, len(data), _PIECE):
            part = view[at : at + _PIECE + _HEAD - 1]
            heads = [
                (start, end)
                for quick in self.quick
                for _, start, end in quick.find_matches_as_indexes(part)
                if start < _PIECE
            ]
            for first, last in self._regions(sorted(heads)):
                yield from self._texts(data, at + first, at + min(last, _PIECE))

    def _texts(self, data: bytes, first: int, last: int) -> "Iterator[tuple[int, int]]":
        """Yield the spans of all texts that begin between two places, in order."""
        if self.exact is None:
            self.exact = _search(self.texts, MatchKind.Standard)
        step = max(_BLOCK, self.longest)
        for at in range(first, last, step):
            stop = min(at + step, last)
            block = data[at : stop - 1 + self.longest]
            matches = self.exact.find_matches_as_indexes(block, overlapping=True)
            yield from sorted((at + a, at + b) for _, a, b in matches if at + a < stop)

    def _regions(self, heads: list[tuple[int, int]]) -> "Iterator[tuple[int, int]]":
        """Yield where all texts begin that are in the data, from some byte to another.

        A search for heads finds none that overlaps with the one before. So a text begins
        with a head that was found, or inside of one.
        """
        first = last = 0
        for start, end in heads:
            if start > last + self.longest:
                if last:
                    yield first, last
                first = start
            elif not last:
                first = start
            last = max(last, end)
        if last:
            yield first, last


def masked(data: bytes, texts: tuple[bytes, ...]) -> bytes:
    """Return the data with the texts masked."""
    if not texts:
        return data
    masker = Masker(list(texts))
    return masker.feed(data) + masker.close()
