import pytest
import versions  # noqa: F401  its stand-ins for models that an old timm lacks
from hub_client import Client
from hub_server import TOKEN, HubServer


@pytest.fixture(scope="session")
def hub_server():
    """A Hub of this machine's own."""
    server = HubServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def hub_home(tmp_path_factory):
    """Where its clients keep what they download."""
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="session")
def hub_client(hub_server, hub_home):
    """A process for which that is the Hub, logged in."""
    client = Client(hub_server, hub_home, HF_TOKEN=TOKEN)
    yield client
    client.close()
