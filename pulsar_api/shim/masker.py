"""Replaces secrets in the output of a command, whatever the pieces in which it arrives.

Part of the shim. The launcher imports it once; a shim with an interpreter of its own
imports it for a task with secrets.

The result is exactly this: in the whole stream, every byte of every occurrence of a text is
covered; occurrences that overlap or contain each other form one region; each region becomes
one ``***``, and all other bytes stay as they are.

For a piece of data this takes three steps:

1. Find where texts may begin: search for their heads, the first 16 bytes (`_spans`).
2. Near each head that was found, search for all whole texts, and return their places in
   order (`_texts`). `_mask` joins those that overlap.
3. Hold back the longest end of the data that may be the start of a text (`_begun`), and
   search it again together with the next piece.

Each shortcut was measured with ``benchmarks.mask``'s data in pieces of 512 KiB, in MB per
second of processor time, with it and without it:

- Heads first, and whole texts only where a head was found: 2100 and 120 for a key of 38
  lines.
- A search that compares 32 bytes at once instead of one automaton for all heads (`_quick`):
  3300 and 1500 for ten tokens with a common prefix. For the key, which needs two such
  searches, the automaton would be faster: 2100 and 3400.
- Four texts that never occur, so that the library does not look for rare bytes: 3300 and
  1600 for the same ten tokens.
- The start of a text at the end of the data is found by its first 4 bytes instead of by
  trying each length (`_begun`): 560 and 110 for the key, in pieces of 4 KiB; 280 and 2 for
  a secret of 60 kB.
- Texts that others hide anyway are dropped (`_needed`): 5 and 0.01 for the 592 beginnings
  of a text of one letter, in an output that is full of them.
"""

from bisect import bisect

from ahocorasick_rs import BytesAhoCorasick, Implementation, MatchKind

TYPE_CHECKING = False  # mypy knows the name; to import what has it costs a task 2 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

MASK = b"***"

_HEAD = 16  # bytes of a text that are searched for first
_TOGETHER = 28  # heads in one search, see `_quick`
_SEARCHES = 48  # searches at most; more would be slower than one automaton for all heads
_START = 4  # bytes by which the start of a text at the end of the data is found
_TRIES = 64  # places that `_begun` compares at most
_PIECE = 1 << 17  # bytes in which heads are searched for at a time
_BLOCK = 1 << 14  # bytes in which whole texts are searched for at a time
_WINDOW = 256  # bytes in which the start of a text is searched for first


def _search(texts: list[bytes], kind: MatchKind) -> BytesAhoCorasick:
    # Not the default of the library: for long texts it takes minutes to build its table.
    return BytesAhoCorasick(
        texts, matchkind=kind, implementation=Implementation.ContiguousNFA
    )


def _quick(heads: list[bytes]) -> BytesAhoCorasick:
    """Return a search for a few short texts that is nearly as fast as memory.

    The library compares 32 bytes at once for up to 32 texts (the algorithm "Teddy"). But
    if the texts begin with fewer than four different bytes, or share rare bytes, it
    searches for these single bytes, which are everywhere in base64. So there are four more
    texts, which no stream of text contains.
    """
    never = [bytes((0xF8 + n, 0xFC + n)) * 8 for n in range(4)]
    return _search([*heads, *never], MatchKind.LeftmostFirst)


def _begins(texts: set[bytes]) -> dict[bytes, int]:
    """Return for each text the length of the longest other text that it begins with."""
    found: dict[bytes, int] = {}
    outer: list[bytes] = []  # each text begins with the one before it
    for text in sorted(texts):
        while outer and not text.startswith(outer[-1]):
            outer.pop()
        found[text] = len(outer[-1]) if outer else 0
        outer.append(text)
    return found


def _needed(texts: set[bytes]) -> list[bytes]:
    """Return the texts in order, without those that other texts cover anyway.

    If a text begins with a shorter one and ends with a shorter one, and the two overlap or
    touch, then both are found and form one region: the text itself. So of the texts
    ``aaa``, ``aaaa``, ``aaaaa`` the first one is enough.
    """
    begins = _begins(texts)
    ends = _begins({text[::-1] for text in texts})
    return [text for text in begins if begins[text] + ends[text[::-1]] <= len(text)]


class Masker:
    """Replaces every occurrence of some texts in one stream, see the module.

    The end of the data is held back if it may be the start of a text. These are always
    fewer bytes than the longest text has.
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
        """Take a piece of data; return the masked data that is certain by now."""
        data = self.held + data
        return self._mask(data, len(data) - self._begun(data))

    def close(self) -> bytes:
        """Return the rest of the masked data, after the end of the stream."""
        return self._mask(self.held, len(self.held))

    def _begun(self, data: bytes) -> int:
        """Return how many bytes at the end of the data may be the start of a text.

        In rare cases it returns more than needed: if the data is full of what looks like a
        start, only `_TRIES` places are compared, as all of them would take quadratic time.
        """
        at, step, tries = max(0, len(data) - self.longest + 1), _WINDOW, 0
        while at < len(data):
            part = data[at : at + step + _START - 1]
            for _, start, _ in self.start.find_matches_as_indexes(part, overlapping=True):
                begun = data[at + start :]
                # If any text begins with it, the next one in order does.
                place = bisect(self.texts, begun)
                near = self.texts[place : place + 1]
                if tries == _TRIES or (near and near[0].startswith(begun)):
                    return len(begun)
                tries += 1
            at += step
            step *= 2  # the first match is the longest
        for length in range(min(_START, self.longest, len(data) + 1) - 1, 0, -1):
            if data[-length:] in self.shorter:
                return length
        return 0

    def _mask(self, data: bytes, keep: int) -> bytes:
        """Return the first ``keep`` bytes of the data, masked, and hold back the others."""
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
        """Yield the start and the end of every text in the data, in order."""
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
        """Yield the start and end of every text that begins in ``range(first, last)``."""
        if self.exact is None:
            self.exact = _search(self.texts, MatchKind.Standard)
        step = max(_BLOCK, self.longest)
        for at in range(first, last, step):
            stop = min(at + step, last)
            block = data[at : stop - 1 + self.longest]
            matches = self.exact.find_matches_as_indexes(block, overlapping=True)
            yield from sorted((at + a, at + b) for _, a, b in matches if at + a < stop)

    def _regions(self, heads: list[tuple[int, int]]) -> "Iterator[tuple[int, int]]":
        """Yield regions of the data, such that every text in it begins in one of them.

        A search for heads does not report heads that overlap. So a text begins with a head
        that was found, or inside of one.
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
