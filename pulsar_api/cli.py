"""The command ``pulsar-api``."""


def main() -> int:
    return 0
