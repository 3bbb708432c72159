import gc
import os
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: each of torch's threads would wait for one that another worker has, and burn its time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_pycollect_makemodule():
    """Before the first test module; xdist's own process has none, and no use for timm."""
    import versions  # noqa: F401  its stand-ins for models that an old timm lacks


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look through it again and again."""
    gc.freeze()


@pytest.fixture
def odd_folder(tmp_path):
    """Where the system has such a thing, its name is no UTF-8, which many libraries refuse."""
    folder = tmp_path / (os.fsdecode(b"caf\xe9") if sys.platform == "linux" else "folder")
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def hub_server():
    """A Hub of this machine's own."""
    from hub_server import HubServer

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
    from hub_client import Client
    from hub_server import TOKEN

    client = Client(hub_server, hub_home, HF_TOKEN=TOKEN)
    yield client
    client.close()
