"""``python -m benchmarks.hostile``: how an attack affects an honest client."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from pathlib import Path
from statistics import median, quantiles

from benchmarks.client import Connection, request
from benchmarks.place import HERE, Place, Server, create, finished, place, served

SIZE = 64 << 20
"""Bytes of the output that the slow readers ask for."""
SHOWN = f"Authorization: Basic {b64encode(b'bench:bench').decode()}"
CALM = 10.0
"""Seconds of measuring before and after the attack."""


def honest(port: int, path: str, seconds: float) -> None:
    """Send requests on one connection, and print the milliseconds of each as JSON."""
    connection = Connection(port)
    connection.authorization = f"{SHOWN}\r\n".encode()
    times = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        connection.ask(request("GET", path))
        times.append((time.perf_counter() - began) * 1e3)
        time.sleep(0.002)
    connection.close()
    print(json.dumps(times))


def report(server: Server, path: str, seconds: float, when: str) -> None:
    """Print the measurements of an honest client, which is a process of its own."""
    command = [sys.executable, "-m", "benchmarks.hostile", "--honest", path]
    command += ["--port", str(server.port), "--seconds", str(seconds)]
    began, used = time.monotonic(), server.cpu()
    said = subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True).stdout
    share = (server.cpu() - used) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began)
    times = json.loads(said)
    print(
        f"{when}: {len(times)} GETs, p50 {median(times):.2f} ms, "
        f"p99 {quantiles(times, n=100)[98]:.2f} ms, max {max(times):.1f} ms; "
        f"{files(server)} descriptors, {server.memory() / 2**20:.1f} MiB, "
        f"{share:.0%} of a processor",
        flush=True,
    )


def files(server: Server) -> int:
    """Return the number of files that the daemon has open."""
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def measure(here: Place, options: argparse.Namespace) -> None:
    """Print the measurements of an honest client before, during and after the attack."""
    here.action("much", "sh", "-c", f"yes 0123456789abcde | head -c {SIZE}")
    here.action("sleep", "sleep", "3600")
    secret = here.folder / "password"
    secret.write_text("bench")
    server = served(
        here.daemon(
            *("--auth-provider", "static", "--auth-username", "bench"),
            *("--auth-password-file", str(secret)),
        )
    )
    connection = here.connect(server)
    connection.authorization = f"{SHOWN}\r\n".encode()
    large = create(connection, "much")
    finished(connection, large)
    path = f"/task/{create(connection, 'sleep')}?output=none"
    connection.close()
    # The first wrong token opens the database of tokens, which stays open.
    guess = here.connect(server)
    guess.authorization = b"Authorization: Bearer pulsar_wrong\r\n"
    guess.send(request("GET", "/tasks"))
    assert guess.socket.recv(65536).startswith(b"HTTP/1.1 401 ")
    guess.close()
    server.rest()
    report(server, path, CALM, "before")
    usual = files(server)
    command = [sys.executable, "-m", "benchmarks.attack", str(server.port)]
    command += [f"/task/{large}", "--authorization", SHOWN]
    command += ["--senders", str(options.senders)]
    command += ["--readers", str(options.readers), "--guesses", str(options.guesses)]
    with subprocess.Popen(
        command, cwd=HERE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as attack:
        assert attack.stdout is not None
        assert attack.stdout.readline() == b"ready\n"
        report(server, path, options.seconds, "during")
        answers, _ = attack.communicate()
    ended = time.monotonic()
    while files(server) > usual:
        time.sleep(0.01)
    print(f"all connections are closed {time.monotonic() - ended:.2f} s after the attack")
    report(server, path, CALM, "after")
    print(f"responses to the attackers: {answers.decode().strip()}")


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser("python -m benchmarks.hostile", description=__doc__)
    parser.add_argument(
        "--senders",
        type=int,
        default=2000,
        help="clients that send a byte every 2 s [2000]",
    )
    parser.add_argument(
        "--readers", type=int, default=200, help="clients that read a byte every 2 s [200]"
    )
    parser.add_argument(
        "--guesses", type=int, default=500, help="wrong tokens per second [500]"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long [60]")
    parser.add_argument("--honest", metavar="PATH", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.honest:
        honest(options.port, options.honest, options.seconds)
        return
    with place(Path(tempfile.gettempdir())) as here:
        measure(here, options)


if __name__ == "__main__":
    main()
