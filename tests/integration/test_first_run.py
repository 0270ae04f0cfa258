"""The shortest way through everything: a script, its output, its end."""

from tests.integration.conftest import Script
from tests.integration.daemon import Daemon


def test_a_task_runs_and_its_output_is_kept(daemon: Daemon, script: Script) -> None:
    """What a script prints on both streams and how it ends is there for everybody."""
    script("deploy", '#!/bin/sh\necho "to $PULSAR_ENV"\necho no >&2\nexit 3\n')
    number = daemon.run("site", "production", "deploy")
    ended = daemon.ended(number)
    assert (ended["status"], ended["exitCode"]) == ("failed", 3)
    assert daemon.task(number)["output"] == "to production\nno\n"
