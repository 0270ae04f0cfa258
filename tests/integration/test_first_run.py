"""The shortest complete scenario: a script, its output, and its end."""

from tests.integration.conftest import Script
from tests.integration.daemon import Daemon


def test_task_runs_and_its_output_is_kept(daemon: Daemon, script: Script) -> None:
    """Both streams and the result of a script can be read after its end."""
    script("deploy", '#!/bin/sh\necho "to $PULSAR_ENV"\necho no >&2\nexit 3\n')
    number = daemon.run("site", "production", "deploy")
    ended = daemon.ended(number)
    assert (ended["status"], ended["exitCode"]) == ("failed", 3)
    assert daemon.task(number)["output"] == "to production\nno\n"
