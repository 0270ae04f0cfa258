"""Tests of settings: accepted values, precedence and error messages."""

import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
from attrs import asdict
from hypothesis import given
from hypothesis import strategies as st

from pulsar_api.config import settings, values
from pulsar_api.config.loading import load
from pulsar_api.config.settings import Settings
from pulsar_api.errors import SettingsError
from pulsar_api.tasks.targets import Target

OPTIONS = (
    "config-repo config-branch port log-dir ssl-key ssl-cert ssl-pfx ssl-passphrase "
    "ssl-client-ca auth-username auth-password auth-password-file auth-provider "
    "auth-method auth-members dev interface listen public-url "
    "allow-anonymous state-dir command poll-timeout max-running max-running-per-target "
    "max-queued max-connections-per-address max-requests-per-address kill-grace "
    "task-timeout silence-timeout drain-timeout "
    "keep-tasks keep-days max-state-size max-output-size"
).split()
FILE_ONLY = (
    "app-pattern env-pattern action-pattern variable-pattern forbidden-actions hosts "
    "hsts proxies rights confirm github-url github-api-url github-client-id "
    "github-client-secret github-client-secret-file"
).split()

NUMBERS = {
    "port": (0, 65535),
    "max-running": (1, 10000),
    "max-running-per-target": (0, 10000),
    "max-queued": (0, 100_000),
    "max-connections-per-address": (0, 100_000),
    "max-requests-per-address": (0, 100_000),
    "keep-tasks": (0, 10_000_000),
}
MONTH = 31 * 86400.0
SECONDS = {
    "poll-timeout": (1.0, 3600.0),
    "kill-grace": (0.0, 3600.0),
    "task-timeout": (0.0, MONTH),
    "silence-timeout": (0.0, MONTH),
    "drain-timeout": (0.0, MONTH),
}


def attribute(name: str) -> str:
    """Return the name of an option in Python."""
    return name.replace("-", "_")


def refusal(given: dict[str, object], environ: dict[str, str] | None = None) -> str:
    """Return the error message for refused settings, which is one line."""
    with pytest.raises(SettingsError) as caught:
        load(given, environ or {})
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return the path of a settings file that the test may write."""
    return tmp_path / "pulsar-api.toml"


class TestDefaults:
    def test_the_documented_defaults_hold_without_any_setting(self) -> None:
        """A daemon then serves plain HTTP on loopback, port 8081."""
        found = asdict(load({}, {"STATE_DIRECTORY": "/s"}))
        expected = {
            "config_branch": "master",
            "port": 8081,
            "dev": False,
            "interface": "127.0.0.1",
            "listen": (),
            "allow_anonymous": False,
            "state_dir": "/s",
            "command": "pulsar",
            "poll_timeout": 30.0,
            "max_running": 16,
            "max_running_per_target": 0,
            "max_queued": 1000,
            "max_connections_per_address": 1000,
            "max_requests_per_address": 100,
            "kill_grace": 10.0,
            "task_timeout": 0.0,
            "silence_timeout": 0.0,
            "drain_timeout": 0.0,
            "keep_tasks": 10000,
            "keep_days": 365.0,
            "max_state_size": 0,
            "max_output_size": 1 << 30,
            "run_as": (),
            "allow_sudo": False,
            "forbidden_actions": (),
            "auth_members": (),
            "hosts": (),
            "proxies": (),
            "confirm": (),
            "github_url": "https://github.com",
            "secret_variables": ("*password*", "*token*", "*secret*", "*key*"),
            "hsts": 0,
        }
        assert {
            name: value for name, value in found.items() if value is not None
        } == expected

    def test_dev_serves_port_8001(self) -> None:
        """The task description names this port for development."""
        assert load({"dev": 1}, {}).port == 8001

    def test_dev_serves_another_port_if_one_is_given(self) -> None:
        """Two people can then develop on one machine."""
        assert load({"dev": 1, "port": "0"}, {}).port == 0

    def test_state_directory_of_systemd_is_the_default_state_folder(self) -> None:
        """It comes before all other defaults."""
        environ = {"STATE_DIRECTORY": "/var/lib/pulsar-api", "XDG_STATE_HOME": "/x"}
        assert load({}, environ).state_dir == "/var/lib/pulsar-api"

    def test_the_first_of_several_state_directories_is_used(self) -> None:
        """StateDirectory= of a unit can list several, which systemd separates by colons."""
        assert load({}, {"STATE_DIRECTORY": "/a:/b"}).state_dir == "/a"

    def test_without_systemd_the_state_is_in_the_state_folder_of_the_user(self) -> None:
        """$XDG_STATE_HOME names it."""
        environ = {"STATE_DIRECTORY": "", "XDG_STATE_HOME": "/home/joe/s"}
        assert load({}, environ).state_dir == "/home/joe/s/pulsar-api"

    def test_without_xdg_state_home_the_state_is_below_the_home_folder(self) -> None:
        """The XDG specification names this default."""
        expected = os.path.expanduser("~/.local/state/pulsar-api")
        assert load({}, {}).state_dir == expected

    def test_the_option_state_dir_beats_the_environment(self) -> None:
        assert load({"state-dir": "/mine"}, {"STATE_DIRECTORY": "/s"}).state_dir == "/mine"


class TestOptions:
    def test_the_command_line_has_every_option_of_the_contract(self) -> None:
        """None is missing, and there are no others."""
        assert sorted(name for name, *_ in settings.options()) == sorted(OPTIONS)

    def test_there_are_two_flags(self) -> None:
        """All other options take a value."""
        flags = {name for name, _, _, is_flag in settings.options() if is_flag}
        assert flags == {"dev", "allow-anonymous"}

    def test_every_option_has_a_help_text_and_its_default(self) -> None:
        """--help prints both."""
        for name, help, default, _ in settings.options():
            assert help, name
            expected = getattr(Settings(port=1, state_dir="/s"), attribute(name), None)
            if name not in {"port", "state-dir"}:
                assert default == expected

    @pytest.mark.parametrize("name", FILE_ONLY)
    def test_awkward_settings_are_not_options(self, name: str) -> None:
        """Patterns and lists can only be set in a file."""
        assert name not in {option for option, *_ in settings.options()}


class TestTexts:
    @pytest.mark.parametrize("name", ["config-repo", "config-branch", "command"])
    def test_a_text_is_not_changed(self, name: str) -> None:
        """Nothing is trimmed or expanded."""
        text = " $HOME/ä '*' "
        assert getattr(load({name: text}, {}), attribute(name)) == text

    @pytest.mark.parametrize("name", ["state-dir", "log-dir"])
    def test_a_relative_folder_is_resolved_when_settings_are_read(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A daemon of twistd can change its directory afterwards."""
        monkeypatch.chdir(tmp_path)
        assert getattr(load({name: "here"}, {}), attribute(name)) == str(tmp_path / "here")

    @pytest.mark.parametrize("value", ["", "a\0b", 5, True, ["a"]])
    def test_a_value_that_is_not_text_is_refused(self, value: object) -> None:
        """An empty text is refused, too.

        It often comes from an unset variable in a shell.
        """
        text = refusal({"config-repo": value})
        assert text == "--config-repo: must be a non-empty string"


class TestNumbers:
    @pytest.mark.parametrize("name", NUMBERS)
    @pytest.mark.parametrize("end", [0, 1])
    def test_a_number_at_the_end_of_its_range_is_accepted(
        self, name: str, end: int
    ) -> None:
        """Command lines give it as text, files as a number."""
        number = NUMBERS[name][end]
        for value in (number, str(number)):
            assert getattr(load({name: value}, {}), attribute(name)) == number

    @pytest.mark.parametrize("name", NUMBERS)
    def test_a_number_beyond_its_range_is_refused(self, name: str) -> None:
        """The message gives the range."""
        least, most = NUMBERS[name]
        for value in (least - 1, most + 1, str(most + 1)):
            assert refusal({name: value}) == f"--{name}: must be from {least} to {most}"

    @pytest.mark.parametrize(
        "value",
        ["", "x", "-1", "+1", "1.0", " 1", "1_0", "٣", "1" * 10, 1.0, True, None, []],
    )
    def test_a_value_that_is_not_a_whole_number_is_refused(self, value: object) -> None:
        """Signs, spaces, underscores and foreign digits are refused."""
        assert refusal({"port": value}) == "--port: must be a whole number"

    @given(st.integers(0, 65535))
    def test_every_port_is_the_same_as_text_and_as_a_number(self, port: int) -> None:
        """Command line and file mean the same."""
        assert load({"port": str(port)}, {}).port == load({"port": port}, {}).port == port


class TestSeconds:
    @pytest.mark.parametrize(
        ("text", "size"),
        [("0", 0), ("4096", 4096), ("1K", 1 << 10), ("20M", 20 << 20), ("2T", 2 << 40)],
    )
    @pytest.mark.parametrize("name", ["max-state-size", "max-output-size"])
    def test_sizes_are_bytes_or_have_a_unit(self, name: str, text: str, size: int) -> None:
        """K means 1024 bytes, M and G multiples of it."""
        assert getattr(load({name: text}, {}), attribute(name)) == size

    @pytest.mark.parametrize("text", ["", "-1", "1.5G", "1g", "K", "1 K", "1KB", "9" * 16])
    @pytest.mark.parametrize("name", ["max-state-size", "max-output-size"])
    def test_a_value_that_is_not_a_size_is_refused(self, name: str, text: str) -> None:
        """The message describes a size."""
        assert "must be a number of bytes" in refusal({name: text})

    def test_a_number_of_days_can_be_fractional(self) -> None:
        """Tests use this, and operators with little disk space."""
        assert load({"keep-days": "0.5"}, {}).keep_days == 0.5
        for text in ("-1", "many", "nan", "36501"):
            assert "must be a number of days from 0 to 36500" in refusal(
                {"keep-days": text}
            )

    @pytest.mark.parametrize("name", SECONDS)
    @pytest.mark.parametrize("end", [0, 1])
    def test_a_time_at_the_end_of_its_range_is_accepted(self, name: str, end: int) -> None:
        """Whole seconds need no decimal point."""
        seconds = SECONDS[name][end]
        for value in (seconds, int(seconds), str(int(seconds)), f"{seconds:.1f}"):
            found = getattr(load({name: value}, {}), attribute(name))
            assert found == seconds
            assert isinstance(found, float)

    @pytest.mark.parametrize("name", SECONDS)
    def test_a_time_beyond_its_range_is_refused(self, name: str) -> None:
        """The message gives the range."""
        least, most = SECONDS[name]
        expected = f"--{name}: must be from {least:g} to {most:g} seconds"
        for value in (least - 1, most + 1, float("inf"), float("nan")):
            assert refusal({name: value}) == expected

    @pytest.mark.parametrize(
        "value", ["", "x", "-1", "1e3", "1.", ".5", "nan", "inf", "10s", True, None, []]
    )
    def test_a_value_that_is_not_a_number_of_seconds_is_refused(
        self, value: object
    ) -> None:
        """A value with a unit is refused, too."""
        assert refusal({"kill-grace": value}) == "--kill-grace: must be a number of seconds"

    @given(st.integers(0, 3_600_000))
    def test_milliseconds_are_kept(self, milliseconds: int) -> None:
        """A fraction is not rounded."""
        text = f"{milliseconds // 1000}.{milliseconds % 1000:03}"
        assert load({"kill-grace": text}, {}).kill_grace == milliseconds / 1000


class TestFlags:
    @pytest.mark.parametrize(("value", "on"), [(1, True), (True, True), (False, False)])
    def test_a_flag_is_on_or_off(self, value: object, on: bool) -> None:  # noqa: FBT001
        """A command line gives 1, a file gives true or false."""
        assert load({"allow-anonymous": value}, {}).allow_anonymous is on

    @pytest.mark.parametrize("value", ["true", "", 2, None, [], "1"])
    def test_a_value_that_is_not_a_flag_is_refused(self, value: object) -> None:
        """The text "false" must not switch anything on."""
        assert refusal({"dev": value}) == "--dev: must be true or false"


class TestAddresses:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("127.0.0.1", "127.0.0.1"),
            ("0.0.0.0", "0.0.0.0"),
            ("::1", "::1"),
            ("0:0:0:0:0:0:0:1", "::1"),
            ("fe80::1%eth0", "fe80::1%eth0"),
        ],
    )
    def test_an_ip_address_is_accepted(self, value: str, expected: str) -> None:
        """Both families are accepted, in their usual form."""
        assert load({"interface": value}, {}).interface == expected

    @pytest.mark.parametrize(
        "value", ["", "localhost", "127.0.0.1:80", "127.1", "[::1]", 1]
    )
    def test_a_value_that_is_not_an_address_is_refused(self, value: object) -> None:
        """A host name is refused, too, because it can have several addresses."""
        text = refusal({"interface": value})
        expected = "is not an IP address; give the address of the host instead of its name"
        assert text == f"--interface: {value!r} {expected}"

    @given(st.ip_addresses())
    def test_every_address_is_accepted(self, address: object) -> None:
        """All addresses of the standard library are."""
        assert load({"interface": str(address)}, {}).interface == str(address)

    @pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
    def test_loopback_addresses_are_recognised(self, address: str) -> None:
        """These are 127/8, ::1 and the name localhost (RFC 6761)."""
        assert values.is_loopback(address)

    @pytest.mark.parametrize(
        "address",
        ["", "0.0.0.0", "::", "10.0.0.1", "8.8.8.8", "fe80::1", "localhost.example"],
    )
    def test_other_addresses_are_not_loopback(self, address: str) -> None:
        """Other names are not loopback, because their addresses can change."""
        assert not values.is_loopback(address)


class TestURLs:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("https://deploy.example.com", "https://deploy.example.com"),
            ("http://[::1]:8081/pulsar//", "http://[::1]:8081/pulsar"),
            ("https://deploy.example.com/#top", "https://deploy.example.com"),
        ],
    )
    def test_a_url_loses_its_slash_and_fragment(self, value: str, expected: str) -> None:
        """The daemon appends paths to it."""
        assert load({"public-url": value}, {}).public_url == expected

    @pytest.mark.parametrize(
        "value",
        [
            "deploy.example.com",
            "ftp://deploy.example.com",
            "https://",
            "https://deploy.example.com/?a=b",
            "//deploy.example.com",
        ],
    )
    def test_a_value_that_is_not_a_web_url_is_refused(self, value: str) -> None:
        """The message gives an example."""
        expected = "--public-url: must be a URL like https://deploy.example.com"
        assert refusal({"public-url": value}) == expected

    @pytest.mark.parametrize(
        "value", ["", 5, "http://[::1", "http://a:b", "http://a:99999"]
    )
    def test_a_url_that_no_client_can_use_is_refused(self, value: object) -> None:
        """A wrong port is enough."""
        assert refusal({"public-url": value}).startswith("--public-url: ")


class TestLists:
    def test_listen_is_a_list(self) -> None:
        """Each --listen adds one endpoint."""
        assert load({"listen": ["tcp:1", "tcp:2"]}, {}).listen == ("tcp:1", "tcp:2")

    @pytest.mark.parametrize("value", ["tcp:1", 5, {"a": "b"}])
    def test_a_value_that_is_not_a_list_is_refused(self, value: object) -> None:
        """A text is not read as a list of its letters."""
        assert refusal({"listen": value}) == "--listen: must be a list of strings"

    @pytest.mark.parametrize("item", ["", 5, []])
    def test_a_list_with_other_items_than_texts_is_refused(self, item: object) -> None:
        """One wrong item is enough."""
        text = refusal({"listen": ["tcp:1", item]})
        assert text == "--listen: must be a non-empty string"


class TestPatterns:
    @pytest.mark.parametrize("name", [n for n in FILE_ONLY if n.endswith("pattern")])
    def test_a_pattern_is_compiled(self, name: str, config: Path) -> None:
        """Errors therefore show at the start of the daemon."""
        config.write_text(f"{name} = 'a+'\n")
        found = getattr(load({"config": str(config)}, {}), attribute(name))
        assert found == re.compile("a+")

    @pytest.mark.parametrize("pattern", ["(", "a{4294967296}", "*"])
    def test_an_invalid_pattern_is_refused(self, pattern: str, config: Path) -> None:
        """The message names file and key, and quotes the error."""
        config.write_text(f"app-pattern = '{pattern}'\n")
        text = refusal({"config": str(config)})
        assert text.startswith(f"{config}: app-pattern: is not a regular expression: ")


class TestFile:
    def test_a_file_can_set_all_options(self, config: Path) -> None:
        """It uses their names without the dashes in front, and the types of TOML."""
        config.write_text(
            """
            config-repo = "git@example.com:conf"
            port = 8090
            dev = true
            poll-timeout = 12.5
            kill-grace = 3
            listen = []
            forbidden-actions = ["shell", "db:drop"]
            """
        )
        found = load({"config": str(config)}, {"STATE_DIRECTORY": "/s"})
        assert found == Settings(
            config_repo="git@example.com:conf",
            port=8090,
            dev=True,
            poll_timeout=12.5,
            kill_grace=3.0,
            forbidden_actions=("shell", "db:drop"),
            state_dir="/s",
        )

    def test_dev_in_a_file_serves_port_8001(self, config: Path) -> None:
        """A default depends on the value of dev, wherever it is set."""
        config.write_text("dev = true\n")
        assert load({"config": str(config)}, {}).port == 8001

    def test_the_command_line_wins(self, config: Path) -> None:
        """Values that only the file sets still apply."""
        config.write_text("port = 8090\nmax-running = 2\n")
        found = load({"config": str(config), "port": "8091"}, {})
        assert (found.port, found.max_running) == (8091, 2)

    @given(
        in_file=st.dictionaries(st.sampled_from(sorted(NUMBERS)), st.integers(1, 10000)),
        on_line=st.dictionaries(st.sampled_from(sorted(NUMBERS)), st.integers(1, 10000)),
    )
    def test_command_line_beats_file_and_file_beats_default(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        in_file: dict[str, int],
        on_line: dict[str, int],
    ) -> None:
        """Each option is decided by itself."""
        path = tmp_path_factory.getbasetemp() / "nearest.toml"
        path.write_text("".join(f"{k} = {v}\n" for k, v in in_file.items()))
        found = load({"config": str(path), **{k: str(v) for k, v in on_line.items()}}, {})
        usual = load({}, {})
        for name in NUMBERS:
            default = getattr(usual, attribute(name))
            nearest = on_line.get(name, in_file.get(name, default))
            assert getattr(found, attribute(name)) == nearest

    def test_a_wrong_value_in_a_file_is_refused_even_if_the_command_line_wins(
        self, config: Path
    ) -> None:
        """Otherwise the mistake would show only when the option is removed."""
        config.write_text("port = 'x'\n")
        text = refusal({"config": str(config), "port": "1"})
        assert text == f"{config}: port: must be a whole number"

    @pytest.mark.parametrize("key", ["colour", "config", "config_repo", "--port", "auth"])
    def test_an_unknown_key_is_named_with_its_file(self, key: str, config: Path) -> None:
        """A key with an underscore is unknown, because there is one spelling."""
        config.write_text(f'"{key}" = "x"\n')
        assert refusal({"config": str(config)}) == (
            f"{config}: {key} is not an option of pulsar-api"
        )

    def test_a_table_is_an_unknown_key(self, config: Path) -> None:
        """No part of a file is ignored."""
        config.write_text("[server]\nport = 1\n")
        text = refusal({"config": str(config)})
        assert text == f"{config}: server is not an option of pulsar-api"

    def test_a_missing_settings_file_is_an_error(self, config: Path) -> None:
        """A file that is named must exist."""
        text = refusal({"config": str(config)})
        assert text == f"--config: cannot read {config}: No such file or directory"

    @pytest.mark.parametrize("content", [b"port: 8081\n", b"port = 1\nport = 2\n", b"\xff"])
    def test_a_file_that_is_not_toml_is_an_error(
        self, content: bytes, config: Path
    ) -> None:
        """The message names the file and quotes the error."""
        config.write_bytes(content)
        assert refusal({"config": str(config)}).startswith(
            f"--config: {config} is not TOML: "
        )

    def test_an_empty_file_name_is_an_error(self) -> None:
        """--config "$CONFIG" must not mean "no file" if the variable is unset."""
        assert refusal({"config": ""}).startswith("--config: ")

    def test_an_empty_file_sets_nothing(self, config: Path) -> None:
        """All settings have their defaults."""
        config.write_text("")
        assert load({"config": str(config)}, {}) == load({}, {})

    def test_an_unknown_option_is_named(self) -> None:
        """The parser of the command line would refuse it earlier."""
        assert refusal({"colour": "red"}) == "--colour is not an option of pulsar-api"

    @given(
        st.dictionaries(
            st.sampled_from([*OPTIONS, *FILE_ONLY]) | st.text(max_size=5),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=4,
            ),
            max_size=3,
        )
    )
    def test_any_values_give_settings_or_one_sentence(
        self, given: dict[str, object]
    ) -> None:
        """No other exception is raised."""
        given.pop("config", None)
        with suppress(SettingsError):
            found = load(given, {})
            assert set(map(attribute, given)) <= set(asdict(found, recurse=False))


class TestTogether:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"auth-provider": "ldap"}, "--auth-provider: must be one of github, static"),
            ({"auth-provider": "github"}, "--auth-provider github needs --auth-members"),
            ({"auth-method": "org"}, "--auth-provider github needs --auth-members"),
            ({"auth-method": "x"}, "--auth-method: must be one of user, org, team"),
            ({"auth-members": "a,,b"}, "--auth-members: must be a non-empty string"),
            ({"auth-method": "team", "auth-members": "acme"}, "--auth-method team needs"),
            ({"auth-username": "x", "auth-members": "a"}, "--auth-username and its"),
            ({"auth-password": "x", "auth-members": "a"}, "--auth-username and its"),
            ({"auth-provider": "static"}, "--auth-provider static needs --auth-username"),
            (
                {"auth-provider": "tokens", "auth-members": "a"},
                "auth-members is only for --auth-provider github",
            ),
            (
                {"auth-provider": "tokens", "allow-anonymous": 1},
                "--allow-anonymous and the --auth options cannot be used together",
            ),
            ({"auth-password-file": "/nothing"}, "auth-password-file: cannot read /noth"),
            ({"auth-password-file": "/dev/null"}, "auth-password-file: /dev/null is empty"),
            (
                {"auth-password-file": "/dev/null", "auth-password": "x"},
                "auth-password-file and auth-password cannot be used together",
            ),
        ],
        ids=str,
    )
    def test_contradictory_settings_of_access_are_refused(
        self, given: dict[str, object], said: str
    ) -> None:
        """The daemon neither locks out all callers nor admits all."""
        assert refusal(given).startswith(said)

    @pytest.mark.parametrize(
        "name", ["-x", "a\nTask 1 killed", "a\rb", "\x1b[2K", "a\u2028"]
    )
    def test_the_name_of_a_user_is_one_line(self, name: str) -> None:
        """It appears in logs, in the environment of tasks and possibly in an argument."""
        text = refusal({"auth-username": name})
        assert text.startswith("--auth-username: must be a name")
        assert "\n" not in text

    def test_any_auth_option_enables_github(self) -> None:
        """Without one the daemon asks for no credentials."""
        assert load({"auth-members": "a, b"}, {}).auth_provider == "github"
        assert load({"auth-members": "a, b"}, {}).auth_members == ("a", "b")
        assert not load({}, {}).authenticated

    def test_a_password_can_be_in_a_file(self, tmp_path: Path) -> None:
        """The file can be a systemd credential. Printed settings hide the password."""
        (tmp_path / "pw").write_text("se cret\n")
        given = {"auth-username": "joe", "auth-provider": "static"}
        for name, environ in (
            (str(tmp_path / "pw"), {}),
            ("pw", {"CREDENTIALS_DIRECTORY": str(tmp_path)}),
        ):
            found = load({**given, "auth-password-file": name}, environ)
            assert found.auth_password == "se cret"
            assert "se cret" not in repr(found)

    @pytest.mark.parametrize(
        ("url", "api"),
        [
            (None, "https://api.github.com"),
            ("https://github.example.com/", "https://github.example.com/api/v3"),
        ],
    )
    def test_the_api_url_of_github(self, config: Path, url: str | None, api: str) -> None:
        """GitHub Enterprise serves its API below its own URL."""
        config.write_text("" if url is None else f"github-url = '{url}'\n")
        assert load({"config": str(config)}, {}).api_url == api

    @pytest.mark.parametrize(
        ("rights", "said"),
        [
            ("rights = 'all'", "must be a list of tables"),
            ("[[rights]]\nwho = ['*']", "each table needs who and may"),
            ("[[rights]]\nwho = ['*']\nmay = ['fly']", "'fly' is not a right"),
            ("[[rights]]\nwho = ['joe']\nmay = ['read']", "'joe' must be *"),
            ("[[rights]]\nwho = ['*']\nmay = [1]", "may must be a list of strings"),
            ("[[rights]]\nwho = ['*']\nmay = []", "needs at least one right"),
            ("[[rights]]\nwho = ['*']\nmay = ['read']\nin = ['x']", "each table needs who"),
            (
                "[[rights]]\nwho = ['*']\nmay = ['read']\non = ['/x']",
                "'/x' must be like",
            ),
        ],
    )
    def test_an_invalid_rule_is_refused(self, config: Path, rights: str, said: str) -> None:
        """The message names the file and quotes the error."""
        config.write_text(f"auth-provider = 'tokens'\n{rights}\n")
        text = refusal({"config": str(config)})
        assert text.startswith(f"{config}: rights: ")
        assert said in text

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ("'*/production'", "must be a list of strings"),
            ("[1]", "must be a non-empty string"),
            ("['']", "must be a non-empty string"),
            ("['*/production', '/x']", "'/x' must be like shop, shop/production or"),
            ("['shop production']", "'shop production' must be like"),
        ],
    )
    def test_an_invalid_target_to_confirm_is_refused(
        self, config: Path, value: str, said: str
    ) -> None:
        """The message names the file and quotes the error."""
        config.write_text(f"confirm = {value}\n")
        text = refusal({"config": str(config)})
        assert text.startswith(f"{config}: confirm: {said}")

    def test_targets_to_confirm_use_the_patterns_of_rights(self, config: Path) -> None:
        """They apply without authentication, too. Without the setting there are none."""
        config.write_text("confirm = ['*/production', 'shop', 'blog/*/drop']\n")
        found = load({"config": str(config)}, {}).confirm
        assert found == (
            Target("*", "production"),
            Target("shop"),
            Target("blog", "*", "drop"),
        )
        assert load({}, {}).confirm == ()

    def test_rules_need_authentication(self, config: Path) -> None:
        """Without it, all callers would have all rights in spite of the rules."""
        config.write_text("[[rights]]\nwho = ['*']\nmay = ['read']\n")
        assert refusal({"config": str(config)}).startswith("rights need --auth-provider")

    @pytest.mark.parametrize(("one", "other"), [("key", "cert"), ("cert", "key")])
    def test_key_and_certificate_go_together(self, one: str, other: str) -> None:
        """The message names the missing one."""
        expected = f"--ssl-key and --ssl-cert go together; --ssl-{other} is missing"
        assert refusal({f"ssl-{one}": "/x"}) == expected

    @pytest.mark.parametrize("one", ["key", "cert"])
    def test_a_pfx_overrides_even_half_a_pair(self, one: str) -> None:
        """An overridden option need not be complete."""
        found = load({f"ssl-{one}": "/x", "ssl-pfx": "/y", "ssl-passphrase": "/z"}, {})
        assert (found.ssl_pfx, found.ssl_passphrase) == ("/y", "/z")

    def test_a_passphrase_needs_a_file_to_open(self) -> None:
        """Alone it is a mistake, because plain HTTP is hardly intended."""
        assert refusal({"ssl-passphrase": "/x"}).startswith("--ssl-passphrase needs --ssl-")

    def test_client_certificates_need_tls(self) -> None:
        """Over plain HTTP no client could present one."""
        assert refusal({"ssl-client-ca": "/x"}).startswith("--ssl-client-ca needs TLS")

    @pytest.mark.parametrize("given", [{"dev": 1}, {"ssl-pfx": "/x"}], ids=["dev", "pfx"])
    def test_client_certificates_work_with_every_kind_of_tls(
        self, given: dict[str, object]
    ) -> None:
        """The development certificate is one of them."""
        assert load({**given, "ssl-client-ca": "/y"}, {}).ssl_client_ca == "/y"

    @pytest.mark.parametrize("endpoint", ["tls:/etc/keys:port=1", "ssl:1:privateKey=/k"])
    def test_client_certificates_exclude_endpoints_with_their_own_tls(
        self, endpoint: str
    ) -> None:
        """Such an endpoint would admit clients without a certificate."""
        listen = ["tcp:1:interface=127.0.0.1", endpoint]
        text = refusal({"ssl-pfx": "/x", "ssl-client-ca": "/y", "listen": listen})
        assert text.startswith(f"--ssl-client-ca does not apply to --listen {endpoint}, ")

    def test_hsts_is_off_unless_a_file_sets_its_duration(self, config: Path) -> None:
        """Browsers remember it for that time, so it must not be switched on by accident."""
        assert load({}, {}).hsts == 0
        config.write_text("hsts = 31536000\n")
        assert load({"config": str(config)}, {}).hsts == 31536000
        config.write_text("hsts = -1\n")
        assert refusal({"config": str(config)}).startswith(
            f"{config}: hsts: must be from 0"
        )

    @pytest.mark.parametrize(
        "more", [{"ssl-pfx": "/x"}, {"ssl-key": "/x", "ssl-cert": "/y"}], ids=["pfx", "pem"]
    )
    def test_dev_excludes_other_certificates(self, more: dict[str, object]) -> None:
        """It brings its own, and the daemon does not guess which one is meant."""
        assert refusal({"dev": 1, **more}).startswith("--dev brings its own certificate")

    def test_listen_and_port_exclude_each_other_on_one_command_line(self) -> None:
        """Each would replace the other."""
        text = refusal({"listen": ["tcp:1"], "port": "1"})
        assert text == "--listen replaces --port; give one of them"

    def test_listen_on_the_command_line_replaces_the_port_of_a_file(
        self, config: Path
    ) -> None:
        """A command line wins against a file."""
        config.write_text("port = 8090\n")
        assert load({"config": str(config), "listen": ["tcp:1"]}, {}).listen == ("tcp:1",)

    @pytest.mark.parametrize(
        ("given", "secure"),
        [
            ({}, False),
            ({"dev": 1}, True),
            ({"ssl-pfx": "/x"}, True),
            ({"ssl-key": "/x", "ssl-cert": "/y"}, True),
        ],
        ids=["nothing", "dev", "pfx", "pem"],
    )
    def test_tls_is_on_if_a_certificate_is_named(
        self,
        given: dict[str, object],
        secure: bool,  # noqa: FBT001
    ) -> None:
        """Otherwise the daemon serves plain HTTP."""
        assert load(given, {}).secure is secure


class TestCredentials:
    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize(
        "name", ["ssl-key", "ssl-cert", "ssl-pfx", "ssl-passphrase", "ssl-client-ca"]
    )
    def test_a_bare_name_is_a_systemd_credential(self, name: str) -> None:
        """A unit sets LoadCredential= with that name, and systemd chooses the folder."""
        given = {"ssl-pfx": "/x", name: "tls.secret"}
        found = load(given, {"CREDENTIALS_DIRECTORY": "/run/credentials/u"})
        assert getattr(found, attribute(name)) == "/run/credentials/u/tls.secret"

    @pytest.mark.parametrize("path", ["/etc/tls.pfx", "./tls.pfx", "etc/tls.pfx"])
    def test_a_path_is_never_a_credential(self, path: str) -> None:
        """The slash makes the difference."""
        assert load({"ssl-pfx": path}, {"CREDENTIALS_DIRECTORY": "/c"}).ssl_pfx == path

    def test_an_existing_file_comes_before_a_credential(self, tmp_path: Path) -> None:
        """An operator who sees the file expects it to be used."""
        (tmp_path / "tls.pfx").write_bytes(b"")
        found = load({"ssl-pfx": "tls.pfx"}, {"CREDENTIALS_DIRECTORY": "/c"})
        assert found.ssl_pfx == "tls.pfx"

    def test_without_systemd_a_bare_name_is_a_file(self) -> None:
        """It is looked up in the present folder."""
        assert load({"ssl-pfx": "tls.pfx"}, {}).ssl_pfx == "tls.pfx"
