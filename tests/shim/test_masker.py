"""Tests of the masker. For any pieces it gives the result of a simple masker."""

import tracemalloc
from itertools import pairwise, product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pulsar_api.shim.masker import MASK, Masker
from tests import needs


def simply(texts: list[bytes], data: bytes) -> bytes:
    """Return the data with the union of all occurrences masked. It is slow and simple."""
    hidden = [False] * len(data)
    begins = set()
    last = 0
    for at in range(len(data)):
        ends = [at + len(text) for text in texts if data.startswith(text, at)]
        if ends:
            if at >= last:
                begins.add(at)
            last = max(last, *ends)
            hidden[at:last] = [True] * (last - at)
    return b"".join(
        (MASK if at in begins else b"") if hidden[at] else data[at : at + 1]
        for at in range(len(data))
    )


def in_pieces(texts: list[bytes], pieces: list[bytes]) -> bytes:
    """Return the result of a masker that gets the data in pieces."""
    masker = Masker(texts)
    longest = max(map(len, texts))
    result = b""
    for piece in pieces:
        result += masker.feed(piece)
        assert len(masker.held) < longest
    return result + masker.close()


def split(data: bytes, places: list[int]) -> list[bytes]:
    """Cut data at these places."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


# Few letters, so that texts overlap, contain each other and repeat themselves.
TEXT = st.text("ab", min_size=1, max_size=9).map(str.encode)
LONG = st.builds(lambda text, n: text * n, TEXT, st.integers(1, 30))
# The common prefix is longer than the part that the masker checks first.
ALIKE = st.builds(
    lambda text, n, end: text * n + end,
    st.sampled_from([b"ab", b"abb"]),
    *(st.integers(20, 60), TEXT),
)


@given(
    st.lists(TEXT | LONG | ALIKE, min_size=1, max_size=6),
    st.lists(TEXT | LONG | ALIKE | st.just(b"c\n"), max_size=12).map(b"".join),
    st.lists(st.integers(0, 1200), max_size=8),
)
@settings(max_examples=needs.trials(100, 1000))
@example([b"aaaa"], b"aaaaaaa", [3])
@example([b"abab", b"baba"], b"ababababa", [1, 2, 3])
@example([b"ab", b"abc", b"bcd"], b"abcd", [2])
@example([b"a"], b"aba", [1])
@example([b"a" * 70], b"a" * 65 + b"b" + b"a" * 80, [])
@example([b"a" * 70, b"a" * 64 + b"b"], b"a" * 141 + b"b", [100])
@example([b"aaaa", b"a" * 40 + b"b"], b"a" * 99 + b"b", [50])
def test_any_split_gives_the_result_of_a_simple_masker(
    texts: list[bytes], data: bytes, places: list[int]
) -> None:
    """Secrets can overlap, share prefixes and repeat. All other bytes are unchanged."""
    assert in_pieces(texts, split(data, places)) == simply(texts, data)


@given(st.lists(TEXT, min_size=1, max_size=4), st.text("abc", max_size=80))
def test_single_bytes_give_the_same_result(texts: list[bytes], text: str) -> None:
    """These are the smallest pieces."""
    data = text.encode()
    pieces = [data[at : at + 1] for at in range(len(data))]
    assert in_pieces(texts, pieces) == simply(texts, data)


def test_only_a_possible_secret_is_held_back() -> None:
    """Other bytes are written at once, and an incomplete secret at the end."""
    masker = Masker([b"secret"])
    assert masker.feed(b"line\nse") == b"line\n"
    assert masker.feed(b"nd\n") == b"send\n"
    assert masker.feed(b"my secre") == b"my "
    assert masker.feed(b"t.\nsec") == b"***.\n"
    assert masker.close() == b"sec"


def test_a_secret_at_the_very_end_is_masked() -> None:
    """It can lack a line end, and be the prefix of another secret."""
    masker = Masker([b"secret", b"secretly"])
    assert masker.feed(b"it is secret") == b"it is "
    assert masker.close() == b"***"


def test_repeated_near_misses_do_not_cost_quadratic_time() -> None:
    """The prefix of a long secret is held back, and then written completely."""
    secret = b"a" * 60_000 + b"b"
    data = b"a" * 59_000 + b"c" + b"a" * 59_999
    assert in_pieces([secret], [data] * 3) == data * 3
    assert in_pieces([secret], [data, b"ab"]) == data[:-59_999] + b"***"


def test_a_secret_that_repeats_itself_is_found_quickly() -> None:
    """Thousands of overlapping occurrences become one mask."""
    text = b"ab" * 20_000
    assert in_pieces([text], [text, text, b"a!"]) == b"***a!"


MANY = [bytes(letters) + b"x" for letters in product(b"ab", repeat=7)]


@given(st.text("ab", max_size=200), st.lists(st.integers(0, 200), max_size=3))
def test_many_texts_are_found(text: str, places: list[int]) -> None:
    """They are more than one pass searches for."""
    data = text.replace("abba", "abbax").encode()
    assert in_pieces(MANY, split(data, places)) == simply(MANY, data)


def test_a_large_piece_full_of_secrets_is_masked() -> None:
    """It exceeds the part that is checked closely, and has many near misses."""
    texts = [b"secret" * 3, b"crets" * 2, b"0123456789abcdef-x"]
    line = b"secretsecretsecret 0123456789abcdef-x 0123456789abcdef-y\n"
    masked = b"*** *** 0123456789abcdef-y\n"
    assert in_pieces(texts, [line * 5000]) == masked * 5000
    assert in_pieces(texts, [line * 2000 + line[:30], line[30:] + line]) == masked * 2002


def test_a_secret_within_another_does_not_hide_its_start() -> None:
    """The longer one can be only partly in the window that is checked closely."""
    outer = b"0123456789abcdefghijklmnopqrstuv"
    assert in_pieces([outer, outer[5:20]], [outer * 4096]) == MASK * 4096


@pytest.mark.parametrize("data", [bytes(range(256)), b"\xf8\xfc" * 999, b"\xff" * 999])
def test_bytes_that_are_not_text_stay_unchanged(data: bytes) -> None:
    """The masker searches for special bytes of its own."""
    assert in_pieces([b"secret"], [data, data]) == data * 2


def test_written_bytes_are_not_masked_again() -> None:
    """The prefix of a long near miss contains short secrets."""
    begin = b"b" + b"0123456789" * 6 + b"012"
    texts = [begin + b"x", begin[1:] + b"aac", b"5", b"b"]
    for size in range(1, 70):
        data = begin + b"aaxxx"
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        assert in_pieces(texts, pieces) == simply(texts, data)


def test_a_secret_at_the_edge_of_a_window_is_masked() -> None:
    """Another secret can begin inside it, beyond the edge."""
    texts = [b"0123456789abcdefgh", b"123"]
    for before in range((1 << 18) - 20, (1 << 18) + 2):
        assert in_pieces(texts, [b"x" * before + texts[0]]) == b"x" * before + MASK


def peak(masker: Masker, data: bytes) -> int:
    """Return the peak of Python's memory while a masker takes data."""
    masker.feed(data[:1000])
    tracemalloc.start()
    masker.feed(data)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


FLOODS = {
    "one letter": [b"a" * 4],
    "one letter, of many lengths": [b"a" * n for n in range(4, 361)],
    "long": [b"a" * 65_000],
    "long, and short": [b"a" * 4, b"a" * 70, b"a" * 64 + bytes(range(97, 123)) * 1000],
}


@pytest.mark.parametrize(
    "name",
    [
        *("one letter", "long"),
        pytest.param("one letter, of many lengths", marks=pytest.mark.long),
        pytest.param("long, and short", marks=pytest.mark.long),
    ],
)
def test_a_flood_of_repetitions_takes_little_memory(name: str) -> None:
    """Many texts begin at each of its bytes."""
    masker = Masker(FLOODS[name])
    assert peak(masker, b"a" * (1 << 19)) < 40 << 20
    assert masker.feed(b"b") + masker.close() in {MASK + b"b", b"b"}


@pytest.mark.long
def test_long_lines_of_one_letter_take_little_memory() -> None:
    """Each is nearly as long as the longest text."""
    data = (b"a" * 361 + b"b") * 1400
    assert peak(Masker([b"a" * n for n in range(4, 361)]), data) < 20 << 20


def test_one_more_byte_of_a_long_prefix_needs_no_search() -> None:
    """The masker knows at once whether the held prefix goes on."""
    text = b"a" * 65_000
    masker = Masker([text + b"b"])
    masker.feed(text[:-1])
    assert peak(masker, b"a") < 1 << 20  # a copy or two of the held bytes
    assert peak(masker, b"a" * 80) < 1 << 20
    assert masker.feed(b"b") + masker.close() == MASK


def test_texts_that_contain_shorter_ones_are_dropped() -> None:
    """A text whose start and end are both secrets stays, because they may overlap."""
    few = Masker([b"a" * n for n in range(4, 400)])
    assert few.texts == [b"aaaa"]
    assert in_pieces([b"abcd", b"abcdefg", b"cdefg"], [b"abcdefg abcdef"]) == b"*** ***ef"
    assert in_pieces([b"abc", b"abcdef", b"def"], [b"abcdef abcxdef"]) == b"*** ***x***"


def test_very_many_texts_are_one_search() -> None:
    """One pass for each 28 texts would take longer."""
    texts = [b"%08d" % (n * n) for n in range(3000)]
    assert len(Masker(texts).quick) == 1
    assert len(Masker(texts[:500]).quick) > 1
    data = b"\n".join(b"%07d" % n for n in range(0, 100_000, 7))
    for some in (texts, texts[:500]):
        assert in_pieces(some, [data]) == data
        assert in_pieces(some, [b"x".join(some)]) == b"x".join([MASK] * len(some))
