"""Turns a task into the list of arguments that runs, and refuses unsafe names."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import evolve, frozen

from pulsar_api.errors import InvalidInput, NoListing
from pulsar_api.tasks import secret_forms
from pulsar_api.tasks.accounts import OWN_ACCOUNT, Accounts
from pulsar_api.tasks.model import MASK, Account, Command, TaskSpec
from pulsar_api.tasks.presets import DETECTED, Template, fill

NOTHING: Mapping[str, str] = {}

MAX_NAME = 100
MAX_ACTION = 200
MAX_VARIABLES = 100
MAX_VARIABLES_BYTES = 64 * 1024

_RUBY = Path(__file__).parents[1] / "ruby"

# Programs and loaders read variables of these names before the program's own code runs.
_DANGEROUS = re.compile(
    r"(LD_|DYLD_|GLIBC_|GCONV_|MALLOC_|RUBY|GEM_|BUNDLE|RAKE|PYTHON|PERL|NODE|GIT_|SSH_"
    r"|BASH|PULSAR_|XDG_|LC_).*"
    r"|PATH|HOME|SHELL|ENV|IFS|CDPATH|SHELLOPTS|PS4|PROMPT_COMMAND|EDITOR|PAGER|VISUAL"
    r"|TMPDIR|LANG|LOCALDOMAIN|HOSTALIASES|RES_OPTIONS|USER|LOGNAME"
)

# Variables from systemd to the daemon, and the daemon's own: tasks must not get them.
_OURS = re.compile(
    r"CREDENTIALS_DIRECTORY|NOTIFY_SOCKET|WATCHDOG_\w+|LISTEN_\w+|JOURNAL_STREAM"
    r"|INVOCATION_ID|MEMORY_PRESSURE_\w+|PULSAR_API_\w+|PULSAR_(APP|ENV|ACTION|TASK_ID"
    r"|USER)|PULSAR_VAR_.*"
)

_PERSONAL = frozenset(
    "HOME USER LOGNAME SHELL MAIL SUDO_USER SUDO_UID SUDO_GID XDG_RUNTIME_DIR "
    "XDG_CONFIG_HOME XDG_CACHE_HOME XDG_DATA_HOME XDG_STATE_HOME".split()
)
"""Variables that describe a user. A command under another account gets its own."""


@frozen
class Names:
    """The allowed names. A pattern must match a whole name."""

    app: re.Pattern[str] = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
    env: re.Pattern[str] = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
    action: re.Pattern[str] = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_:.-]*")
    variable: re.Pattern[str] = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
    forbidden_actions: frozenset[str] = frozenset()
    secret_variables: tuple[str, ...] = secret_forms.PATTERNS
    """Patterns for the names of secret variables, as for `fnmatch`."""


@frozen
class Commands:
    """Checks tasks and turns them into commands, by one template."""

    template: Template
    environment: Mapping[str, str]
    config_repo: str | None = None
    config_branch: str = "master"
    names: Names = Names()
    accounts: Accounts = OWN_ACCOUNT

    def split(self, asked: TaskSpec) -> tuple[TaskSpec, Mapping[str, str]]:
        """Return a task without the values of its secrets, and these values by name.

        A variable is secret if its name matches a pattern, or if the request lists it.
        """
        patterns = self.names.secret_variables
        secrets = {
            name: value
            for name, value in asked.variables.items()
            if name in asked.secret_names or secret_forms.is_secret(name, patterns)
        }
        variables = {**asked.variables, **dict.fromkeys(secrets, MASK)}
        names = frozenset(secrets)
        return evolve(asked, variables=variables, secret_names=names), secrets

    def check(self, spec: TaskSpec) -> None:
        """Raise `InvalidInput` for the first value that this template does not accept."""
        _check_name("app", spec.app, self.names.app, MAX_NAME)
        _check_name("env", spec.env, self.names.env, MAX_NAME)
        action = spec.action
        if self.template.action_arguments:
            action, bracket, rest = action.partition("[")
            if bracket and not re.fullmatch(r"[A-Za-z0-9_:.,/@+ -]*\]", rest):
                detail = "write arguments as action[one,two], with A-Z a-z 0-9 _:./@+- only"
                raise InvalidInput("action", detail)
        _check_name("action", action, self.names.action, MAX_ACTION)
        if len(spec.action) > MAX_ACTION:
            raise InvalidInput("action", f"at most {MAX_ACTION} characters are allowed")
        if action in self.names.forbidden_actions:
            raise InvalidInput("action", "the settings of this daemon forbid it")
        if spec.user is not None:
            check_printable("user", spec.user.name)
        self._account(spec)
        self._check_variables(spec.variables)

    def _check_variables(self, variables: Mapping[str, str]) -> None:
        if len(variables) > MAX_VARIABLES:
            detail = f"at most {MAX_VARIABLES} are allowed"
            raise InvalidInput("variables", detail)
        size = 0
        for key, value in variables.items():
            where = f"variables.{key[:MAX_NAME]}"
            if not self.names.variable.fullmatch(key):
                raise InvalidInput(where, f"a key must match {self.names.variable.pattern}")
            check_printable(where, key)
            if "=" in key:
                raise InvalidInput(where, "a key must not contain =")
            if self.template.word_keys and not re.fullmatch(r"\w+", key, re.ASCII):
                raise InvalidInput(where, "for this command a key is only A-Z a-z 0-9 _")
            by_name = self.template.into_environment or self.template.word_keys
            if by_name and (_DANGEROUS.fullmatch(key) or key in self.environment):
                detail = "this name would change how programs work. Choose another name"
                raise InvalidInput(where, detail)
            if "\0" in value:
                raise InvalidInput(where, "NUL is not allowed")
            try:
                size += len(f"{key}{value}".encode())
            except UnicodeEncodeError:
                raise InvalidInput(where, "half a surrogate pair is no text") from None
        if size > MAX_VARIABLES_BYTES:
            detail = f"together at most {MAX_VARIABLES_BYTES} bytes are allowed"
            raise InvalidInput("variables", detail)

    def command(
        self, spec: TaskSpec, task_id: int, secrets: Mapping[str, str] = NOTHING
    ) -> Command:
        """Return the command of a task. Without ``secrets`` it is safe to display.

        Raises:
            InvalidInput: The template does not accept a value.
        """
        spec = evolve(spec, variables={**spec.variables, **secrets})
        self.check(spec)
        return self._made(self.template.arguments, spec, task_id)

    def listing(self, app: str, env: str) -> Command:
        """Return the command that prints the actions of an app.

        Raises:
            InvalidInput: The template does not accept a value.
            NoListing: The template has no such command.
        """
        if not self.template.listing:
            raise NoListing
        _check_name("app", app, self.names.app, MAX_NAME)
        _check_name("env", env, self.names.env, MAX_NAME)
        return self._made(self.template.listing, TaskSpec(app, env, ""), 0)

    def version(self) -> Command:
        """Return the command that prints the version of pulsar, for `preset_for`.

        It runs under the first account of ``[[run-as]]``, because an account of tasks may
        own the programs in PATH, and the daemon must not run those as itself.
        """
        account = next((account for _, account in self.accounts.tables), None)
        arguments = DETECTED, "--version"
        return Command(arguments, self._inherited(account), account=account)

    def _made(self, template: Sequence[str], spec: TaskSpec, task_id: int) -> Command:
        places = {
            "app": spec.app,
            "env": spec.env,
            "action": spec.action,
            "config_repo": self.config_repo,
            "config_branch": self.config_branch,
            "id": str(task_id),
            "user": _name(spec),
        }
        arguments: list[str] = []
        for argument in template:
            if argument == "{variables}":
                arguments += self._variables(spec)
            elif "{config_repo}" in argument and self.config_repo is None:
                if arguments[-1].startswith("-"):
                    del arguments[-1]
            else:
                arguments.append(fill(argument, places))
        used = self.template
        account = self._account(spec)
        return Command(
            arguments=tuple(arguments),
            environment=self._environment(spec, task_id, account),
            account=account,
            directory=used.directory and fill(used.directory, places),
            last_line=used.last_line and fill(used.last_line, places),
        )

    def _account(self, spec: TaskSpec) -> Account | None:
        action = spec.action
        if self.template.action_arguments:
            action = action.partition("[")[0]
        # A listing has no action: it shows all actions of the app.
        return self.accounts.of(spec.app, spec.env, action or None)

    def _variables(self, spec: TaskSpec) -> list[str]:
        # Every user of the machine can read the arguments of a process.
        left_out = spec.secret_names if not self.template.secrets_in_arguments else ()
        return [
            part.format(key=key, value=value) if "{" in part else part
            for key, value in spec.variables.items()
            if key not in left_out
            for part in self.template.variable
        ]

    def _inherited(self, account: Account | None) -> dict[str, str]:
        result = {k: v for k, v in self.environment.items() if not _OURS.fullmatch(k)}
        if account is not None:
            for name in _PERSONAL & result.keys():
                del result[name]
            result.update(HOME=account.home, USER=account.name, LOGNAME=account.name)
        return result

    def _environment(
        self, spec: TaskSpec, task_id: int, account: Account | None
    ) -> dict[str, str]:
        result = self._inherited(account)
        if self.template.ruby:
            # Ruby buffers its output unless that is a terminal; RUBYOPT can change that.
            result.pop("RAKEOPT", None)
            result["RUBYOPT"] = f"{result.get('RUBYOPT', '')} -rpulsar_live".strip()
            folders = [str(_RUBY), result.get("RUBYLIB", "")]
            result["RUBYLIB"] = ":".join(filter(None, folders))
        if self.template.into_environment:
            result.update(spec.variables)
        elif self.template.word_keys:  # Rake itself accepts arguments of the form key=value
            result.update({key: spec.variables[key] for key in spec.secret_names})
        result.update({f"PULSAR_VAR_{k}": v for k, v in spec.variables.items()})
        result["PULSAR_APP"] = spec.app
        result["PULSAR_ENV"] = spec.env
        result["PULSAR_ACTION"] = spec.action
        result["PULSAR_TASK_ID"] = str(task_id)
        result["PULSAR_USER"] = _name(spec)
        return result


def _name(spec: TaskSpec) -> str:
    return "" if spec.user is None else spec.user.name


def shown(command: Command) -> str:
    """Return a command as one line of printable characters, quoted as for a shell.

    The line is for people and logs. Nothing runs it.
    """
    return " ".join(map(_quoted, command.shown or command.arguments))


_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t", "\\": r"\\", "'": r"\'"}


def _quoted(argument: str) -> str:
    if argument.isprintable():
        return shlex.quote(argument)
    return "$'" + "".join(map(_escaped, argument)) + "'"


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isprintable():
        return character
    # Always three digits, so that a digit that follows does not join the number.
    data = character.encode("utf-8", "surrogateescape")
    return "".join(f"\\{byte:03o}" for byte in data)


def check_printable(field: str, text: str) -> None:
    """Raise `InvalidInput` for a name that no setting can allow.

    NUL would end an argument or a variable. A line end would begin another line in a log
    or a record. A program would read a leading hyphen as an option.
    """
    if not text:
        raise InvalidInput(field, "must not be empty")
    if text.startswith("-"):
        raise InvalidInput(field, "must not begin with -")
    if not text.isprintable():
        raise InvalidInput(field, "must consist of printable characters")


def _check_name(field: str, value: str, pattern: re.Pattern[str], limit: int) -> None:
    if len(value) > limit:
        raise InvalidInput(field, f"at most {limit} characters are allowed")
    if not pattern.fullmatch(value) or ".." in value:
        raise InvalidInput(
            field, f"must match {pattern.pattern}, without two dots in a row"
        )
    check_printable(field, value)
