"""The daemon in the foreground: ``python -m pulsar_api``."""

import sys

from twisted.application import app
from twisted.scripts._twistd_unix import ServerOptions, UnixApplicationRunner

from pulsar_api.tap import Options


def run(options: ServerOptions) -> None:
    """Run the daemon until it ends.

    After that ``twistd`` itself would die by the signal that stopped it. In the foreground
    a clean stop must exit with 0, so this does not.
    """
    UnixApplicationRunner(options).run()


def main() -> None:
    """Run the daemon until a signal stops it."""
    if {"--help", "--version"} & set(sys.argv[1:]):
        options = Options()
        options.synopsis = "Usage: python -m pulsar_api [options]"
        options.parseOptions(sys.argv[1:])
    sys.argv[1:] = ["--nodaemon", "--pidfile=", "pulsar-api", *sys.argv[1:]]
    app.run(run, ServerOptions)


if __name__ == "__main__":
    main()
