"""Who is calling, how that is known, and what they may do. It knows no HTTP server."""
