"""Globs, in which * stands for any text and ? for one character."""

import fnmatch
import re
from functools import lru_cache


@lru_cache(maxsize=1000)
def _compiled(glob: str) -> re.Pattern[str]:
    # Brackets are literal. The time to match grows only with the length of the text.
    return re.compile(fnmatch.translate(glob.replace("[", "[[]")))


def matches(glob: str, text: str) -> bool:
    """Return whether the whole text matches the glob; case matters."""
    return _compiled(glob).match(text) is not None
