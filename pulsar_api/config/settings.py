"""Makes one frozen `Settings` of command line, file and environment."""

import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import field, fields, frozen

from pulsar_api.auth.rights import Rule
from pulsar_api.config import values
from pulsar_api.errors import SettingsError
from pulsar_api.tasks.accounts import RunAs
from pulsar_api.tasks.secret_forms import PATTERNS
from pulsar_api.tasks.targets import Target

CLI = "the command line"
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
    """Everything that can be set. Times are seconds; None and 0 mean "none"."""

    config_repo: str | None = _option(
        values.text, "configuration repository for the command"
    )
    config_branch: str = _option(values.text, "its branch", "master")
    port: int = _option(
        values.number(0, 65535), "TCP port, 0 for any free one [8081; 8001 with --dev]"
    )
    log_dir: str | None = _option(
        values.text, "folder for pulsar-api.log, made if missing [standard output]"
    )
    ssl_key: str | None = _option(values.text, "private key file (PEM)")
    ssl_cert: str | None = _option(
        values.text, "certificate file (PEM), the CA chain appended in it"
    )
    ssl_pfx: str | None = _option(
        values.text, "PKCS #12 file with key and certificate; overrides the two above"
    )
    ssl_passphrase: str | None = _option(values.text, "file that holds the passphrase")
    ssl_client_ca: str | None = _option(
        values.text,
        "file of CAs (PEM); only who has a certificate of one of them may connect",
    )
    hsts: int = _option(
        values.number(0, 10 * 366 * 86400),
        "seconds for which browsers come back by TLS only, 0: not said",
        0,
        file_only=True,
    )
    auth_username: str | None = _option(
        values.name, "static: who is let in; github: the daemon's own user there"
    )
    auth_password: str | None = _option(
        values.text,
        "that user's password or token; others on this machine see it: rather a file",
        secret=True,
    )
    auth_password_file: str | None = _option(
        values.text, "file that holds that user's password or token"
    )
    auth_provider: str | None = _option(
        values.one_of(*PROVIDERS), "who knows the users: github, static or tokens [github]"
    )
    auth_method: str | None = _option(
        values.one_of("user", "org", "team"),
        "github: what has to be in --auth-members [user]",
    )
    auth_members: tuple[str, ...] = _option(
        values.words,
        "github: who is let in, by commas: logins, organisations or org/team",
        (),
    )
    dev: bool = _option(
        values.flag,
        "development: port 8001, TLS for *.pulsar.local, log to the terminal",
        False,
    )
    interface: str = _option(values.address, "address to listen on", "127.0.0.1")
    listen: tuple[str, ...] = _option(
        values.texts, "Twisted endpoint to listen on instead of --port; may be repeated", ()
    )
    public_url: str | None = _option(
        values.url, "the address under which people reach this daemon, for links"
    )
    allow_anonymous: bool = _option(
        values.flag, "listen on other addresses than loopback without authentication", False
    )
    hosts: tuple[str, ...] = _option(
        values.texts,
        "host names of this daemon, *.example for all below",
        (),
        file_only=True,
    )
    proxies: tuple[str, ...] = _option(
        values.addresses, "proxies whose X-Forwarded-For is believed", (), file_only=True
    )
    rights: tuple[Rule, ...] | None = _option(
        values.rules, "who may do what", file_only=True
    )
    confirm: tuple[Target, ...] = _option(
        values.targets,
        "where the page asks again before it does something",
        (),
        file_only=True,
    )
    github_url: str = _option(
        values.url, "where people sign in", "https://github.com", file_only=True
    )
    github_api_url: str | None = _option(
        values.url, "its API; of an Enterprise server the URL with /api/v3", file_only=True
    )
    github_client_id: str | None = _option(
        values.text, "of the OAuth app, to sign in with a browser", file_only=True
    )
    github_client_secret: str | None = _option(
        values.text, "of the same", file_only=True, secret=True
    )
    github_client_secret_file: str | None = _option(
        values.text, "file that holds that", file_only=True
    )
    state_dir: str = _option(
        values.text,
        "folder of database and output [$STATE_DIRECTORY or ~/.local/state/pulsar-api]",
    )
    command: str = _option(
        values.text,
        "what a task runs: pulsar, pulsar-0.3, pulsar-1, capistrano, scripts, "
        "or a line like 'deploy {app} {env} {action}'",
        "pulsar",
    )
    poll_timeout: float = _option(
        values.seconds(1, 3600), "seconds that a long-poll waits at most", 30.0
    )
    max_running: int = _option(
        values.number(1, 10000), "tasks that run at the same time", 16
    )
    max_running_per_target: int = _option(
        values.number(0, 10000),
        "tasks of one app and env that run at the same time, 0: any",
        0,
    )
    max_queued: int = _option(values.number(0, 100_000), "tasks that may wait", 1000)
    max_connections_per_address: int = _option(
        values.number(0, 100_000), "connections of one address at a time, 0: any", 1000
    )
    max_requests_per_address: int = _option(
        values.number(0, 100_000), "requests of one address in a second, 0: any", 100
    )
    kill_grace: float = _option(values.seconds(0, 3600), "seconds from TERM to KILL", 10.0)
    task_timeout: float = _option(
        values.seconds(0), "seconds after which a task is ended, 0: never", 0.0
    )
    silence_timeout: float = _option(
        values.seconds(0),
        "seconds without output after which a task is ended, 0: never",
        0.0,
    )
    drain_timeout: float = _option(
        values.seconds(0), "seconds that a stopping daemon waits for running tasks", 0.0
    )
    keep_tasks: int = _option(
        values.number(0, 10_000_000), "ended tasks that are kept, 0: all", 10_000
    )
    keep_days: float = _option(
        values.days, "days for which an ended task is kept, 0: for ever", 365.0
    )
    max_state_size: int = _option(
        values.size, "bytes of output and index of ended tasks that are kept, 0: all", 0
    )
    max_output_size: int = _option(
        values.size,
        "bytes of output of one task, and of its index; else the middle is cut, 0: never",
        1 << 30,
    )
    app_pattern: re.Pattern[str] | None = _option(
        values.pattern, "which app names are allowed", file_only=True
    )
    env_pattern: re.Pattern[str] | None = _option(
        values.pattern, "which env names are allowed", file_only=True
    )
    action_pattern: re.Pattern[str] | None = _option(
        values.pattern, "which actions are allowed", file_only=True
    )
    variable_pattern: re.Pattern[str] | None = _option(
        values.pattern, "which keys of variables are allowed", file_only=True
    )
    run_as: tuple[RunAs, ...] = _option(
        values.run_as, "whom the commands of which targets run as", (), file_only=True
    )
    allow_sudo: bool = _option(
        values.flag,
        "let tasks use sudo and other programs that change the user",
        False,
        file_only=True,
    )
    forbidden_actions: tuple[str, ...] = _option(
        values.texts, "actions that nobody may run", (), file_only=True
    )
    secret_variables: tuple[str, ...] = _option(
        values.texts, "which variables are secret, by name", PATTERNS, file_only=True
    )

    @property
    def authenticated(self) -> bool:
        """Whether callers are asked who they are."""
        return self.auth_provider is not None

    @property
    def api_url(self) -> str:
        """Where GitHub's API is."""
        if self.github_api_url is not None:
            return self.github_api_url
        if self.github_url == "https://github.com":
            return "https://api.github.com"
        return f"{self.github_url}/api/v3"

    @property
    def secure(self) -> bool:
        """Whether TLS was asked for."""
        return bool(self.dev or self.ssl_key or self.ssl_cert or self.ssl_pfx)


def options() -> list[tuple[str, str, object, bool]]:
    """Return name, help, default and "is a flag" of what the command line takes."""
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


def _read_file(path: str) -> dict[str, object]:
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as e:
        raise SettingsError(f"--config: cannot read {path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SettingsError(f"--config: {path} is no TOML: {e}") from None


def load(given: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    """Make settings of what the command line gave (names with dashes; absent: not given).

    Raises `SettingsError` with one line that names the option, or file and key.
    """
    known = {a.name.replace("_", "-"): a for a in fields(Settings)}
    path = given.get("config")
    in_file = {} if path is None else _read_file(str(path))
    values: dict[str, Any] = {}
    for source, found in ((str(path), in_file), (CLI, given)):
        for name, value in found.items():
            if source == CLI and name == "config":
                continue
            where = f"--{name}" if source == CLI else f"{source}: {name}"
            if name not in known:
                raise SettingsError(f"{where} is no option of pulsar-api")
            attribute = known[name]
            try:
                values[attribute.name] = attribute.metadata["parse"](value)
            except ValueError as e:
                raise SettingsError(f"{where}: {e}") from None
    _read_secrets(values, environ)
    _fill_in(values, environ)
    for name in ("ssl_key", "ssl_cert", "ssl_pfx", "ssl_passphrase", "ssl_client_ca"):
        if name in values:
            values[name] = _credential(values[name], environ)
    for name in ("state_dir", "log_dir"):
        if name in values:  # twistd may change to another folder before it is used
            values[name] = str(Path(values[name]).absolute())
    settings = Settings(**values)
    _check_together(settings, given)
    return settings


def _fill_in(values: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Add the defaults that depend on something."""
    values.setdefault("port", 8001 if values.get("dev") else 8081)
    values.setdefault("state_dir", default_state_dir(environ))
    auth = ("auth_username", "auth_password", "auth_method", "auth_members")
    if any(values.get(name) for name in auth):
        values.setdefault("auth_provider", "github")


def _read_secrets(values: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Take secrets out of the files that hold them."""
    for name in ("auth_password", "github_client_secret"):
        path = values.get(f"{name}_file")
        if path is None:
            continue
        option = f"{name}_file".replace("_", "-")
        if name in values:
            raise SettingsError(f"{option} and {name.replace('_', '-')} exclude each other")
        try:
            text = Path(_credential(path, environ)).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or "it is no UTF-8"
            raise SettingsError(f"{option}: cannot read {path}: {why}") from None
        values[name] = text.strip("\r\n")
        if not values[name]:
            raise SettingsError(f"{option}: {path} is empty")


def _check_together(settings: Settings, given: Mapping[str, object]) -> None:
    _check_authentication(settings)
    pem = (settings.ssl_key, settings.ssl_cert)
    if any(pem) and not all(pem) and not settings.ssl_pfx:
        missing = "--ssl-cert" if settings.ssl_key else "--ssl-key"
        raise SettingsError(f"--ssl-key and --ssl-cert go together; {missing} is missing")
    if settings.ssl_passphrase and not (settings.ssl_pfx or any(pem)):
        raise SettingsError("--ssl-passphrase needs --ssl-key and --ssl-cert, or --ssl-pfx")
    if settings.ssl_client_ca:
        _check_client_ca(settings)
    if settings.dev and (settings.ssl_pfx or any(pem)):
        raise SettingsError("--dev brings its own certificate; leave the --ssl options out")
    if settings.listen and "port" in given:
        raise SettingsError("--listen replaces --port; give one of them")


def _check_client_ca(settings: Settings) -> None:
    if not settings.secure:
        raise SettingsError(
            "--ssl-client-ca needs TLS: --ssl-key and --ssl-cert, or --ssl-pfx"
        )
    # A door beside the one that is locked.
    for endpoint in settings.listen:
        if endpoint.startswith(("tls:", "ssl:")):
            raise SettingsError(
                f"--ssl-client-ca does not hold for --listen {endpoint}, which has TLS of "
                "its own; use tcp:"
            )


def _check_authentication(s: Settings) -> None:
    if s.authenticated and s.allow_anonymous:
        raise SettingsError("--allow-anonymous and the --auth options exclude each other")
    if s.rights is not None and not s.authenticated:
        raise SettingsError("rights need --auth-provider: somebody who knows the users")
    own = s.auth_username is not None, s.auth_password is not None
    if s.auth_provider == "static":
        if not all(own):
            raise SettingsError(
                "--auth-provider static needs --auth-username and --auth-password-file"
            )
    elif any(own) and not all(own):
        missing = "--auth-password-file" if own[0] else "--auth-username"
        raise SettingsError(
            f"--auth-username and its password go together; {missing} is missing"
        )
    _check_github(s)
    if (s.github_client_id is None) != (s.github_client_secret is None):
        raise SettingsError("github-client-id and github-client-secret-file go together")


def _check_github(s: Settings) -> None:
    if s.auth_provider != "github":
        for name in ("auth_method", "auth_members", "github_client_id"):
            if getattr(s, name):
                option = name.replace("_", "-")
                raise SettingsError(f"{option} is only for --auth-provider github")
    elif not s.auth_members:
        raise SettingsError(
            "--auth-provider github needs --auth-members: who of all its users is let in"
        )
    elif s.auth_method == "team" and not all(m.count("/") == 1 for m in s.auth_members):
        raise SettingsError("--auth-method team wants --auth-members like org/team")


def default_state_dir(environ: Mapping[str, str]) -> str:
    """Return where the state is if nobody says where."""
    if environ.get("STATE_DIRECTORY"):
        return environ["STATE_DIRECTORY"].split(":")[0]
    home = environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return str(Path(home) / "pulsar-api")


def _credential(name: str, environ: Mapping[str, str]) -> str:
    """Return the path of a file; a bare name may be one of systemd's credentials."""
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if folder and "/" not in name and not Path(name).exists():
        return str(Path(folder) / name)
    return name


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach an address."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
