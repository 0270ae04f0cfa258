"""Loads the settings from the command line, a file and the environment."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import fields

from pulsar_api.config.checks import check_together
from pulsar_api.config.settings import Settings
from pulsar_api.errors import SettingsError

CLI = "the command line"


def load(given: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    """Return the settings of the command line and of the file that it names.

    ``given`` has the options of the command line, by names with dashes.

    Raises:
        SettingsError: A setting is wrong; one line names the option, or file and key.
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
                raise SettingsError(f"{where} is not an option of pulsar-api")
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
    check_together(settings, given)
    return settings


def _fill_in(values: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Add the defaults that depend on other settings or the environment."""
    values.setdefault("port", 8001 if values.get("dev") else 8081)
    values.setdefault("state_dir", default_state_dir(environ))
    auth = ("auth_username", "auth_password", "auth_method", "auth_members")
    if any(values.get(name) for name in auth):
        values.setdefault("auth_provider", "github")


def _read_secrets(values: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Read secrets from the files that have them."""
    for name in ("auth_password", "github_client_secret"):
        path = values.get(f"{name}_file")
        if path is None:
            continue
        option = f"{name}_file".replace("_", "-")
        if name in values:
            raise SettingsError(
                f"{option} and {name.replace('_', '-')} cannot be used together"
            )
        try:
            text = Path(_credential(path, environ)).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or "it is not UTF-8"
            raise SettingsError(f"{option}: cannot read {path}: {why}") from None
        values[name] = text.strip("\r\n")
        if not values[name]:
            raise SettingsError(f"{option}: {path} is empty")


def _read_file(path: str) -> dict[str, object]:
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as e:
        raise SettingsError(f"--config: cannot read {path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SettingsError(f"--config: {path} is not TOML: {e}") from None


def state_dir(config: str, environ: Mapping[str, str]) -> str:
    """Return the state folder of a daemon with this file of settings.

    Raises `SettingsError` if the file cannot be read, or names no folder as a text.
    """
    found = _read_file(config).get("state-dir", default_state_dir(environ))
    if not isinstance(found, str):
        raise SettingsError(f"{config}: state-dir: must be a text, the path of a folder")
    return found


def default_state_dir(environ: Mapping[str, str]) -> str:
    """Return the default of ``--state-dir``."""
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
