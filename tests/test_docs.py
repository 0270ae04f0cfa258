"""Tests that the docs agree with the code, and that their examples are valid."""

import configparser
import json
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from docutils.core import publish_doctree

from docs import facts
from pulsar_api.cli.parser import parser
from pulsar_api.config.loading import load
from pulsar_api.config.settings import Settings
from tests.pages import DOCS, PAGES, ROOT, Block, blocks
from tests.web.test_routing import ROUTER

HELP = re.compile(r"^\.\. help:: (.+)$", re.MULTILINE)
SETTING = re.compile(r"^\.\. setting:: (.+)$", re.MULTILINE)

RUN = {
    "README.rst": "test_readme.py",
    "docs/api.rst": "test_readme.py",
    "docs/tutorial.rst": "test_docs.py",
    "docs/howto/backup.rst": "test_docs.py",
}
"""The test that runs the console blocks of each page."""

NOT_RUN = {
    "CONTRIBUTING.rst": "the suite itself, and the tools beside it",
    "docs/access.rst": "manages tokens and logins as test_cli.py does",
    "docs/howto/ci.rst": "makes a token as the README does",
    "docs/howto/container.rst": "needs a container engine",
    "docs/howto/github-team.rst": "revokes a token as test_cli.py does",
    "docs/howto/systemd.rst": "needs systemd as process 1; tests/vm has the unit",
    "docs/howto/upgrade.rst": "needs systemd as process 1; tests/vm has the unit",
    "docs/troubleshooting.rst": "lists tokens as test_cli.py does",
}
"""The reasons why no test runs the commands of a page. Only their words are checked."""


def all_blocks(*languages: str) -> list[Block]:
    """Return the blocks of these languages on all pages."""
    return [block for page in PAGES for block in blocks(page, *languages)]


def place(block: Block) -> str:
    """Return the place of a block."""
    return f"{block.page}:{block.line}"


def test_reference_has_every_setting_once() -> None:
    """A new setting must be added there."""
    named = SETTING.findall((DOCS / "settings.rst").read_text())
    assert sorted(named) == sorted(facts.settings())


def test_reference_has_the_help_of_every_command() -> None:
    """A command that only groups others, like ``login``, counts as one."""
    named = HELP.findall((DOCS / "command-line.rst").read_text())
    assert sorted(named) == sorted(facts.help_texts())


def test_help_texts_fit_and_name_no_place_of_this_machine() -> None:
    """The site is the same wherever it is built."""
    for text in facts.help_texts().values():
        assert max(map(len, text.splitlines())) <= 84
        assert str(Path.home() / ".local") not in text


def test_every_problem_is_in_the_table_with_its_status() -> None:
    """``facts.problems`` finds them in the code."""
    rows = re.findall(
        r"^   \* - ``([\w-]+)``\n     - ([\d, ]+)\n     - \S",
        (DOCS / "errors.rst").read_text(),
        re.MULTILINE,
    )
    found = {type_: set(map(int, statuses.split(", "))) for type_, statuses in rows}
    assert len(found) == len(rows)
    in_code = facts.problems()
    in_code["store-unavailable"].add(507)  # a full disk, which is found at run time
    assert found == in_code


@pytest.mark.parametrize("block", all_blocks("toml"), ids=place)
def test_settings_on_the_pages_are_settings(block: Block, tmp_path: Path) -> None:
    """The daemon reads each block as its file, with the missing required settings added."""
    found = tomllib.loads(block.text)
    begin = {"auth-provider": "github", "auth-members": ["alice"]}
    if found.get("auth-provider") == "tokens":
        begin = {}
    before = [f"{k} = {json.dumps(v)}" for k, v in begin.items() if k not in found]
    (tmp_path / "secret").write_text("a secret\n")
    text = re.sub(r'(-file = )".*"', rf'\1"{tmp_path}/secret"', block.text)
    file = tmp_path / "settings.toml"
    file.write_text("\n".join([*before, text]))
    assert isinstance(load({"config": str(file)}, {}), Settings)


@pytest.mark.parametrize("block", all_blocks("json"), ids=place)
def test_json_on_the_pages_is_json(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=place)
def test_yaml_on_the_pages_is_yaml(block: Block) -> None:
    """GitHub and GitLab find the keys that they need.

    `integration.test_docs` runs the commands.
    """
    found = yaml.safe_load(block.text)
    jobs = found.get("jobs", found)
    assert all("steps" in job or "script" in job for job in jobs.values())


@pytest.mark.parametrize("block", all_blocks("ini"), ids=place)
def test_units_on_the_pages_are_units(block: Block) -> None:
    """Each section has settings, and none occurs twice."""
    parser = configparser.ConfigParser(
        delimiters=("=",), interpolation=None, strict=False, comment_prefixes=("#",)
    )
    parser.read_string(block.text)
    assert parser.sections()


def test_configuration_of_read_the_docs_is_valid() -> None:
    """It names files and extras of this project."""
    found = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (ROOT / found["sphinx"]["configuration"]).exists()
    for install in found["python"]["install"]:
        assert set(install["extra_requirements"]) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("name", ["README.rst", "CONTRIBUTING.rst", "CHANGELOG.rst"])
def test_pages_beside_the_site_are_plain_restructuredtext(name: str) -> None:
    """GitHub and PyPI show them without the roles and directives of Sphinx."""
    levels = {"report_level": 2, "halt_level": 2}
    publish_doctree((ROOT / name).read_text(), settings_overrides=levels)


def test_commands_of_every_page_are_run_or_exempted() -> None:
    """A page with commands is in one of the two tables."""
    pages = {block.page for block in all_blocks("console")}
    assert pages == {*RUN, *NOT_RUN}


@pytest.mark.parametrize("block", all_blocks("console"), ids=place)
def test_our_commands_on_the_pages_parse(block: Block) -> None:
    """Each ``pulsar-api COMMAND`` is checked, whatever the path of the program."""
    for command in block.commands():
        words = shlex.split(command.partition(" > ")[0])
        for before, word in pairwise(words):
            if before.endswith("bin/pulsar-api") and word != "demo":
                parser().parse_args(words[words.index(before) + 1 :])


def test_api_page_has_all_reserved_names() -> None:
    """The routes reserve them."""
    page = (DOCS / "api.rst").read_text()
    found = re.search(r"^An app cannot be called ``([\w ]+)``", page, re.MULTILINE)
    assert found is not None
    assert sorted(found[1].split()) == sorted(name.decode() for name in ROUTER.reserved)


def test_documents_that_pages_mention_exist() -> None:
    """They are pages of the site and files of the repository."""
    for page in PAGES:
        for path in re.findall(r"``((?:docs|systemd|tests)/[\w./-]+)``", page.read_text()):
            assert (ROOT / path).exists(), (page, path)
