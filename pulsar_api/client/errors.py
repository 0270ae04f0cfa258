"""How a call of the client can fail."""

from attrs import frozen


class ClientError(Exception):
    """A call of the client has failed; the message is a sentence for people."""


@frozen(str=False)
class Refused(ClientError):
    """The daemon has refused a request."""

    status: int
    """The status of the HTTP response."""
    kind: str
    """The type of the problem, such as ``unknown-task``; the API lists them."""
    detail: str
    retry_after: float | None = None
    """Seconds after which another try may succeed."""

    def __str__(self) -> str:
        return self.detail


@frozen(str=False)
class Unreachable(ClientError):
    """There is no answer, or one that is not the daemon's."""

    url: str
    detail: str

    def __str__(self) -> str:
        return f"{self.url} cannot be reached: {self.detail}"


def not_the_daemon(url: str, why: object) -> Unreachable:
    """Return the error for an answer that no pulsar-api gives."""
    return Unreachable(url, f"the server that answers is not pulsar-api ({why})")
