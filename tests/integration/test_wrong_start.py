"""Tests that invalid settings give one line and exit status 1 before anything starts."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from attrs import frozen
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.hazmat.primitives.serialization import NoEncryption, pkcs12

from tests.certificates import Authority, key_pem, public_pem, self_signed
from tests.integration.conftest import Script, Start
from tests.integration.daemon import Daemon, wait_for
from tests.integration.refused import (
    POWERLESS,
    WAYS,
    answers,
    powerless,
    refusal,
    reserved,
    told,
)

PHRASE = b"open sesame"
ANONYMOUS = "callers would not have to authenticate"
PEM = ("--ssl-key", "{files}/key", "--ssl-cert", "{files}/cert")


@frozen
class Wrong:
    """Invalid options, and a part of the expected error.

    ``{files}`` is the folder of the fixture. For ``{own}`` and ``{port}`` see
    `refusal`.
    """

    options: tuple[str, ...]
    says: str


def wrong(options: str, says: str, *more: str) -> Wrong:
    """Make a `Wrong` of one line. Options that contain spaces follow as ``more``."""
    return Wrong((*options.split(), *more), says)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with good and bad files."""
    folder = tmp_path_factory.mktemp("files")
    one = Authority().issue()
    other = ec.generate_private_key(ec.SECP256R1())
    only_certificates = pkcs12.serialize_key_and_certificates(
        None, None, None, [one.certificate], NoEncryption()
    )
    contents = {
        "key": key_pem(one.key),
        "locked": key_pem(one.key, PHRASE),
        "other": key_pem(other),
        "public": public_pem(one.key),
        "cert": one.cert_pem(),
        "half": one.cert_pem()[:-100],
        "pfx": one.pfx(),
        "locked-pfx": one.pfx(PHRASE),
        "no-key": only_certificates,
        "wrong": b"wrong\n",
        "nul": b"open\0sesame\n",
        "empty": b"",
        "text": b"Ceci n'est pas une pipe.\n",
        "no.toml": b"port: 8081\n",
        "latin.toml": b"config-branch = 'ma\xeetre'\n",
        "key.toml": b"colour = 'red'\n",
        "table.toml": b"[server]\nport = 1\n",
        "underscore.toml": b"config_repo = 'x'\n",
        "value.toml": b"max-running = 0\n",
        "type.toml": b"max-running = '1O'\n",
        "pattern.toml": b"app-pattern = '('\n",
        "overflow.toml": b"app-pattern = 'a{4294967296}'\n",
        "auth.toml": b"auth-password = 'secret'\n",
        "rights.toml": b"[[rights]]\nwho = ['*']\nmay = ['fly']\n",
        "confirm.toml": b"confirm = ['*/production/']\n",
        "wide.toml": b"interface = '0.0.0.0'\n",
    }
    weak = {
        "short": rsa.generate_private_key(65537, 1024),
        "dsa": dsa.generate_private_key(2048),
    }
    for name, key in weak.items():
        contents[f"{name}.key"] = key_pem(key)
        contents[f"{name}.cert"] = self_signed(key).cert_pem()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    (folder / "no-database").mkdir()
    (folder / "no-database" / "pulsar-api.db").write_bytes(b"x" * 5000)
    (folder / "logs" / "pulsar-api.log").mkdir(parents=True)
    return folder


OPTIONS = [
    wrong("--colour red", "option --colour not recognized"),
    wrong("-x", "option -x not recognized"),
    wrong("start", "'start' is not an option"),
    wrong("--config-repo", "option --config-repo requires argument"),
    wrong("--dev=1", "option --dev must not have an argument"),
    wrong("--config-repo=", "--config-repo: must be a non-empty string"),
    wrong("--port http", "--port: must be a whole number"),
    wrong("--port -1", "--port: must be a whole number"),
    wrong("--port 65536", "--port: must be from 0 to 65535"),
    wrong("--interface localhost", "--interface: 'localhost' is not an IP address"),
    wrong("--interface 192.0.2.1 --allow-anonymous", "cannot listen on 192.0.2.1 port"),
    wrong("--poll-timeout 0", "--poll-timeout: must be from 1 to 3600 seconds"),
    wrong("--kill-grace soon", "--kill-grace: must be a number of seconds"),
    wrong("--task-timeout 1h", "--task-timeout: must be a number of seconds"),
    wrong("--silence-timeout nan", "--silence-timeout: must be a number of seconds"),
    wrong("--drain-timeout -1", "--drain-timeout: must be a number of seconds"),
    wrong("--max-running 0", "--max-running: must be from 1 to 10000"),
    wrong("--max-running-per-target x", "--max-running-per-target: must be a whole number"),
    wrong("--max-queued 1e3", "--max-queued: must be a whole number"),
    wrong("--public-url deploy.example.com", "--public-url: must be a URL"),
    wrong("--public-url http://a:b", "--public-url: "),
]
ENDPOINTS = [
    wrong("--listen pigeon:1", "--listen: 'pigeon:1' is not an endpoint"),
    wrong("--listen tcp", "--listen: 'tcp' is not an endpoint"),
    wrong("--listen tcp:http", "--listen: 'tcp:http' is not an endpoint"),
    wrong("--listen=", "--listen: must be a non-empty string"),
    wrong("--listen tcp:{port}:colour=red", "is not an endpoint"),
    wrong("--listen tcp:99999:interface=127.0.0.1", "cannot listen on tcp:99999"),
    wrong(
        "--listen systemd:domain=INET:name=x", "'systemd:domain=INET:name=x' is not an end"
    ),
    wrong(
        "--listen ssl:{port}:privateKey=/nonexistent:interface=127.0.0.1", "/nonexistent"
    ),
    wrong(
        "--listen ssl:{port}:interface=127.0.0.1:certKey={files}/cert"
        ":privateKey={files}/key",
        "is not an endpoint: use tcp: with --ssl-cert and --ssl-key",
    ),
    wrong("--listen ssl:{port}:privateKey={files}/text", "is not an endpoint: use tcp:"),
    wrong("--listen tls:{port}", "is not a folder with a certificate"),
    wrong("--listen fd:3", "--listen: 'fd:3' is not an endpoint: use one of tcp:"),
    wrong("--listen stdio:", "--listen: 'stdio:' is not an endpoint: use one of tcp:"),
    wrong("--listen tcp:0:interface=127.0.0.1:backlog=9999999999", "cannot listen on tcp:"),
    wrong("--listen unix:", "cannot listen on unix:"),
    wrong("--listen unix:/nonexistent/s", "cannot listen on unix:/nonexistent/s: "),
    wrong("--listen unix:{own}", "cannot listen on unix:{own}: "),
    wrong(
        "--listen tcp:{port}:interface=127.0.0.1 --listen tcp:{port}:interface=127.0.0.1",
        "tcp:{port}:interface=127.0.0.1",
    ),
    wrong("--port {port} --listen tcp:1:interface=127.0.0.1", "--listen replaces --port"),
]
WIDE = [
    wrong("--interface 0.0.0.0", f"will not listen on 0.0.0.0: {ANONYMOUS}"),
    wrong("--interface ::", f"will not listen on ::: {ANONYMOUS}"),
    wrong("--interface 192.0.2.1", f"will not listen on 192.0.2.1: {ANONYMOUS}"),
    wrong("--config {files}/wide.toml", f"will not listen on 0.0.0.0: {ANONYMOUS}"),
    wrong("--listen tcp:{port}", f"will not listen on all addresses: {ANONYMOUS}"),
    wrong("--listen tcp6:{port}", f"will not listen on ::: {ANONYMOUS}"),
    wrong("--listen tcp:{port}:interface=0.0.0.0", f"listen on 0.0.0.0: {ANONYMOUS}"),
    wrong("--listen haproxy:tcp:{port}", ANONYMOUS),
    wrong(
        "--listen tcp:{port}:interface=127.0.0.1 --listen tcp:0",
        f"will not listen on all addresses: {ANONYMOUS}",
    ),
    wrong(f"--interface 0.0.0.0 {' '.join(PEM)}", ANONYMOUS),
]
AUTH = [
    wrong("--auth-username joe", "--auth-username and its password go together"),
    wrong("--auth-provider ldap", "--auth-provider: must be one of github, static, tok"),
    wrong("--auth-provider github", "--auth-provider github needs --auth-members"),
    wrong("--auth-method user", "--auth-provider github needs --auth-members"),
    wrong("--auth-password-file {files}/nothing", "auth-password-file: cannot read"),
    wrong("--auth-password-file {files}/empty", "auth-password-file: {files}/empty is"),
    wrong("--config {files}/auth.toml", "--auth-username and its password go together"),
    wrong(
        "--config {files}/rights.toml", "{files}/rights.toml: rights: 'fly' is not a right"
    ),
    wrong(
        "--config {files}/confirm.toml",
        "{files}/confirm.toml: confirm: '*/production/' must be like shop",
    ),
]
CONFIG = [
    wrong(
        "--config {files}/nothing", "--config: cannot read {files}/nothing: No such file"
    ),
    wrong(
        "--config {files}/folder", "--config: cannot read {files}/folder: Is a directory"
    ),
    wrong("--config=", "--config: "),
    wrong("--config {files}/no.toml", "--config: {files}/no.toml is not TOML: "),
    wrong("--config {files}/latin.toml", "--config: {files}/latin.toml is not TOML: "),
    wrong("--config {files}/key.toml", "{files}/key.toml: colour is not an option"),
    wrong("--config {files}/table.toml", "{files}/table.toml: server is not an option"),
    wrong(
        "--config {files}/underscore.toml", "underscore.toml: config_repo is not an option"
    ),
    wrong("--config {files}/value.toml", "{files}/value.toml: max-running: must be from 1"),
    wrong("--config {files}/type.toml", "{files}/type.toml: max-running: must be a whole"),
    wrong("--config {files}/pattern.toml", "pattern.toml: app-pattern: is not a regular"),
    wrong("--config {files}/overflow.toml", "overflow.toml: app-pattern: is not a regular"),
]
COMMAND = [
    wrong("--command scripts", "--command scripts needs --config-repo"),
    wrong("--command capistrano", "--command capistrano needs --config-repo"),
    wrong(
        "--command scripts --config-repo git@example.com:x",
        "--config-repo: git@example.com:x is not a folder; scripts needs one",
    ),
    wrong("--command", "--command cannot be split into arguments", "deploy 'it"),
    wrong("--command", "--command: {colour} is unknown. Use one of", "deploy {colour}"),
    wrong("--command", "--command: {variables} must be an argument", "deploy x{variables}"),
    wrong("--command", "--command must begin with a program", "{app} deploy"),
    wrong("--command", "--command must begin with a program", " "),
    wrong("--command=", "--command: must be a non-empty string"),
]
TLS = [
    wrong("--ssl-key {files}/key", "--ssl-cert is missing"),
    wrong("--ssl-cert {files}/cert", "--ssl-key is missing"),
    wrong("--ssl-passphrase {files}/wrong", "--ssl-passphrase needs --ssl-key"),
    wrong("--dev --ssl-pfx {files}/pfx", "--dev brings its own certificate"),
    wrong("--ssl-key /nonexistent --ssl-cert {files}/cert", "--ssl-key: cannot read /non"),
    wrong("--ssl-key {files}/key --ssl-cert /nonexistent", "--ssl-cert: cannot read /non"),
    wrong("--ssl-key {files}/folder --ssl-cert {files}/cert", "folder: Is a directory"),
    wrong(
        "--ssl-key {files}/cert --ssl-cert {files}/key", "it is not a private key in PEM"
    ),
    wrong(
        "--ssl-key {files}/public --ssl-cert {files}/cert", "it is not a private key in PEM"
    ),
    wrong("--ssl-key {files}/key --ssl-cert {files}/text", "text holds no certificate"),
    wrong("--ssl-key {files}/key --ssl-cert {files}/empty", "empty holds no certificate"),
    wrong(
        "--ssl-key {files}/other --ssl-cert {files}/cert",
        "--ssl-cert: {files}/cert: the key does not match the certificate",
    ),
    wrong("--ssl-key {files}/locked --ssl-cert {files}/cert", "locked has a passphrase; "),
    wrong(
        "--ssl-key {files}/locked --ssl-cert {files}/cert --ssl-passphrase {files}/wrong",
        "--ssl-key: cannot use {files}/locked: the passphrase is wrong",
    ),
    wrong(
        "--ssl-key {files}/locked --ssl-cert {files}/cert --ssl-passphrase {files}/nothing",
        "--ssl-passphrase: cannot read {files}/nothing: No such file or directory",
    ),
    wrong("--ssl-key {files}/short.key --ssl-cert {files}/short.cert", "--ssl-"),
    wrong("--ssl-key {files}/dsa.key --ssl-cert {files}/dsa.cert", "--ssl-"),
    wrong("--ssl-pfx {files}/nothing", "--ssl-pfx: cannot read {files}/nothing"),
    wrong("--ssl-pfx {files}/cert", "--ssl-pfx: cannot open {files}/cert"),
    wrong("--ssl-pfx {files}/locked-pfx", "(--ssl-passphrase) is wrong or missing"),
    wrong(
        "--ssl-pfx {files}/locked-pfx --ssl-passphrase {files}/wrong", "is wrong or miss"
    ),
    wrong(
        "--ssl-pfx {files}/locked-pfx --ssl-passphrase {files}/nul", "is wrong or missing"
    ),
    wrong("--ssl-pfx {files}/no-key", "--ssl-pfx: {files}/no-key must hold a key"),
    wrong("--ssl-client-ca {files}/cert", "--ssl-client-ca needs TLS"),
    wrong(
        "--ssl-pfx {files}/pfx --ssl-client-ca /nonexistent",
        "--ssl-client-ca: cannot read /nonexistent: No such file or directory",
    ),
    wrong(
        "--ssl-pfx {files}/pfx --ssl-client-ca {files}/text",
        "--ssl-client-ca: {files}/text holds no certificate in PEM form",
    ),
    wrong(
        "--ssl-pfx {files}/pfx --ssl-client-ca {files}/half",
        "--ssl-client-ca: {files}/half holds an incomplete certificate",
    ),
    wrong(
        "--ssl-key {files}/key --ssl-cert {files}/half",
        "--ssl-cert: {files}/half holds an incomplete certificate",
    ),
    wrong(
        "--ssl-pfx {files}/pfx --ssl-client-ca {files}/cert --interface 0.0.0.0",
        f"will not listen on 0.0.0.0: {ANONYMOUS}",
    ),
    wrong(
        "--ssl-pfx {files}/pfx --ssl-client-ca {files}/cert --listen tls:/etc/keys:port=1",
        "--ssl-client-ca does not apply to --listen tls:/etc/keys:port=1",
    ),
]
FOLDERS = [
    wrong(
        "--state-dir {files}/text", "--state-dir: cannot create {files}/text: File exists"
    ),
    wrong(
        "--state-dir {files}/text/s", "--state-dir: cannot create {files}/text/s: Not a dir"
    ),
    wrong("--state-dir /proc", "--state-dir: "),
    wrong("--state-dir=", "--state-dir: must be a non-empty string"),
    wrong("--state-dir {files}/no-database", "file is not a database"),
    wrong("--log-dir {files}/text", "--log-dir: cannot create {files}/text: File exists"),
    wrong("--log-dir {files}/text/l", "--log-dir: cannot create {files}/text/l: Not a dir"),
    wrong("--log-dir {files}/logs", "--log-dir: "),
]
CASES = [*OPTIONS, *ENDPOINTS, *WIDE, *AUTH, *CONFIG, *COMMAND, *TLS, *FOLDERS]


def filled(case: Wrong, files: Path) -> list[str]:
    """Return the options of a case."""
    return [option.replace("{files}", str(files)) for option in case.options]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case.options))
def test_an_invalid_setting_is_reported_in_one_line(
    case: Wrong, files: Path, tmp_path: Path
) -> None:
    """The exit status is 1, and nothing has started."""
    said = told(tmp_path / "own", *filled(case, files))
    assert case.says in said.replace(str(files), "{files}")


@pytest.mark.parametrize(
    "case", [OPTIONS[0], FOLDERS[-1]], ids=lambda case: " ".join(case.options)
)
def test_an_invalid_setting_opens_no_port(case: Wrong, files: Path, tmp_path: Path) -> None:
    """The daemon is tried in the foreground and in the background."""
    said = refusal(tmp_path, *filled(case, files))
    assert case.says in said.replace(str(files), "{files}")


@pytest.mark.parametrize(
    ("options", "locked", "says"),
    [
        (PEM, "key", "--ssl-key: cannot read {files}/key: Permission denied"),
        (PEM, "cert", "--ssl-cert: cannot read {files}/cert: Permission denied"),
        (("--ssl-pfx", "{files}/pfx"), "pfx", "--ssl-pfx: cannot read {files}/pfx: Perm"),
        (
            ("--ssl-pfx", "{files}/pfx", "--ssl-passphrase", "{files}/wrong"),
            "wrong",
            "--ssl-passphrase: cannot read {files}/wrong: Permission denied",
        ),
        (
            (*PEM, "--ssl-client-ca", "{files}/half"),
            "half",
            "--ssl-client-ca: cannot read {files}/half: Permission denied",
        ),
        (
            ("--config", "{files}/key.toml"),
            "key.toml",
            "--config: cannot read {files}/key.t",
        ),
    ],
    ids=["key", "cert", "pfx", "passphrase", "client ca", "config"],
)
def test_an_unreadable_file_is_named(
    options: tuple[str, ...], locked: str, says: str, files: Path, tmp_path: Path
) -> None:
    """The error has the reason of the system."""
    mine = tmp_path / "files"
    shutil.copytree(files, mine)
    (mine / locked).chmod(0)
    given = [option.replace("{files}", str(mine)) for option in options]
    with powerless():
        said = told(tmp_path / "own", *given)
    assert says in said.replace(str(mine), "{files}")


@pytest.mark.parametrize("option", ["--state-dir", "--log-dir"])
def test_an_unwritable_folder_is_named(option: str, tmp_path: Path) -> None:
    """The daemon checks it before it writes anything."""
    folder = tmp_path / "read only"
    folder.mkdir(mode=0o555)
    with powerless():
        said = told(tmp_path / "own", option, str(folder))
    assert said == f"{option}: {folder} is not writable"


def test_an_unwritable_state_folder_opens_no_port(tmp_path: Path) -> None:
    """The daemon is tried in the foreground and in the background."""
    folder = tmp_path / "read only"
    folder.mkdir(mode=0o555)
    said = refusal(tmp_path, "--state-dir", str(folder), before=POWERLESS)
    assert said == f"--state-dir: {folder} is not writable"


@pytest.mark.parametrize("option", ["--state-dir", "--log-dir"])
def test_a_folder_that_cannot_be_created_is_named(option: str, tmp_path: Path) -> None:
    """The error has the reason of the system."""
    folder = tmp_path / "read only"
    folder.mkdir(mode=0o555)
    with powerless():
        said = told(tmp_path / "own", option, str(folder / "new"))
    assert said == f"{option}: cannot create {folder / 'new'}: Permission denied"


@pytest.mark.parametrize("name", ["lock", "pulsar-api.db", "tasks"])
@pytest.mark.needs("root")
def test_a_state_that_belongs_to_another_user_is_refused(
    start: Start, tmp_path: Path, name: str
) -> None:
    """A start by hand as root leaves such files, and later every task would fail."""
    daemon = start("--command", "true")
    daemon.ended(daemon.run("site", "production", "deploy"))
    daemon.stop()
    path = daemon.state / name
    path.chmod(path.stat().st_mode & ~0o222)
    os.chown(path, 1, 1)  # the daemon changes modes of its own files only
    with powerless():
        assert str(path) in told(tmp_path / "own", "--state-dir", str(daemon.state))


def test_a_state_whose_tasks_are_no_folder_is_refused(tmp_path: Path) -> None:
    """The setting names a wrong folder, or the folder is damaged."""
    state = tmp_path / "state"
    state.mkdir()
    (state / "tasks").write_bytes(b"")
    assert str(state / "tasks") in refusal(tmp_path, "--state-dir", str(state))


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    """A downgrade must not guess what the newer one meant."""
    state = tmp_path / "state"
    state.mkdir()
    with sqlite3.connect(state / "pulsar-api.db") as db:
        db.execute("PRAGMA user_version = 1000")
    db.close()
    assert "was made by a newer version" in refusal(tmp_path, "--state-dir", str(state))


def test_a_daemon_that_cannot_load_its_tasks_exits(tmp_path: Path) -> None:
    """The exit status is 1, so that systemd sees a failure."""
    state = tmp_path / "state"
    state.mkdir()
    with sqlite3.connect(state / "pulsar-api.db") as db:
        db.execute("PRAGMA user_version = 1")  # and no table
    db.close()
    options = ("--port", "0", "--state-dir", str(state))
    process = subprocess.Popen(
        [*WAYS["python"], *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: process.poll() is not None, "the end of the daemon")
        assert process.returncode == 1
    finally:
        process.kill()
        process.wait()


def test_a_busy_port_is_reported(tmp_path: Path) -> None:
    """The other program keeps the port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        said = refusal(tmp_path, busy=sock.getsockname()[1])
    assert said == "cannot listen on 127.0.0.1 port {port}: Address already in use"


def test_a_busy_endpoint_is_reported(tmp_path: Path) -> None:
    """The error has the endpoint as it was given."""
    text = "tcp:{port}:interface=127.0.0.1"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        said = refusal(tmp_path, "--listen", text, busy=sock.getsockname()[1])
    assert said == f"cannot listen on {text}: Address already in use"


def test_a_busy_unix_socket_is_reported(tmp_path: Path) -> None:
    """The other program keeps the socket."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        said = refusal(tmp_path, "--listen", f"unix:{path}")
        assert said.startswith(f"cannot listen on unix:{path}: ")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_second_daemon_on_the_same_port_does_not_start(
    daemon: Daemon, tmp_path: Path
) -> None:
    """The first daemon is not disturbed."""
    said = refusal(tmp_path, busy=daemon.port)
    assert said == "cannot listen on 127.0.0.1 port {port}: Address already in use"
    assert daemon.get("/tasks").status == 200


def test_a_state_dir_that_another_daemon_uses_is_refused(
    daemon: Daemon, script: Script, tmp_path: Path
) -> None:
    """Two daemons would start the same tasks. The first one continues."""
    said = refusal(tmp_path, "--state-dir", str(daemon.state))
    expected = f"another pulsar-api uses {daemon.state}. Give each its own folder"
    assert said == f"--state-dir: {expected}"
    script("deploy", "#!/bin/sh\nexit 0\n")
    number = daemon.run("site", "production", "deploy")
    assert daemon.ended(number)["status"] == "finished"


def test_a_state_dir_is_free_when_its_daemon_has_ended(daemon: Daemon) -> None:
    """After ``kill -9`` the operator need not remove anything."""
    daemon.kill()
    daemon.start()
    assert daemon.get("/tasks").status == 200


def test_allow_anonymous_serves_everybody(start: Start) -> None:
    """The refusal names this option."""
    daemon = start("--interface", "0.0.0.0", "--allow-anonymous")
    assert daemon.host == "0.0.0.0"
    assert daemon.get("/tasks").status == 200


def test_allow_anonymous_serves_everybody_by_an_endpoint(start: Start) -> None:
    """The option ``--listen`` behaves like ``--interface``."""
    daemon = start("--listen", "tcp:0", "--allow-anonymous")
    assert daemon.host == "0.0.0.0"


def test_the_port_of_the_refusals_is_usable(start: Start) -> None:
    """So the port is not the reason for a refusal."""
    with reserved() as port:
        assert not answers(port)
        daemon = start("--port", str(port))
        assert daemon.port == port
        assert answers(port)
        assert daemon.arguments[0] == sys.executable
