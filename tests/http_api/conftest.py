from collections.abc import Iterator

import pytest

from tests.http_api.fake import Client, serving


@pytest.fixture(scope="module")
def shared_client() -> Iterator[Client]:
    with serving() as client:
        yield client


@pytest.fixture
def client(shared_client: Client) -> Iterator[Client]:
    """A server without keys, whose engine must have nothing left to do after the test."""
    shared_client.engine.cancelled = 0
    yield shared_client
    shared_client.settled()
    shared_client.engine.step_s, shared_client.engine.failing, shared_client.engine.most_waiting = 0.0, None, 64
