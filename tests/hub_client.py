"""Processes in which huggingface_hub takes a local server for the Hub; it reads its environment when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer
from versions import BEGIN

LOOP = """
import json, sys
out, sys.stdout, space = sys.stdout, sys.stderr, {}
for line in sys.stdin:
    try:
        exec(json.loads(line), space)
        answer = {"result": space.pop("result", None)}
    except BaseException as error:
        answer = {"error": [c.__name__ for c in type(error).__mro__], "message": str(error)}
    print(json.dumps(answer), file=out, flush=True)
"""


class ClientError(Exception):
    """What the code in a :class:`Client` raised: ``kinds``, the names of its classes, and the message."""

    def __init__(self, kinds, message):
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds = kinds


class Client:
    """A Python process that knows the server as the Hub, with a home of its own. ``run(code)`` gives its ``result``."""

    def __init__(self, server: HubServer, home: Path, **environment: str):
        keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        hub |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
            "HOME": str(home),
        }
        env = {**keep, **hub, **environment}
        command = [sys.executable, "-c", BEGIN + LOOP]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(self, code: str, **values):
        code = "".join(f"{key} = {value!r}\n" for key, value in values.items()) + code
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise ClientError(answer["error"], answer["message"])
        return answer["result"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
