"""All settings of the daemon: their names, types, defaults and help texts."""

import re
from collections.abc import Callable
from typing import Any

from attrs import field, fields, frozen

from pulsar_api.auth.rights import Rule
from pulsar_api.config import values
from pulsar_api.tasks.accounts import RunAs
from pulsar_api.tasks.secret_forms import PATTERNS
from pulsar_api.tasks.targets import Target

PROVIDERS = ("github", "static", "tokens")


def _option(
    parser: Callable[[object], Any],
    help: str,
    default: Any = None,
    *,
    file_only: bool = False,
    secret: bool = False,
) -> Any:
    metadata = {"parse": parser, "help": help, "file_only": file_only}
    return field(default=default, metadata=metadata, repr=not secret)


@frozen(kw_only=True)
class Settings:
    """All settings. Times are in seconds; None and 0 mean that there is no limit."""

    config_repo: str | None = _option(
        values.text, "Pass REPO to the command as its configuration repository"
    )
    config_branch: str = _option(
        values.text, "Use this branch of the configuration repository", "master"
    )
    port: int = _option(
        values.number(0, 65535),
        "Port to listen on, 0 for any free one [8081; 8001 with --dev]",
    )
    log_dir: str | None = _option(
        values.text,
        "Write pulsar-api.log to this folder, made if missing [standard output]",
    )
    ssl_key: str | None = _option(values.text, "Read the private key from this file (PEM)")
    ssl_cert: str | None = _option(
        values.text,
        "Read the certificate, with the CA chain appended, from this file (PEM)",
    )
    ssl_pfx: str | None = _option(
        values.text,
        "Read key and certificate from this PKCS #12 file instead of the two above",
    )
    ssl_passphrase: str | None = _option(
        values.text, "Read the passphrase of the key from this file"
    )
    ssl_client_ca: str | None = _option(
        values.text,
        "Accept only clients with a certificate issued by a CA in this file (PEM)",
    )
    hsts: int = _option(
        values.number(0, 10 * 366 * 86400),
        "Tell browsers to use TLS only for this many seconds, 0 for no such header",
        0,
        file_only=True,
    )
    auth_username: str | None = _option(
        values.name,
        "With static: the user name; with github: the daemon's own account there",
    )
    auth_password: str | None = _option(
        values.text,
        "Password or token of --auth-username; visible to all users of this machine",
        secret=True,
    )
    auth_password_file: str | None = _option(
        values.text, "Read the password or token of --auth-username from this file"
    )
    auth_provider: str | None = _option(
        values.one_of(*PROVIDERS),
        "Authenticate callers by github, static or tokens [github]",
    )
    auth_method: str | None = _option(
        values.one_of("user", "org", "team"),
        "With github: what --auth-members lists: user, org or team [user]",
    )
    auth_members: tuple[str, ...] = _option(
        values.words,
        "With github: logins, organisations or org/team to accept, separated by commas",
        (),
    )
    dev: bool = _option(
        values.flag,
        "Run for development: port 8001, TLS for *.pulsar.local, log to the terminal",
        False,
    )
    interface: str = _option(values.address, "Address to listen on", "127.0.0.1")
    listen: tuple[str, ...] = _option(
        values.texts,
        "Listen on this Twisted endpoint instead of --port; may be repeated",
        (),
    )
    public_url: str | None = _option(values.url, "Use this URL of the daemon in links")
    allow_anonymous: bool = _option(
        values.flag, "Listen on addresses other than loopback without authentication", False
    )
    hosts: tuple[str, ...] = _option(
        values.texts,
        "Accept requests for these host names, *.example for all below example",
        (),
        file_only=True,
    )
    proxies: tuple[str, ...] = _option(
        values.addresses, "Trust the X-Forwarded-For of these proxies", (), file_only=True
    )
    rights: tuple[Rule, ...] | None = _option(
        values.rules, "Rules that give rights to callers", file_only=True
    )
    confirm: tuple[Target, ...] = _option(
        values.targets,
        "Targets and actions for which the page asks for confirmation",
        (),
        file_only=True,
    )
    github_url: str = _option(
        values.url,
        "URL of GitHub or a GitHub Enterprise server",
        "https://github.com",
        file_only=True,
    )
    github_api_url: str | None = _option(
        values.url,
        "URL of its API [https://api.github.com, else github-url with /api/v3]",
        file_only=True,
    )
    github_client_id: str | None = _option(
        values.text,
        "Client ID of the OAuth app for signing in with a browser",
        file_only=True,
    )
    github_client_secret: str | None = _option(
        values.text, "Client secret of the OAuth app", file_only=True, secret=True
    )
    github_client_secret_file: str | None = _option(
        values.text,
        "Read the client secret of the OAuth app from this file",
        file_only=True,
    )
    state_dir: str = _option(
        values.text,
        "Keep database and output here [$STATE_DIRECTORY or ~/.local/state/pulsar-api]",
    )
    command: str = _option(
        values.text,
        "Run tasks with this preset (pulsar, pulsar-0.3, pulsar-1, capistrano, scripts) or "
        "a command line such as 'deploy {app} {env} {action}'",
        "pulsar",
    )
    poll_timeout: float = _option(
        values.seconds(1, 3600), "Answer a long-poll after at most this many seconds", 30.0
    )
    max_running: int = _option(
        values.number(1, 10000), "Run at most this many tasks at a time", 16
    )
    max_running_per_target: int = _option(
        values.number(0, 10000),
        "Run at most this many tasks of one app and env at a time, 0 for no limit",
        0,
    )
    max_queued: int = _option(
        values.number(0, 100_000), "Let at most this many tasks wait", 1000
    )
    max_connections_per_address: int = _option(
        values.number(0, 100_000),
        "Accept at most this many connections of one address, 0 for no limit",
        1000,
    )
    max_requests_per_address: int = _option(
        values.number(0, 100_000),
        "Answer at most this many requests of one address a second, 0 for no limit",
        100,
    )
    kill_grace: float = _option(
        values.seconds(0, 3600), "Wait this many seconds between TERM and KILL", 10.0
    )
    task_timeout: float = _option(
        values.seconds(0), "End a task after this many seconds, 0 for never", 0.0
    )
    silence_timeout: float = _option(
        values.seconds(0),
        "End a task after this many seconds without output, 0 for never",
        0.0,
    )
    drain_timeout: float = _option(
        values.seconds(0),
        "Wait this many seconds for running tasks when the daemon stops",
        0.0,
    )
    keep_tasks: int = _option(
        values.number(0, 10_000_000),
        "Keep at most this many ended tasks, 0 for all",
        10_000,
    )
    keep_days: float = _option(
        values.days, "Keep an ended task for this many days, 0 for ever", 365.0
    )
    max_state_size: int = _option(
        values.size, "Keep at most this many bytes of output of ended tasks, 0 for all", 0
    )
    max_output_size: int = _option(
        values.size,
        "Keep this many bytes of a task's output and drop the middle beyond, 0 for all",
        1 << 30,
    )
    app_pattern: re.Pattern[str] | None = _option(
        values.pattern, "Regular expression for app names", file_only=True
    )
    env_pattern: re.Pattern[str] | None = _option(
        values.pattern, "Regular expression for env names", file_only=True
    )
    action_pattern: re.Pattern[str] | None = _option(
        values.pattern, "Regular expression for actions", file_only=True
    )
    variable_pattern: re.Pattern[str] | None = _option(
        values.pattern, "Regular expression for names of variables", file_only=True
    )
    run_as: tuple[RunAs, ...] = _option(
        values.run_as, "Accounts that run the commands of given targets", (), file_only=True
    )
    allow_sudo: bool = _option(
        values.flag,
        "Let tasks use sudo and other programs that change the user",
        False,
        file_only=True,
    )
    forbidden_actions: tuple[str, ...] = _option(
        values.texts, "Actions that are refused to all callers", (), file_only=True
    )
    secret_variables: tuple[str, ...] = _option(
        values.texts, "Name patterns of secret variables", PATTERNS, file_only=True
    )

    @property
    def authenticated(self) -> bool:
        """Whether callers have to authenticate."""
        return self.auth_provider is not None

    @property
    def api_url(self) -> str:
        """The URL of GitHub's API."""
        if self.github_api_url is not None:
            return self.github_api_url
        if self.github_url == "https://github.com":
            return "https://api.github.com"
        return f"{self.github_url}/api/v3"

    @property
    def secure(self) -> bool:
        """Whether the daemon uses TLS."""
        return bool(self.dev or self.ssl_key or self.ssl_cert or self.ssl_pfx)


def options() -> list[tuple[str, str, object, bool]]:
    """Return name, help text, default and "is a flag" of each command-line option."""
    return [
        (
            attribute.name.replace("_", "-"),
            attribute.metadata["help"],
            attribute.default,
            attribute.metadata["parse"] is values.flag,
        )
        for attribute in fields(Settings)
        if not attribute.metadata["file_only"]
    ]
