"""Knows who is calling and what they may do. It knows no HTTP server."""
