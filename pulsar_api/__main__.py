"""The daemon in the foreground: ``python -m pulsar_api``."""

import sys

from twisted.application import app
from twisted.scripts._twistd_unix import ServerOptions, UnixApplicationRunner

from pulsar_api.tap import Options


def run(options: ServerOptions) -> None:
    """Run what the options name, to its end.

    As ``twistd`` does, which then kills itself by the signal that stopped it: who stopped
    a daemon in the foreground wants to see that it ended well.
    """
    UnixApplicationRunner(options).run()


def main() -> None:
    """Run the daemon until it is told to stop."""
    if {"--help", "--version"} & set(sys.argv[1:]):
        options = Options()
        options.synopsis = "Usage: python -m pulsar_api [options]"
        options.parseOptions(sys.argv[1:])
    sys.argv[1:] = ["--nodaemon", "--pidfile=", "pulsar-api", *sys.argv[1:]]
    app.run(run, ServerOptions)


if __name__ == "__main__":
    main()
