"""Settings: what each option takes, who wins, and what a mistake is told."""

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
    """Return an option's name in Python."""
    return name.replace("-", "_")


def refusal(given: dict[str, object], environ: dict[str, str] | None = None) -> str:
    """Return what is said of settings that are refused; it is one line."""
    with pytest.raises(SettingsError) as caught:
        load(given, environ or {})
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return where a settings file may be written."""
    return tmp_path / "pulsar-api.toml"


class TestDefaults:
    def test_without_anything_given_the_documented_defaults_hold(self) -> None:
        """Nothing has to be said to start a daemon on loopback, port 8081, plain HTTP."""
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
        """The document's port for development is the default there."""
        assert load({"dev": 1}, {}).port == 8001

    def test_dev_serves_another_port_if_told_to(self) -> None:
        """Only the default changes, so that two people can develop on one machine."""
        assert load({"dev": 1, "port": "0"}, {}).port == 0

    def test_the_state_is_where_systemd_says(self) -> None:
        """$STATE_DIRECTORY goes before everything else that could be a default."""
        environ = {"STATE_DIRECTORY": "/var/lib/pulsar-api", "XDG_STATE_HOME": "/x"}
        assert load({}, environ).state_dir == "/var/lib/pulsar-api"

    def test_of_several_state_directories_the_first_is_taken(self) -> None:
        """StateDirectory= of a unit may list more, separated by colons."""
        assert load({}, {"STATE_DIRECTORY": "/a:/b"}).state_dir == "/a"

    def test_without_systemd_the_state_is_in_the_users_state_folder(self) -> None:
        """$XDG_STATE_HOME says where that is."""
        environ = {"STATE_DIRECTORY": "", "XDG_STATE_HOME": "/home/joe/s"}
        assert load({}, environ).state_dir == "/home/joe/s/pulsar-api"

    def test_without_a_state_folder_it_is_below_the_home(self) -> None:
        """What XDG says for an absent $XDG_STATE_HOME."""
        expected = os.path.expanduser("~/.local/state/pulsar-api")
        assert load({}, {}).state_dir == expected

    def test_a_state_dir_that_is_named_beats_the_environment(self) -> None:
        """An option is nearer than a variable."""
        assert load({"state-dir": "/mine"}, {"STATE_DIRECTORY": "/s"}).state_dir == "/mine"


class TestOptions:
    def test_the_command_line_has_every_option_of_the_contract(self) -> None:
        """None is missing, none is there that nobody ordered."""
        assert sorted(name for name, *_ in settings.options()) == sorted(OPTIONS)

    def test_only_two_options_are_flags(self) -> None:
        """All others take a value."""
        flags = {name for name, _, _, is_flag in settings.options() if is_flag}
        assert flags == {"dev", "allow-anonymous"}

    def test_every_option_has_a_help_text_and_its_default(self) -> None:
        """What --help is made of."""
        for name, help, default, _ in settings.options():
            assert help, name
            expected = getattr(Settings(port=1, state_dir="/s"), attribute(name), None)
            if name not in {"port", "state-dir"}:
                assert default == expected

    @pytest.mark.parametrize("name", FILE_ONLY)
    def test_what_is_awkward_on_a_command_line_stands_in_a_file_only(
        self, name: str
    ) -> None:
        """Patterns and lists are settings, but no options."""
        assert name not in {option for option, *_ in settings.options()}


class TestTexts:
    @pytest.mark.parametrize("name", ["config-repo", "config-branch", "command"])
    def test_a_text_is_taken_as_it_is(self, name: str) -> None:
        """No trimming, no expansion: what was quoted was meant."""
        text = " $HOME/ä '*' "
        assert getattr(load({name: text}, {}), attribute(name)) == text

    @pytest.mark.parametrize("name", ["state-dir", "log-dir"])
    def test_a_folder_is_meant_from_where_the_daemon_is_started(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if twistd goes to another folder before it is used."""
        monkeypatch.chdir(tmp_path)
        assert getattr(load({name: "here"}, {}), attribute(name)) == str(tmp_path / "here")

    @pytest.mark.parametrize("value", ["", "a\0b", 5, True, ["a"]])
    def test_what_is_no_text_is_refused(self, value: object) -> None:
        """Also the empty one: whoever quotes an unset variable wants to hear of it."""
        text = refusal({"config-repo": value})
        assert text == "--config-repo: must be a non-empty string"


class TestNumbers:
    @pytest.mark.parametrize("name", NUMBERS)
    @pytest.mark.parametrize("end", [0, 1])
    def test_a_number_at_the_end_of_its_range_is_taken(self, name: str, end: int) -> None:
        """As text from a command line and as a number from a file."""
        number = NUMBERS[name][end]
        for value in (number, str(number)):
            assert getattr(load({name: value}, {}), attribute(name)) == number

    @pytest.mark.parametrize("name", NUMBERS)
    def test_a_number_beyond_its_range_is_refused(self, name: str) -> None:
        """And the range is said."""
        least, most = NUMBERS[name]
        for value in (least - 1, most + 1, str(most + 1)):
            assert refusal({name: value}) == f"--{name}: must be from {least} to {most}"

    @pytest.mark.parametrize(
        "value",
        ["", "x", "-1", "+1", "1.0", " 1", "1_0", "٣", "1" * 10, 1.0, True, None, []],
    )
    def test_what_is_no_whole_number_is_refused(self, value: object) -> None:
        """Nothing is guessed: not a sign, a space, an underscore nor other digits."""
        assert refusal({"port": value}) == "--port: must be a whole number"

    @given(st.integers(0, 65535))
    def test_every_port_is_the_same_as_text_and_as_number(self, port: int) -> None:
        """A command line and a file mean the same."""
        assert load({"port": str(port)}, {}).port == load({"port": port}, {}).port == port


class TestSeconds:
    @pytest.mark.parametrize(
        ("text", "size"),
        [("0", 0), ("4096", 4096), ("1K", 1 << 10), ("20M", 20 << 20), ("2T", 2 << 40)],
    )
    @pytest.mark.parametrize("name", ["max-state-size", "max-output-size"])
    def test_sizes_are_bytes_or_have_a_unit(self, name: str, text: str, size: int) -> None:
        """K is 1024 bytes, and so on."""
        assert getattr(load({name: text}, {}), attribute(name)) == size

    @pytest.mark.parametrize("text", ["", "-1", "1.5G", "1g", "K", "1 K", "1KB", "9" * 16])
    @pytest.mark.parametrize("name", ["max-state-size", "max-output-size"])
    def test_what_is_no_size_is_refused(self, name: str, text: str) -> None:
        """With a sentence that says what is."""
        assert "must be a number of bytes" in refusal({name: text})

    def test_days_may_be_part_of_a_day(self) -> None:
        """For tests, and for who is short of room."""
        assert load({"keep-days": "0.5"}, {}).keep_days == 0.5
        for text in ("-1", "many", "nan", "36501"):
            assert "must be a number of days from 0 to 36500" in refusal(
                {"keep-days": text}
            )

    @pytest.mark.parametrize("name", SECONDS)
    @pytest.mark.parametrize("end", [0, 1])
    def test_a_time_at_the_end_of_its_range_is_taken(self, name: str, end: int) -> None:
        """Whole seconds need no point."""
        seconds = SECONDS[name][end]
        for value in (seconds, int(seconds), str(int(seconds)), f"{seconds:.1f}"):
            found = getattr(load({name: value}, {}), attribute(name))
            assert found == seconds
            assert isinstance(found, float)

    @pytest.mark.parametrize("name", SECONDS)
    def test_a_time_beyond_its_range_is_refused(self, name: str) -> None:
        """And the range is said."""
        least, most = SECONDS[name]
        expected = f"--{name}: must be from {least:g} to {most:g} seconds"
        for value in (least - 1, most + 1, float("inf"), float("nan")):
            assert refusal({name: value}) == expected

    @pytest.mark.parametrize(
        "value", ["", "x", "-1", "1e3", "1.", ".5", "nan", "inf", "10s", True, None, []]
    )
    def test_what_is_no_number_of_seconds_is_refused(self, value: object) -> None:
        """Nothing is guessed, above all no unit."""
        assert refusal({"kill-grace": value}) == "--kill-grace: must be a number of seconds"

    @given(st.integers(0, 3_600_000))
    def test_milliseconds_are_kept(self, milliseconds: int) -> None:
        """A fraction means what it says."""
        text = f"{milliseconds // 1000}.{milliseconds % 1000:03}"
        assert load({"kill-grace": text}, {}).kill_grace == milliseconds / 1000


class TestFlags:
    @pytest.mark.parametrize(("value", "on"), [(1, True), (True, True), (False, False)])
    def test_a_flag_is_on_or_off(self, value: object, on: bool) -> None:  # noqa: FBT001
        """A command line gives 1, a file true or false."""
        assert load({"allow-anonymous": value}, {}).allow_anonymous is on

    @pytest.mark.parametrize("value", ["true", "", 2, None, [], "1"])
    def test_what_is_no_flag_is_refused(self, value: object) -> None:
        """The text "false" must not turn something on."""
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
    def test_an_ip_address_is_taken(self, value: str, expected: str) -> None:
        """Of both families, in its usual form."""
        assert load({"interface": value}, {}).interface == expected

    @pytest.mark.parametrize(
        "value", ["", "localhost", "127.0.0.1:80", "127.1", "[::1]", 1]
    )
    def test_what_is_no_address_is_refused(self, value: object) -> None:
        """A host name too, which may have several addresses."""
        text = refusal({"interface": value})
        expected = "is not an IP address; give the address of the host instead of its name"
        assert text == f"--interface: {value!r} {expected}"

    @given(st.ip_addresses())
    def test_every_address_is_taken(self, address: object) -> None:
        """Whatever the standard library calls one."""
        assert load({"interface": str(address)}, {}).interface == str(address)

    @pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
    def test_loopback_is_what_only_this_machine_reaches(self, address: str) -> None:
        """The whole of 127/8, its one relative, and the name that means them (RFC 6761)."""
        assert values.is_loopback(address)

    @pytest.mark.parametrize(
        "address",
        ["", "0.0.0.0", "::", "10.0.0.1", "8.8.8.8", "fe80::1", "localhost.example"],
    )
    def test_everything_else_is_not_loopback(self, address: str) -> None:
        """Also a name: what it means can change."""
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
    def test_a_url_loses_what_nothing_can_be_appended_to(
        self, value: str, expected: str
    ) -> None:
        """Paths of ours are appended to it, so it ends without slash or fragment."""
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
    def test_what_is_no_url_of_a_web_server_is_refused(self, value: str) -> None:
        """And an example is given."""
        expected = "--public-url: must be a URL like https://deploy.example.com"
        assert refusal({"public-url": value}) == expected

    @pytest.mark.parametrize(
        "value", ["", 5, "http://[::1", "http://a:b", "http://a:99999"]
    )
    def test_a_url_that_no_client_could_use_is_refused(self, value: object) -> None:
        """Also if only its port is none."""
        assert refusal({"public-url": value}).startswith("--public-url: ")


class TestLists:
    def test_listen_is_a_list(self) -> None:
        """Each --listen adds one."""
        assert load({"listen": ["tcp:1", "tcp:2"]}, {}).listen == ("tcp:1", "tcp:2")

    @pytest.mark.parametrize("value", ["tcp:1", 5, {"a": "b"}])
    def test_what_is_no_list_is_refused(self, value: object) -> None:
        """A text is not a list of its letters."""
        assert refusal({"listen": value}) == "--listen: must be a list of strings"

    @pytest.mark.parametrize("item", ["", 5, []])
    def test_a_list_that_holds_no_texts_is_refused(self, item: object) -> None:
        """One bad item is enough."""
        text = refusal({"listen": ["tcp:1", item]})
        assert text == "--listen: must be a non-empty string"


class TestPatterns:
    @pytest.mark.parametrize("name", [n for n in FILE_ONLY if n.endswith("pattern")])
    def test_a_pattern_is_compiled(self, name: str, config: Path) -> None:
        """Once, at the start."""
        config.write_text(f"{name} = 'a+'\n")
        found = getattr(load({"config": str(config)}, {}), attribute(name))
        assert found == re.compile("a+")

    @pytest.mark.parametrize("pattern", ["(", "a{4294967296}", "*"])
    def test_what_is_no_pattern_is_refused(self, pattern: str, config: Path) -> None:
        """File and key are named, and what is wrong with it."""
        config.write_text(f"app-pattern = '{pattern}'\n")
        text = refusal({"config": str(config)})
        assert text.startswith(f"{config}: app-pattern: is not a regular expression: ")


class TestFile:
    def test_a_file_says_everything_a_command_line_says(self, config: Path) -> None:
        """The same names, without the dashes in front, with TOML's own types."""
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
        """A default depends on what is said, not on where."""
        config.write_text("dev = true\n")
        assert load({"config": str(config)}, {}).port == 8001

    def test_the_command_line_wins(self, config: Path) -> None:
        """What only the file says still holds."""
        config.write_text("port = 8090\nmax-running = 2\n")
        found = load({"config": str(config), "port": "8091"}, {})
        assert (found.port, found.max_running) == (8091, 2)

    @given(
        in_file=st.dictionaries(st.sampled_from(sorted(NUMBERS)), st.integers(1, 10000)),
        on_line=st.dictionaries(st.sampled_from(sorted(NUMBERS)), st.integers(1, 10000)),
    )
    def test_each_value_is_the_nearest_that_was_given(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        in_file: dict[str, int],
        on_line: dict[str, int],
    ) -> None:
        """Command line, else file, else default, for each option by itself."""
        path = tmp_path_factory.getbasetemp() / "nearest.toml"
        path.write_text("".join(f"{k} = {v}\n" for k, v in in_file.items()))
        found = load({"config": str(path), **{k: str(v) for k, v in on_line.items()}}, {})
        usual = load({}, {})
        for name in NUMBERS:
            default = getattr(usual, attribute(name))
            nearest = on_line.get(name, in_file.get(name, default))
            assert getattr(found, attribute(name)) == nearest

    def test_a_wrong_value_is_refused_even_if_the_command_line_wins(
        self, config: Path
    ) -> None:
        """A mistake in a file is heard of at once, not when the option goes."""
        config.write_text("port = 'x'\n")
        text = refusal({"config": str(config), "port": "1"})
        assert text == f"{config}: port: must be a whole number"

    @pytest.mark.parametrize("key", ["colour", "config", "config_repo", "--port", "auth"])
    def test_an_unknown_key_is_named_with_its_file(self, key: str, config: Path) -> None:
        """Also one with an underscore: there is one way to write it."""
        config.write_text(f'"{key}" = "x"\n')
        assert refusal({"config": str(config)}) == (
            f"{config}: {key} is not an option of pulsar-api"
        )

    def test_a_table_is_an_unknown_key(self, config: Path) -> None:
        """Nothing in a file is read over."""
        config.write_text("[server]\nport = 1\n")
        text = refusal({"config": str(config)})
        assert text == f"{config}: server is not an option of pulsar-api"

    def test_a_file_that_is_not_there_is_an_error(self, config: Path) -> None:
        """Nobody names a file that need not exist."""
        text = refusal({"config": str(config)})
        assert text == f"--config: cannot read {config}: No such file or directory"

    @pytest.mark.parametrize("content", [b"port: 8081\n", b"port = 1\nport = 2\n", b"\xff"])
    def test_a_file_that_is_no_toml_is_an_error(self, content: bytes, config: Path) -> None:
        """It is named, and what is wrong with it."""
        config.write_bytes(content)
        assert refusal({"config": str(config)}).startswith(
            f"--config: {config} is not TOML: "
        )

    def test_an_empty_file_name_is_an_error(self) -> None:
        """--config "$CONFIG" without CONFIG must not mean: no file."""
        assert refusal({"config": ""}).startswith("--config: ")

    def test_an_empty_file_says_nothing(self, config: Path) -> None:
        """Everything is at its default."""
        config.write_text("")
        assert load({"config": str(config)}, {}) == load({}, {})

    def test_an_unknown_option_is_named(self) -> None:
        """Should one ever come past the command line's own parser."""
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
    def test_whatever_is_given_makes_settings_or_one_sentence(
        self, given: dict[str, object]
    ) -> None:
        """Nothing else comes out: no other error, no half a value."""
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
    def test_what_does_not_go_together_lets_nobody_in(
        self, given: dict[str, object], said: str
    ) -> None:
        """Nor everybody."""
        assert refusal(given).startswith(said)

    @pytest.mark.parametrize(
        "name", ["-x", "a\nTask 1 killed", "a\rb", "\x1b[2K", "a\u2028"]
    )
    def test_a_user_is_named_in_one_line(self, name: str) -> None:
        """It stands in logs, in the environment of tasks and perhaps in an argument."""
        text = refusal({"auth-username": name})
        assert text.startswith("--auth-username: must be a name")
        assert "\n" not in text

    def test_any_auth_option_means_github(self) -> None:
        """As the document has it; and without one nobody is asked."""
        assert load({"auth-members": "a, b"}, {}).auth_provider == "github"
        assert load({"auth-members": "a, b"}, {}).auth_members == ("a", "b")
        assert not load({}, {}).authenticated

    def test_a_password_can_stand_in_a_file(self, tmp_path: Path) -> None:
        """Also in one of systemd's credentials; and it is not shown with the settings."""
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
    def test_the_api_of_github(self, config: Path, url: str | None, api: str) -> None:
        """An Enterprise server has it below itself."""
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
    def test_a_rule_that_cannot_be_understood_is_refused(
        self, config: Path, rights: str, said: str
    ) -> None:
        """With the file, and what is wrong."""
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
    def test_a_place_to_confirm_that_cannot_be_understood_is_refused(
        self, config: Path, value: str, said: str
    ) -> None:
        """With the file, and what is wrong."""
        config.write_text(f"confirm = {value}\n")
        text = refusal({"config": str(config)})
        assert text.startswith(f"{config}: confirm: {said}")

    def test_places_to_confirm_are_like_those_of_rights(self, config: Path) -> None:
        """Also where nobody is asked who they are; without the setting there are none."""
        config.write_text("confirm = ['*/production', 'shop', 'blog/*/drop']\n")
        found = load({"config": str(config)}, {}).confirm
        assert found == (
            Target("*", "production"),
            Target("shop"),
            Target("blog", "*", "drop"),
        )
        assert load({}, {}).confirm == ()

    def test_rules_need_somebody_who_knows_the_users(self, config: Path) -> None:
        """Else everybody could do everything in spite of them."""
        config.write_text("[[rights]]\nwho = ['*']\nmay = ['read']\n")
        assert refusal({"config": str(config)}).startswith("rights need --auth-provider")

    @pytest.mark.parametrize(("one", "other"), [("key", "cert"), ("cert", "key")])
    def test_key_and_certificate_go_together(self, one: str, other: str) -> None:
        """The missing one is named."""
        expected = f"--ssl-key and --ssl-cert go together; --ssl-{other} is missing"
        assert refusal({f"ssl-{one}": "/x"}) == expected

    @pytest.mark.parametrize("one", ["key", "cert"])
    def test_a_pfx_overrides_even_half_a_pair(self, one: str) -> None:
        """What is overridden need not be whole."""
        found = load({f"ssl-{one}": "/x", "ssl-pfx": "/y", "ssl-passphrase": "/z"}, {})
        assert (found.ssl_pfx, found.ssl_passphrase) == ("/y", "/z")

    def test_a_passphrase_needs_something_to_open(self) -> None:
        """Alone it is a mistake: plain HTTP was hardly meant."""
        assert refusal({"ssl-passphrase": "/x"}).startswith("--ssl-passphrase needs --ssl-")

    def test_client_certificates_need_tls(self) -> None:
        """Without it nobody would be asked for one."""
        assert refusal({"ssl-client-ca": "/x"}).startswith("--ssl-client-ca needs TLS")

    @pytest.mark.parametrize("given", [{"dev": 1}, {"ssl-pfx": "/x"}], ids=["dev", "pfx"])
    def test_client_certificates_go_with_every_kind_of_tls(
        self, given: dict[str, object]
    ) -> None:
        """Also with that of the development."""
        assert load({**given, "ssl-client-ca": "/y"}, {}).ssl_client_ca == "/y"

    @pytest.mark.parametrize("endpoint", ["tls:/etc/keys:port=1", "ssl:1:privateKey=/k"])
    def test_no_door_is_left_beside_the_one_for_client_certificates(
        self, endpoint: str
    ) -> None:
        """An endpoint with TLS of its own would let everybody in."""
        listen = ["tcp:1:interface=127.0.0.1", endpoint]
        text = refusal({"ssl-pfx": "/x", "ssl-client-ca": "/y", "listen": listen})
        assert text.startswith(f"--ssl-client-ca does not apply to --listen {endpoint}, ")

    def test_hsts_is_off_unless_a_file_says_how_long(self, config: Path) -> None:
        """Browsers remember it for that long, so nobody gets it by accident."""
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
    def test_dev_brings_its_own_certificate(self, more: dict[str, object]) -> None:
        """Which of two was meant is not guessed."""
        assert refusal({"dev": 1, **more}).startswith("--dev brings its own certificate")

    def test_listen_and_port_exclude_each_other_on_one_command_line(self) -> None:
        """One replaces the other."""
        text = refusal({"listen": ["tcp:1"], "port": "1"})
        assert text == "--listen replaces --port; give one of them"

    def test_listen_on_the_command_line_replaces_the_port_of_a_file(
        self, config: Path
    ) -> None:
        """The command line wins."""
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
    def test_tls_is_spoken_if_a_certificate_is_named(
        self,
        given: dict[str, object],
        secure: bool,  # noqa: FBT001
    ) -> None:
        """And plain HTTP if none is."""
        assert load(given, {}).secure is secure


class TestCredentials:
    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize(
        "name", ["ssl-key", "ssl-cert", "ssl-pfx", "ssl-passphrase", "ssl-client-ca"]
    )
    def test_a_bare_name_is_one_of_systemds_credentials(self, name: str) -> None:
        """A unit says LoadCredential= and the name, whatever folder systemd makes."""
        given = {"ssl-pfx": "/x", name: "tls.secret"}
        found = load(given, {"CREDENTIALS_DIRECTORY": "/run/credentials/u"})
        assert getattr(found, attribute(name)) == "/run/credentials/u/tls.secret"

    @pytest.mark.parametrize("path", ["/etc/tls.pfx", "./tls.pfx", "etc/tls.pfx"])
    def test_a_path_is_never_a_credential(self, path: str) -> None:
        """A slash makes the difference."""
        assert load({"ssl-pfx": path}, {"CREDENTIALS_DIRECTORY": "/c"}).ssl_pfx == path

    def test_a_file_that_is_here_goes_before_a_credential(self, tmp_path: Path) -> None:
        """What a person sees beside them is what they meant."""
        (tmp_path / "tls.pfx").write_bytes(b"")
        found = load({"ssl-pfx": "tls.pfx"}, {"CREDENTIALS_DIRECTORY": "/c"})
        assert found.ssl_pfx == "tls.pfx"

    def test_without_systemd_a_bare_name_is_a_file(self) -> None:
        """Here, in the folder where one is."""
        assert load({"ssl-pfx": "tls.pfx"}, {}).ssl_pfx == "tls.pfx"
