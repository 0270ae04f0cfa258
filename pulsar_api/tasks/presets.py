"""How a task becomes a command: the presets, and templates from the settings."""

import re
import shlex
from collections.abc import Mapping

from attrs import frozen

from pulsar_api.errors import SettingsError


@frozen
class Template:
    """How a task becomes a command.

    ``{app}``, ``{env}``, ``{action}``, ``{config_repo}``, ``{config_branch}``, ``{id}``
    and ``{user}`` are replaced inside one argument. The argument ``{variables}`` becomes
    ``variable`` once for each variable. Without a configuration repository, the argument
    with ``{config_repo}`` and its flag are left out.
    """

    arguments: tuple[str, ...]
    listing: tuple[str, ...] = ()
    """The command that prints one action per line: the name, ``#``, a description."""
    variable: tuple[str, ...] = ("{key}={value}",)
    directory: str | None = None
    action_arguments: bool = False
    """Whether ``action[one,two]`` is accepted."""
    into_environment: bool = False
    """Whether the environment has the variables under their own names."""
    secrets_in_arguments: bool = False
    """Whether secrets become arguments too, because the program accepts nothing else."""
    word_keys: bool = False
    """Whether a key must be a word, as Rake requires."""
    ruby: bool = False
    last_line: str | None = None
    needs_repo: bool = False
    local_repo: bool = False


_CAP = "{config_repo}/apps/{app}"

PRESETS: Mapping[str, Template] = {
    "pulsar-0.3": Template(
        arguments=(
            *("pulsar", "--conf-repo", "{config_repo}", "--conf-branch"),
            *("{config_branch}", "{app}", "{env}", "{action}", "{variables}"),
        ),
        listing=(
            *("pulsar", "--conf-repo", "{config_repo}", "--conf-branch"),
            *("{config_branch}", "{app}", "{env}", "-v", "--tasks"),
        ),
        variable=("-s", "{key}={value}"),
        secrets_in_arguments=True,
        ruby=True,
    ),
    "pulsar-1": Template(
        arguments=("pulsar", "task", "{app}", "{env}", "{action}", "-c", "{config_repo}"),
        into_environment=True,
        ruby=True,
        last_line="Executed task {action} for {app} on {env}!",
    ),
    "capistrano": Template(
        arguments=("cap", "-f", f"{_CAP}/Capfile", "{env}", "{action}", "{variables}"),
        listing=("cap", "-f", f"{_CAP}/Capfile", "{env}", "--tasks"),
        # Capistrano looks for stages and log/ in its working directory, not next to the
        # Capfile.
        directory=_CAP,
        action_arguments=True,
        word_keys=True,
        ruby=True,
        needs_repo=True,
        local_repo=True,
    ),
    "scripts": Template(
        arguments=(f"{_CAP}/{{action}}",),
        listing=(
            *("find", ".", "-maxdepth", "1", "-type", "f", "-executable"),
            *("-printf", r"%f #\n"),
        ),
        directory=_CAP,
        needs_repo=True,
        local_repo=True,
    ),
}
DETECTED = "pulsar"
"""The name of the preset that is chosen by the installed version; see `preset_for`."""

_PLACES = re.compile(r"\{(\w+)\}")
_PLACE_NAMES = frozenset(
    "app env action config_repo config_branch id user variables".split()
)


def parse_template(text: str) -> Template:
    """Return the preset of this name, or the template that a command line describes.

    The line is split by the rules of a shell.

    Raises:
        SettingsError: The line is not a valid template.
    """
    if text in PRESETS:
        return PRESETS[text]
    try:
        arguments = tuple(shlex.split(text))
    except ValueError as e:
        raise SettingsError(f"--command cannot be split into arguments: {e}") from None
    if not arguments or _PLACES.search(arguments[0]):
        presets = ", ".join((DETECTED, *PRESETS))
        raise SettingsError(
            "--command must begin with a program, without placeholders, or be one of the "
            f"presets {presets}"
        )
    for argument in arguments:
        for name in _PLACES.findall(argument):
            if name not in _PLACE_NAMES:
                raise SettingsError(
                    f"--command: {{{name}}} is unknown. Use one of "
                    + ", ".join(f"{{{known}}}" for known in sorted(_PLACE_NAMES))
                )
        if "{variables}" in argument and argument != "{variables}":
            raise SettingsError("--command: {variables} must be an argument of its own")
    return Template(arguments)


def preset_for(version: str) -> str:
    """Return the preset that fits what ``pulsar --version`` printed."""
    found = re.search(r"(\d+)\.\d+", version)
    return "pulsar-1" if found and int(found[1]) >= 1 else "pulsar-0.3"


def fill(argument: str, places: Mapping[str, str | None]) -> str:
    """Return an argument with its placeholders filled in. Unknown ones become empty."""
    return _PLACES.sub(lambda found: places[found[1]] or "", argument)
