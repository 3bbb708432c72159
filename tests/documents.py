"""The code in Markdown pages: blocks, and the commands in them, which are parsed as their programs would."""

import importlib.util
import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from torch.distributed.run import get_args_parser as torchrun_parser

from temporal_agg import cli

ROOT = Path(__file__).parents[1]
PARSERS = {  # a script that is not here takes no argument
    "recipes/benchmarks/mot.py": "parse",
    "recipes/benchmarks/robust.py": "parse",
    "recipes/benchmarks/speed.py": "parse",
    "recipes/compute_flow.py": "arguments",
    "recipes/evaluate.py": "parse",
    "recipes/benchmarks/study.py": "parse",
    "recipes/benchmarks/ward.py": "parse",
    "recipes/benchmarks/ward_weights.py": "parse",
    "recipes/train.py": "parse_settings",
}
PLAIN = ("python3 -m venv .venv", ". .venv/bin/activate")


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The language of each fenced block of a page, and its code, on the lines that it has in the page."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield match[1], "\n" * text.count("\n", 0, match.start(2)) + match[2]


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block, as words."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        parts = itertools.groupby(shlex.split(line, comments=True), lambda word: word in ("&&", "|", ";"))
        found += [list(words) for between, words in parts if not between]
    return found


def load(script: str) -> ModuleType:
    """A script of the repository, as a module."""
    path = ROOT / script
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as when it is run
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    if spec.name not in sys.modules:
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The script that a command runs, and its arguments."""
    if words[0] == "torchrun":
        args = torchrun_parser().parse_args(words[1:])
        return args.training_script, args.training_script_args
    return (words[1], words[2:]) if words[0] == "python" and words[1].endswith(".py") else None


def check(words: list[str]) -> None:
    """Raises (argparse: SystemExit) unless the program of a command takes its arguments and its files are there."""
    words = [word for word in words if word != "..." and not re.fullmatch(r"[A-Z_]+=\w+", word)]
    if words[0] == "temporal-agg":
        cli.parse(words[1:])
    elif found := script_of(words):
        script, arguments = found
        if script == "temporal-agg":  # torchrun --no-python
            cli.parse(arguments)
        elif script in PARSERS:
            getattr(load(script), PARSERS[script])(arguments)
        elif arguments or not (ROOT / script).is_file():
            raise ValueError(f"no script {script}, or arguments for one that is not in PARSERS: {shlex.join(words)}")
    elif words[:2] == ["pip", "install"]:
        known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
        extras = {extra for word in words for group in re.findall(r"\[(.*)\]", word) for extra in group.split(",")}
        if not extras <= known:
            raise ValueError(f"no extra {', '.join(extras - known)}: {shlex.join(words)}")
    elif words[:2] == ["python", "-m"]:
        if words[2] not in ("pytest", "sphinx"):
            raise ValueError(f"unknown module: {shlex.join(words)}")
        missing = [word for word in words[3:] if "/" in word and not (ROOT / word).exists()]
        if missing and words[2] == "pytest":
            raise ValueError(f"no {', '.join(missing)}: {shlex.join(words)}")
    elif " ".join(words) not in PLAIN:
        raise ValueError(f"say in tests/documents.py how to check: {shlex.join(words)}")
