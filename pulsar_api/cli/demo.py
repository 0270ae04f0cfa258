"""The demonstration: a real daemon, a real deployment, followed through the API."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import treq
from attrs import define
from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.internet.ssl import Certificate, trustRootFromCertificates
from twisted.internet.task import deferLater
from twisted.web.client import Agent, BrowserLikePolicyForHTTPS
from twisted.web.http_headers import Headers

from pulsar_api import tap
from pulsar_api.config import loading
from pulsar_api.daemon.preflight import check
from pulsar_api.daemon.service import Daemon
from pulsar_api.errors import CannotListen
from pulsar_api.network import certificates
from pulsar_api.principal import Principal
from pulsar_api.tasks.model import Status, TaskQuery

EXAMPLE = Path(__file__).parents[1] / "example"
JSON = "application/json"
_END = Principal("demo", "end", "the end of the demonstration")
ACTIONS = ("deploy", "rollback", "fail")


@define
class Result:
    """How the demonstrated task ended."""

    status: str
    exit_code: int | None


def run(reactor: Any, action: str, *, once: bool) -> Deferred[None]:
    """Run the demonstration; with ``once`` fire with the exit status of the process.

    Otherwise it serves until the reactor is stopped.
    """
    return Deferred.fromCoroutine(_run(reactor, action, once=once))


async def _run(reactor: Any, action: str, *, once: bool) -> None:
    folder = Path(tempfile.mkdtemp(prefix="pulsar-demo-"))
    tap.steady(reactor)
    try:
        daemon = _listening(reactor, folder)
    except CannotListen:
        # The usual port is taken, perhaps by another demonstration.
        daemon = _listening(reactor, folder, port=0)
    daemon.startService()

    async def stop() -> None:
        if daemon.tasks is not None:
            for task in await daemon.tasks.list(TaskQuery(status=Status.RUNNING)):
                await daemon.tasks.kill(task.id, _END)
        await daemon.stopService()
        shutil.rmtree(folder, ignore_errors=True)

    reactor.addSystemEventTrigger(
        "before", "shutdown", lambda: Deferred.fromCoroutine(stop())
    )
    certificate = certificates.development_files()[1]
    url = daemon.listeners[0].url("https").replace("127.0.0.1", "localhost")
    say(f"pulsar-api serves at {url}")
    client = _client(reactor, certificate.read_bytes())
    result = await _follow(reactor, client, url, action)
    code = "" if result.exit_code is None else f", exit code {result.exit_code}"
    say(f"The task ended: {result.status}{code}.")
    if once:
        if result.status != Status.FINISHED:
            raise SystemExit(result.exit_code or 1)
        return
    curl = f"curl --cacert {certificate}"
    say(
        f"""
Try next, in another terminal:

  {curl} -d action=deploy {url}/site/production
  {curl} -d action=rollback {url}/site/production
  {curl} {url}/tasks

The page: {url}/pulsar/index.html
What was published: {folder / "site" / "production" / "current"}
Ctrl-C ends the demonstration and removes what it made."""
    )
    await Deferred()


def _listening(reactor: Any, folder: Path, **more: object) -> Daemon:
    given: dict[str, object] = {
        **more,
        "dev": True,
        "state-dir": str(folder / "state"),
        "command": "scripts",
        "config-repo": str(EXAMPLE),
        "kill-grace": 1,
        "drain-timeout": 3,
    }
    environ: Mapping[str, str] = {**os.environ, "DEMO_SITE": str(folder / "site")}
    wanted = loading.load(given, environ)
    check(wanted, own_files=True)
    daemon = Daemon(reactor, wanted, environ)
    daemon.privilegedStartService()
    return daemon


def _client(reactor: Any, certificate: bytes) -> HTTPClient:
    trusted = trustRootFromCertificates([Certificate.loadPEM(certificate)])
    return HTTPClient(Agent(reactor, BrowserLikePolicyForHTTPS(trusted)))


async def _follow(reactor: Any, client: HTTPClient, url: str, action: str) -> Result:
    body = json.dumps({"action": action}).encode()
    while True:
        response = await client.post(
            f"{url}/site/production", data=body, headers=Headers({"Content-Type": [JSON]})
        )
        if response.code != 503:
            break
        await treq.content(response)
        await deferLater(reactor, 0.05)  # it is still starting
    created = await treq.json_content(response)
    say(f"POST /site/production action={action}: task {created['id']}\n")
    version, printed = 0, 0
    while True:
        place = f"{url}/task/{created['id']}/output?since={version}"
        answer = await treq.json_content(await client.get(place))
        if not answer["changed"]:
            continue
        task = answer["task"]
        version = task["version"]
        sys.stdout.write(task["output"][printed:])
        sys.stdout.flush()
        printed = len(task["output"])
        if task["status"] not in {Status.CREATED, Status.RUNNING}:
            say("")
            return Result(task["status"], task["exitCode"])


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)
