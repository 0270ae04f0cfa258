"""Checks that the settings fit together."""

from collections.abc import Mapping

from pulsar_api.config.settings import Settings
from pulsar_api.errors import SettingsError


def check_together(settings: Settings, given: Mapping[str, object]) -> None:
    """Check what no option can check alone.

    ``given`` is what the command line gave.

    Raises:
        SettingsError: Options contradict each other, or one is missing.
    """
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
    # It would be a second way in, without the check.
    for endpoint in settings.listen:
        if endpoint.startswith(("tls:", "ssl:")):
            raise SettingsError(
                f"--ssl-client-ca does not apply to --listen {endpoint}, which has TLS of "
                "its own; use tcp:"
            )


def _check_authentication(s: Settings) -> None:
    if s.authenticated and s.allow_anonymous:
        raise SettingsError(
            "--allow-anonymous and the --auth options cannot be used together"
        )
    if s.rights is not None and not s.authenticated:
        raise SettingsError("rights need --auth-provider, which authenticates the users")
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
            "--auth-provider github needs --auth-members: the users, organisations or "
            "teams to accept"
        )
    elif s.auth_method == "team" and not all(m.count("/") == 1 for m in s.auth_members):
        raise SettingsError("--auth-method team needs --auth-members like org/team")
