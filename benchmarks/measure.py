"""Runs alternatives in turn, and makes ratios of figures measured side by side."""

from collections.abc import Callable, Sequence
from statistics import median, quantiles

from attrs import frozen

Measure = Callable[[], float]


@frozen
class Line:
    """One line of the table: a figure of ours and of a bare alternative."""

    name: str
    unit: str
    ours: float
    bare: float
    ratio: float
    rounds: tuple[tuple[float, float], ...]
    """The figures of each round, ours and bare."""


def in_turn(rounds: int, *measures: Measure) -> list[list[float]]:
    """Return the figures of each measure, one per round.

    The measures take turns, in every second round backwards, so that a slow minute of the
    machine affects all of them. A round before the first only warms everything up.
    """
    found: list[list[float]] = [[] for _ in measures]
    for number in range(rounds + 1):
        order = list(enumerate(measures))
        for place, measure in reversed(order) if number % 2 else order:
            value = measure()
            if number:
                found[place].append(value)
    return found


def compare(name: str, unit: str, ours: Sequence[float], bare: Sequence[float]) -> Line:
    """Return the medians of both, and the median of the ratios of each round.

    The ratio is not exactly that of the two medians, because a round on a busy machine is
    compared only with itself.
    """
    rounds = tuple(zip(ours, bare, strict=True))
    ratio = median(a / b for a, b in rounds)
    return Line(name, unit, median(ours), median(bare), ratio, rounds)


def compare_percentile(
    name: str, unit: str, percent: int, ours: Sequence[float], bare: Sequence[float]
) -> Line:
    """Return a percentile of all samples together, and the ratio of the two percentiles."""
    values = [quantiles(side, n=100)[percent - 1] for side in (ours, bare)]
    rounds = tuple(zip(ours, bare, strict=True))
    return Line(name, unit, values[0], values[1], values[0] / values[1], rounds)


def table(lines: Sequence[Line]) -> str:
    """Return the lines as a table in reStructuredText, which is also readable as text."""
    rows = [("what", "ours", "bare", "ratio", "unit")]
    rows += [
        (x.name, _short(x.ours), _short(x.bare), _short(x.ratio), x.unit) for x in lines
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "  ".join("=" * width for width in widths)
    text = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([rule, text[0], rule, *text[1:], rule])


def _short(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return (
        f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 0.1
        else f"{value:.3f}"
    )
