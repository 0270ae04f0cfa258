"""Replaces secrets in what a command prints, however it is cut into pieces.

Part of the shim, but only the shim of a task with secrets imports it.
"""

from bisect import bisect

from ahocorasick_rs import BytesAhoCorasick, Implementation, MatchKind

MASK = b"***"

_HEAD = 16  # bytes of a text that are searched for first
_TOGETHER = 28  # heads that are searched for at once, see `_quick`
_START = 4  # bytes by which the begin of a text at the end of the data is found
_TRIES = 64  # see `_begun`
_BLOCK = 1 << 16  # bytes that are looked at closely at a time


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


class Masker:
    """Replaces every occurrence of some texts in one stream.

    Those that overlap become one ``***``; what lies beside them stays as it is. What may
    be the begin of a text is held back: fewer bytes than the longest text has.
    """

    def __init__(self, texts: list[bytes]) -> None:
        self.texts = sorted(set(texts))
        self.longest = max(map(len, self.texts))
        heads: list[bytes] = []
        for text in self.texts:
            if not heads or not text.startswith(heads[-1]):
                heads.append(text[:_HEAD])
        self.quick = [
            _quick(heads[at : at + _TOGETHER]) for at in range(0, len(heads), _TOGETHER)
        ]
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
        tail = data[max(0, len(data) - self.longest + 1) :]
        matches = self.start.find_matches_as_indexes(tail, overlapping=True)
        for count, (_, at, _) in enumerate(matches):
            begun = tail[at:]
            # If any begins with it, the next one in order does.
            place = bisect(self.texts, begun)
            near = self.texts[place : place + 1]
            if count == _TRIES or (near and near[0].startswith(begun)):
                return len(begun)
        for length in range(min(_START - 1, len(tail)), 0, -1):
            if tail[-length:] in self.shorter:
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

    def _spans(self, data: bytes) -> list[tuple[int, int]]:
        """Return where in the data texts begin and end, in order."""
        heads = [
            (start, end)
            for quick in self.quick
            for _, start, end in quick.find_matches_as_indexes(data)
        ]
        if not heads:
            return []
        if self.exact is None:
            self.exact = _search(self.texts, MatchKind.Standard)
        found: list[tuple[int, int]] = []
        for first, last in self._regions(sorted(heads)):
            for at in range(first, last, max(_BLOCK, self.longest)):
                stop = min(at + max(_BLOCK, self.longest), last)
                block = data[at : stop - 1 + self.longest]
                matches = self.exact.find_matches_as_indexes(block, overlapping=True)
                spans = [(at + a, at + b) for _, a, b in matches if at + a < stop]
                found += sorted(spans)
        return found

    def _regions(self, heads: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return where all texts begin that are in the data, from some byte to another.

        A search for heads finds none that overlaps with the one before. So a text begins
        with a head that was found, or inside of one.
        """
        regions: list[tuple[int, int]] = []
        for start, end in heads:
            if regions and start <= regions[-1][1] + self.longest:
                regions[-1] = (regions[-1][0], max(end, regions[-1][1]))
            else:
                regions.append((start, end))
        return regions


def masked(data: bytes, texts: tuple[bytes, ...]) -> bytes:
    """Return the data with the texts masked."""
    if not texts:
        return data
    masker = Masker(list(texts))
    return masker.feed(data) + masker.close()
