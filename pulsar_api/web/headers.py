"""What every answer tells a browser not to do with it."""

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""For our pages: nothing inline, nothing from elsewhere, inside nobody's frame."""

ALWAYS: tuple[tuple[str, str], ...] = (
    # Only pages show anything; an answer that is taken for one runs and loads nothing.
    (
        "Content-Security-Policy",
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    # Not "no-referrer": then a browser sends our own forms as from nowhere (Origin: null).
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
"""On whatever the daemon sends, unless the answer has its own; `web.site` sees to it."""
