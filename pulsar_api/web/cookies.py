"""Cookies: read from the head of a request, and set with the flags that ours have."""

from twisted.web.server import Request


def parse(text: str) -> dict[str, str]:
    """Return the cookies of a ``Cookie`` header (RFC 6265); an odd one hides no other.

    `Request.getCookie` is no help: the server drops what Twisted has parsed, as thousands
    of cookies would take a hundred times their bytes.
    """
    pairs = [part.partition("=") for part in text.split(";")]
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def set_cookie(
    request: Request,
    name: str,
    value: str,
    *,
    secure: bool,
    age: int | None = None,
    path: str = "/",
) -> None:
    """Let a browser keep a cookie that only the daemon reads.

    ``age``: seconds for which it is kept; 0 removes it, None keeps it until the browser
    ends. ``secure``: whether it is sent by HTTPS only.
    """
    request.addCookie(
        name,
        value,
        max_age=None if age is None else str(age),
        path=path,
        secure=secure,
        httpOnly=True,
        sameSite="lax",
    )
