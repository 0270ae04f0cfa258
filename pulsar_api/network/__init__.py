"""Opens ports, and keeps TLS certificates up to date."""
