"""The bytes of characters in UTF-8."""


def begin_of_character(data: bytes, at: int) -> int:
    """Return the offset at which the character of the byte at ``at`` begins."""
    if at >= len(data) or data[at] & 0xC0 != 0x80:
        return at
    for back in range(1, min(at, 3) + 1):
        byte = data[at - back]
        if byte & 0xC0 != 0x80:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return at - back if byte >= 0xC2 and length > back else at
    return at
