"""Code blocks of the README and the docs, for tests that run them."""

import re
import textwrap
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).parents[1]
README = ROOT / "README.rst"
DOCS = ROOT / "docs"
PAGES = sorted([README, ROOT / "CONTRIBUTING.rst", *DOCS.rglob("*.rst")])

_BLOCK = re.compile(
    r"^(?P<indent> *)\.\. code-block:: (?P<language>[\w-]+)\n"
    r"(?P<options>(?:(?P=indent)   :[\w-]+:.*\n)*)"
    r"\n(?P<text>(?:(?P=indent)   .*\n|[ ]*\n)+)",
    re.MULTILINE,
)


@frozen
class Block:
    """A code block with its language, caption (the name of a file) and text."""

    page: str
    line: int
    language: str
    caption: str
    text: str

    def commands(self) -> list[str]:
        """Return the commands of a console block, without prompts and answers."""
        joined = self.text.replace("\\\n", "")
        return re.findall(r"^[$#] (.+)$", joined, re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the code blocks of a page, of these languages or of all."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        caption = re.search(r":caption: (.*)", match["options"])
        block = Block(
            str(page.relative_to(ROOT)),
            text[: match.start()].count("\n") + 1,
            match["language"],
            caption[1].strip("` ") if caption else "",
            textwrap.dedent(match["text"]).strip("\n") + "\n",
        )
        if not languages or block.language in languages:
            found.append(block)
    return found


def section(page: Path, title: str) -> str:
    """Return a section of a page, without its title."""
    pattern = rf"^{re.escape(title)}\n([-~])\1+\n(.*?)(?=^\S[^\n]*\n\1\1+\n|\Z)"
    found = re.search(pattern, page.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[2]
