"""The client's settings: what they change, and what they show."""

from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from pulsar_api.client import Client


@define
class FakeHTTP:
    """Notes the Authorization of each request, and answers none."""

    sent: list[Any] = field(factory=list)

    def request(self, _method: str, _url: str, **given: Any) -> Deferred[Any]:
        self.sent.append(given["headers"].getRawHeaders("Authorization"))
        return Deferred()


def test_a_new_token_counts_from_the_next_request_on() -> None:
    """A program that runs for long gets new ones."""
    client: Any = Client(Clock(), "http://localhost", "old")
    http = client._transport._http = FakeHTTP()
    for token in ("old", "new", None):
        client.token = token
        asked = Deferred.fromCoroutine(client.get(1))
        asked.addErrback(lambda _: None)
        asked.cancel()
    assert http.sent == [["Bearer old"], ["Bearer new"], None]


def test_a_client_does_not_show_its_token() -> None:
    """It may get into logs and tracebacks."""
    assert "secret" not in repr(Client(Clock(), "http://localhost", "secret"))
