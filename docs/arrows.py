"""Draws which package imports which: ``python -m docs.arrows``."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pulsar_api"
PAGE = ROOT / "docs" / "architecture.rst"
PICTURE = ROOT / "docs" / "images" / "packages.svg"

_WIDTH, _HEIGHT, _ACROSS, _DOWN = 120, 34, 26, 44


@cache
def modules() -> dict[str, list[str]]:
    """Return what each module imports, anywhere in it, as full names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = list(_imports(ast.parse(path.read_text())))
    return found


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages() -> list[str]:
    """Return the names of the top level: packages, and modules beside them."""
    names = {name.split(".")[1] for name in modules() if "." in name}
    return sorted(names)


def between_packages() -> list[tuple[str, str]]:
    """Return each pair of names of the top level of which the first imports the second."""
    known = set(packages())
    found = set()
    for name, imported in modules().items():
        for other in imported:
            if name.count(".") and other.startswith("pulsar_api."):
                before, after = name.split(".")[1], other.split(".")[1]
                if before != after and after in known:
                    found.add((before, after))
    return sorted(found)


def layers() -> list[list[str]]:
    """Return the names by height, the highest first: each is above all that it imports."""
    arrows = between_packages()
    height = dict.fromkeys(packages(), 0)
    for _ in height:
        for before, after in arrows:
            height[before] = max(height[before], height[after] + 1)
            if height[before] > len(height):
                raise ValueError(f"a circle of imports with {before}")
    rows = sorted(set(height.values()), reverse=True)
    return [[name for name in height if height[name] == row] for row in rows]


def _reduced() -> list[tuple[str, str]]:
    """Return the arrows without those that follow from others."""
    arrows = set(between_packages())
    below: dict[str, set[str]] = {}
    for row in reversed(layers()):
        for name in row:
            direct = {after for before, after in arrows if before == name}
            below[name] = direct.union(*(below[after] for after in direct))
    return sorted(
        (before, after)
        for before, after in arrows
        if not any(after in below[n] for b, n in arrows if b == before and n != after)
    )


def picture() -> str:
    """Return an SVG of the packages; what an arrow follows from others is left out."""
    rows = layers()
    widest = max(map(len, rows))
    width = widest * (_WIDTH + _ACROSS) + _ACROSS
    height = len(rows) * (_HEIGHT + _DOWN) + _DOWN // 2
    at: dict[str, tuple[float, float]] = {}
    for y, row in enumerate(rows):
        begin = (width - len(row) * (_WIDTH + _ACROSS) + _ACROSS) / 2
        for x, name in enumerate(row):
            at[name] = (begin + x * (_WIDTH + _ACROSS), _DOWN / 2 + y * (_HEIGHT + _DOWN))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="14">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8"',
        ' markerHeight="8" orient="auto">',
        '<path d="M0 0 8 4 0 8z" fill="#667"/></marker></defs>',
    ]
    for before, after in _reduced():
        (left, top), (to_left, to_top) = at[before], at[after]
        lines.append(
            f'<line x1="{left + _WIDTH / 2:g}" y1="{top + _HEIGHT:g}" '
            f'x2="{to_left + _WIDTH / 2:g}" y2="{to_top:g}" '
            'stroke="#667" marker-end="url(#head)"/>'
        )
    for name, (left, top) in at.items():
        lines.append(
            f'<rect x="{left:g}" y="{top:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" '
            'fill="#eef2fa" stroke="#446"/>'
            f'<text x="{left + _WIDTH / 2:g}" y="{top + 22:g}" text-anchor="middle">'
            f"{name}</text>"
        )
    return "\n".join([*lines, "</svg>", ""])


def tree() -> str:
    """Return the tree of modules, with the first line of each docstring."""
    lines = []
    for name in sorted(modules()):
        parts = name.split(".")
        path = ROOT.joinpath(*parts)
        is_package = path.is_dir()
        file = path / "__init__.py" if is_package else path.with_suffix(".py")
        says = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
        label = "  " * (len(parts) - 1) + parts[-1] + ("/" if is_package else ".py")
        lines.append(f"   {label:<28}{says}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    PICTURE.write_text(picture())
    begin, end = ".. begin tree\n\n::\n\n", "\n\n.. end tree"
    text = PAGE.read_text()
    before, rest = text.split(begin)
    PAGE.write_text(before + begin + tree() + end + rest.split(end)[1])
