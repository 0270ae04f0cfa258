"""What can go wrong. No module here knows HTTP; ``web`` maps each to a status."""

from attrs import field, frozen

from pulsar_api.principal import Principal


class PulsarError(Exception):
    """The base of every error that a user can be told about."""


@frozen(str=False)
class InvalidInput(PulsarError):
    """Something from outside is not allowed.

    ``field`` is its name as the sender knows it; ``detail`` is a sentence that says what
    is allowed instead.
    """

    field: str
    detail: str

    def __str__(self) -> str:
        return f"{self.field}: {self.detail}"


@frozen
class UnknownTask(PulsarError):
    """There is no task of this number."""

    task_id: str

    def __str__(self) -> str:
        return f"There is no task {self.task_id}."


@frozen
class FolderInUse(PulsarError):
    """The folder of a task that is about to start holds what another run has left."""

    task_id: int

    def __str__(self) -> str:
        return (
            f"The folder of task {self.task_id} holds what another run has left: the "
            "database is older than it, or another daemon has used the state."
        )


@frozen
class Busy(PulsarError):
    """As many apps are asked for their actions as may be at a time."""

    limit: int

    def __str__(self) -> str:
        return f"The actions of {self.limit} apps are being listed; try again soon."


@frozen
class QueueFull(PulsarError):
    """More tasks wait than may wait, of all callers or of this one."""

    limit: int
    whose: str = field(default="")
    """Whose share of the queue is full; "": all of it is."""

    def __str__(self) -> str:
        share = f" of {self.whose}" if self.whose else ""
        limit = "the limit for one user" if self.whose else "the limit"
        return (
            f"{self.limit} tasks{share} are waiting already, which is {limit}; "
            "try again when some have started."
        )


@frozen
class KeyReused(PulsarError):
    """An idempotency key came again with another request."""

    key: str

    def __str__(self) -> str:
        return (
            f"The Idempotency-Key {self.key!r} was used for another request; take a new "
            "one for each task that is meant."
        )


@frozen
class KeyInFlight(PulsarError):
    """The first request with this idempotency key is not done yet."""

    key: str

    def __str__(self) -> str:
        return f"The first request with the Idempotency-Key {self.key!r} is under way."


@frozen
class NotRestartable(PulsarError):
    """A task that has not failed is not started again."""

    task_id: int
    status: str

    def __str__(self) -> str:
        return (
            f"Task {self.task_id} is {self.status}; only one that has failed, was killed "
            "or is lost is started again. Create a new one."
        )


@frozen
class SecretsGone(PulsarError):
    """A task is not started again: its secret values were not kept."""

    task_id: int

    def __str__(self) -> str:
        return (
            f"Task {self.task_id} had secret variables, whose values are not kept after "
            "its start; create a new one and give them again."
        )


class NoListing(PulsarError):
    """The command of this daemon cannot say which actions there are."""

    def __str__(self) -> str:
        return "The command of this daemon (--command) cannot list its actions."


class ShuttingDown(PulsarError):
    """The daemon is about to end and takes no new tasks."""

    def __str__(self) -> str:
        return "The daemon is stopping and takes no new tasks; try again in a moment."


@frozen
class StoreUnavailable(PulsarError):
    """Tasks cannot be read or recorded now; nothing was."""

    detail: str
    full: bool = field(default=False)

    def __str__(self) -> str:
        return f"Tasks cannot be recorded now: {self.detail}. Nothing was started."


class NotAuthenticated(PulsarError):
    """Nobody knows who is calling, or what they showed is wrong."""

    def __str__(self) -> str:
        return (
            "Say who you are: a token as 'Authorization: Bearer TOKEN' or as the user name "
            "of Basic authentication, a user and a password, or sign in at /login."
        )


@frozen
class NotAllowed(PulsarError):
    """It is known who is calling, and they may not do this."""

    who: str
    right: str
    where: str

    def __str__(self) -> str:
        return (
            f"{self.who} may not {self.right} {self.where}; who runs this daemon can give "
            "that right in its settings."
        )


@frozen
class LoginBound(PulsarError):
    """Another account has the login of somebody who is listed."""

    principal: Principal
    """The account that has the login now."""

    def __str__(self) -> str:
        login, id = self.principal.name, self.principal.id
        return (
            f"The login {login} is bound to another account than yours, whose id is {id}. "
            "If the login now belongs to you, ask an operator to run: "
            f"pulsar-api login rebind {login} {id}"
        )


@frozen
class TooManyFailures(PulsarError):
    """One address has shown too many wrong credentials."""

    retry_after: int
    """Seconds until it is heard again."""

    def __str__(self) -> str:
        return (
            "Too many wrong credentials came from your address; try again in "
            f"{self.retry_after} seconds."
        )


@frozen
class ProviderUnavailable(PulsarError):
    """Whoever knows the users cannot be asked now."""

    provider: str
    detail: str
    retry_after: int = field(default=10)
    """Seconds until another try makes sense."""

    def __str__(self) -> str:
        return f"{self.provider} cannot say now who you are: {self.detail}"


class SettingsError(PulsarError):
    """The daemon cannot start as it was told to; the message is one line for its user."""


class CannotListen(PulsarError):
    """A port cannot be opened, or not so."""
