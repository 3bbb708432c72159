"""Runs commands that are killed before their n-th write. Each is forked from this process, which has imported them.

A job is a line of JSON on the standard input: ``script`` (a module of recipes/, hub/ or examples/), ``argv``,
``setup`` (code that runs first), ``root`` (only what is written below it counts), ``kill`` (before which write, from 0;
null: none), ``processes``. The answer is a line, too: ``codes``, and ``writes`` of the first process, as [event, name]
each.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / place) for place in ("recipes", "recipes/benchmarks", "hub", "examples")]
os.environ["OMP_NUM_THREADS"] = "1"

EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(root: str, kill: int | None, log: int) -> None:
    """Reports every write below ``root`` to the file descriptor ``log``; ends the process before number ``kill``."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event not in EVENTS or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        name = os.fsdecode(args[1] if event == "os.rename" else args[0])
        if not os.path.abspath(name).startswith(root) or (event == "open" and not (args[2] or 0) & WRITES):
            return
        if count == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        os.write(log, (json.dumps([event, os.path.relpath(name, root)]) + "\n").encode())

    sys.addaudithook(hook)


def child(job: dict, rank: int, port: int, log: int) -> int:
    world = job.get("processes", 1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(job["output"], "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    exec(job.get("setup", ""), {})
    if rank == 0:
        watch(job["root"], job["kill"], log)
    try:
        code = importlib.import_module(job["script"]).main(job["argv"])
    except SystemExit as error:
        print(error, file=sys.stderr, flush=True)
        code = 1
    return code if isinstance(code, int) else 0


def run(job: dict) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    read, write = os.pipe()
    pids = []
    for rank in range(job.get("processes", 1)):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 70
            try:
                code = child(job, rank, port, write)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
    os.close(write)
    with os.fdopen(read) as lines:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])]
        for pid in pids[1:]:  # they wait for the first one, if that is dead
            for _ in range(100 if codes[0] == 0 else 1):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    break
                time.sleep(0.1)
            else:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            codes.append(os.waitstatus_to_exitcode(status))
        return {"codes": codes, "writes": [json.loads(line) for line in lines.read().splitlines()]}


if __name__ == "__main__":
    for name in ("train", "evaluate", "study", "publish", "speed", "robust", "mot", "ward", "tracklets_from_mot"):
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
