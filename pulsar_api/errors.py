"""The errors that users can be told about. ``web`` maps each to an HTTP status."""

from attrs import field, frozen

from pulsar_api.principal import Principal


class PulsarError(Exception):
    """The base of all these errors; the text is a sentence for users."""


@frozen(str=False)
class InvalidInput(PulsarError):
    """A value from outside is not allowed.

    ``field`` is its name as the sender knows it; ``detail`` says what is allowed instead.
    """

    field: str
    detail: str

    def __str__(self) -> str:
        return f"{self.field}: {self.detail}"


@frozen
class UnknownTask(PulsarError):
    """There is no task with this number."""

    task_id: str

    def __str__(self) -> str:
        return f"There is no task {self.task_id}."


@frozen
class FolderInUse(PulsarError):
    """The folder of a new task has files of another run."""

    task_id: int

    def __str__(self) -> str:
        return (
            f"The folder of task {self.task_id} has files of another run: the database is "
            "older than the folder, or another daemon has used the state folder."
        )


@frozen
class Busy(PulsarError):
    """The actions of too many apps are being listed at the same time."""

    limit: int

    def __str__(self) -> str:
        return f"The actions of {self.limit} apps are being listed already; try again soon."


@frozen
class QueueFull(PulsarError):
    """Too many tasks wait, of all callers or of this one."""

    limit: int
    whose: str = field(default="")
    """The user whose share of the queue is full; "" if the whole queue is."""

    def __str__(self) -> str:
        share = f" of {self.whose}" if self.whose else ""
        limit = "the limit for one user" if self.whose else "the limit"
        return (
            f"{self.limit} tasks{share} are waiting already, which is {limit}; "
            "try again when some have started."
        )


@frozen
class KeyReused(PulsarError):
    """An idempotency key has been used for another request."""

    key: str

    def __str__(self) -> str:
        return (
            f"The Idempotency-Key {self.key!r} has been used for another request; use a "
            "new key for each new task."
        )


@frozen
class KeyInFlight(PulsarError):
    """The first request with this idempotency key is still being answered."""

    key: str

    def __str__(self) -> str:
        return (
            f"The first request with the Idempotency-Key {self.key!r} is still being "
            "answered."
        )


@frozen
class NotRestartable(PulsarError):
    """Only a task that has failed, was killed or is lost can be restarted."""

    task_id: int
    status: str

    def __str__(self) -> str:
        return (
            f"Task {self.task_id} is {self.status}; only a failed, killed or lost task can "
            "be restarted. Create a new task instead."
        )


@frozen
class SecretsGone(PulsarError):
    """A task cannot be restarted because its secret values are not kept."""

    task_id: int

    def __str__(self) -> str:
        return (
            f"Task {self.task_id} had secret variables, whose values are not kept after "
            "its start. Create a new task with these variables."
        )


class NoListing(PulsarError):
    """The command of this daemon cannot list its actions."""

    def __str__(self) -> str:
        return "The command of this daemon (--command) cannot list its actions."


class ShuttingDown(PulsarError):
    """The daemon is stopping and takes no new tasks."""

    def __str__(self) -> str:
        return "The daemon is stopping and takes no new tasks; try again in a moment."


@frozen
class StoreUnavailable(PulsarError):
    """The database cannot be read or written now; nothing has been written."""

    detail: str
    full: bool = field(default=False)

    def __str__(self) -> str:
        return f"Tasks cannot be recorded now: {self.detail}. Nothing was started."


class NotAuthenticated(PulsarError):
    """The request has no credentials, or wrong ones."""

    def __str__(self) -> str:
        return (
            "Authentication is required: send a token as 'Authorization: Bearer TOKEN' or "
            "as the user name of Basic authentication, send a user name and a password, or "
            "sign in at /login."
        )


@frozen
class NotAllowed(PulsarError):
    """The caller does not have the right that this needs."""

    who: str
    right: str
    where: str

    def __str__(self) -> str:
        return (
            f"{self.who} does not have the right to {self.right} {self.where}. An operator "
            "of this daemon can grant it in the settings."
        )


@frozen
class LoginBound(PulsarError):
    """A listed login is bound to another account than the caller's."""

    principal: Principal
    """The account that has the login at GitHub now."""

    def __str__(self) -> str:
        login, id = self.principal.name, self.principal.id
        return (
            f"The login {login} is bound to another account than yours, whose id is {id}. "
            "If the login now belongs to you, ask an operator to run: "
            f"pulsar-api login rebind {login} {id}"
        )


@frozen
class TooManyFailures(PulsarError):
    """One address has sent too many wrong credentials."""

    retry_after: int
    """Seconds until it may try again."""

    def __str__(self) -> str:
        return (
            "Too many wrong credentials came from your address; try again in "
            f"{self.retry_after} seconds."
        )


@frozen
class ProviderUnavailable(PulsarError):
    """The provider that knows the users cannot be asked now."""

    provider: str
    detail: str
    retry_after: int = field(default=10)
    """Seconds after which another try may succeed."""

    def __str__(self) -> str:
        return f"{self.provider} cannot check your credentials now: {self.detail}."


class SettingsError(PulsarError):
    """The daemon cannot start with its settings; the text is one line for the operator."""


class CannotListen(PulsarError):
    """A port cannot be opened, or must not be."""
