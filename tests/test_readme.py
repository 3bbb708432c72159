"""The README's Python blocks run, in order, each in a fresh namespace; its commands and what it names exist."""

import re
import shlex

import documents
import pytest
from documents import ROOT

import temporal_agg

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [code for language, code in documents.blocks(ROOT / "README.md") if language == "python"]
SHELL = [code for language, code in documents.blocks(ROOT / "README.md") if language == "bash"]
COMMANDS = [words for code in SHELL for words in documents.commands(code)]


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)  # they name files from here
    documents.check(words)


def test_every_aggregator_and_every_file_named_exists():
    named = set(re.findall(r"`(\w+)`", README.split("## Aggregators")[1].split("\n## ")[0]))
    assert set(temporal_agg.list_aggregators()) <= named
    for path in set(re.findall(r"(?:recipes|tests|temporal_agg|hub|examples)/[\w/]+\.\w+", README)):
        assert (ROOT / path).exists(), path


def test_ci_installs_and_tests_as_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text()
    install, test = re.search(r'(pip install\b.*?-e "\.\[dev\]") && (python -m pytest)', README).groups()
    assert install.replace("pip install", "pip install --quiet") in script
    assert test in script
