"""The security headers of all responses."""

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""For the pages: nothing inline, nothing from other sites, never in a frame."""

ALWAYS: tuple[tuple[str, str], ...] = (
    # A response that is not a page but is taken for one runs and loads nothing.
    (
        "Content-Security-Policy",
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    # With "no-referrer" browsers would send the forms of the pages with Origin: null.
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
"""On every response that does not set them itself; the channel adds them."""
