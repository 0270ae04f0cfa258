"""Checks, before the daemon starts, everything that can be checked by then."""

import os
from collections.abc import Container, Mapping
from pathlib import Path

from pulsar_api.auth import credentials
from pulsar_api.config.settings import Settings
from pulsar_api.daemon.state import DATABASE, TASKS, lock, make_folder
from pulsar_api.errors import SettingsError
from pulsar_api.execution import cgroups
from pulsar_api.network import certificates, listener
from pulsar_api.storage import tasks
from pulsar_api.tasks import presets
from pulsar_api.tasks.accounts import Accounts, check_capabilities, check_limits
from pulsar_api.tasks.commands import Commands, Names

LOG = "pulsar-api.log"


def check(settings: Settings, *, own_files: bool) -> None:
    """Raise if the daemon could not start with these settings. Nothing stays open.

    ``own_files``: whether the daemon will write as the user of this process.

    Raises:
        SettingsError: A setting is wrong.
        CannotListen: A port cannot be opened.
        StoreUnavailable: A database cannot be used.
    """
    identity = certificates.load(settings)
    listener.try_out(settings, only_loopback(settings, identity))
    make_commands(settings, {})
    if not own_files:
        return
    if settings.log_dir:
        make_folder("--log-dir", Path(settings.log_dir))
        log = Path(settings.log_dir) / LOG
        if log.exists() and not (log.is_file() and os.access(log, os.W_OK)):
            raise SettingsError(f"--log-dir: {log} is not a writable file")
    state = Path(settings.state_dir)
    make_folder("--state-dir", state)
    make_folder("--state-dir", state / TASKS)
    os.close(lock(state))
    tasks.prepare(state / DATABASE)
    credentials.prepare(state / credentials.FILE)


def only_loopback(settings: Settings, identity: certificates.Identity | None) -> str | None:
    """Return why the daemon may listen on loopback addresses only, None if on any."""
    shared = identity is not None and certificates.is_development(identity)
    return listener.why_only_loopback(settings, development_key=shared)


def make_commands(settings: Settings, environment: Mapping[str, str]) -> Commands:
    """Return the commands that the settings describe.

    Raises:
        SettingsError: The settings are wrong, or name accounts that tasks cannot have.
    """
    name = settings.command
    template = presets.parse_template("pulsar-0.3" if name == presets.DETECTED else name)
    repo = settings.config_repo
    if template.needs_repo and repo is None:
        raise SettingsError(f"--command {name} needs --config-repo")
    if template.local_repo and repo is not None:
        if not Path(repo).is_dir():
            raise SettingsError(f"--config-repo: {repo} is not a folder; {name} needs one")
        repo = str(Path(repo).resolve())
    usual = Names()
    names = Names(
        settings.app_pattern or usual.app,
        settings.env_pattern or usual.env,
        settings.action_pattern or usual.action,
        settings.variable_pattern or usual.variable,
        frozenset(settings.forbidden_actions),
        settings.secret_variables,
    )
    accounts = find_accounts(settings, cgroups.available(cgroups.delegated()))
    return Commands(template, environment, repo, settings.config_branch, names, accounts)


def find_accounts(settings: Settings, controllers: Container[str]) -> Accounts:
    """Return the accounts of tasks.

    Raises:
        SettingsError: This process cannot give tasks these accounts or limits.
    """
    accounts = Accounts.find(settings.run_as, os.geteuid())
    if settings.run_as:
        check_capabilities()
        check_limits(settings.run_as, controllers)
    return accounts
