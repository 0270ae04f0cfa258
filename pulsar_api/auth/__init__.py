"""Authentication and rights, without knowledge of HTTP servers."""
