"""The daemon in the foreground: ``python -m pulsar_api``."""

import sys

from twisted.scripts import twistd

from pulsar_api.tap import Options


def main() -> None:
    """Run the daemon until it is told to stop."""
    if {"--help", "--version"} & set(sys.argv[1:]):
        options = Options()
        options.synopsis = "Usage: python -m pulsar_api [options]"
        options.parseOptions(sys.argv[1:])
    sys.argv[1:] = ["--nodaemon", "--pidfile=", "pulsar-api", *sys.argv[1:]]
    twistd.run()


if __name__ == "__main__":
    main()
