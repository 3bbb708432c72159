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


@pytest.mark.slow
@pytest.mark.parametrize("code", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)  # they name files from here
    documents.check(words)


def test_names_in_the_table_exist():
    """Not the other way round: a new aggregator need not touch the README."""
    rows = re.findall(r"^\| (.*?) \|", README.split("| name | what it is")[1].split("\n\n")[0], re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert {"mean", "loga", "star_<resnet>"} <= names
    assert {name for name in names if "<" not in name} <= set(temporal_agg.list_aggregators())
    assert set(re.findall(r"`(\w+_released)`", README)) <= set(temporal_agg.list_aggregators())
    temporal_agg.create_model("star_resnet10t", img_size=(64, 32))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_file_and_page_named_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = {path for path in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in path}
    files = set(re.findall(r"(?<!\w)(?:recipes|tests|temporal_agg|hub|examples|docs)/(?:[\w./]*\w)?", text))
    assert links | files
    assert [path for path in sorted(links | files) if not (ROOT / path).exists()] == []


def test_ci_installs_and_tests_as_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text()
    install, test = re.search(r'(pip install\b.*?-e "\.\[dev\]") && (python -m pytest)', README).groups()
    assert install.replace("pip install", "pip install --quiet") in script
    assert test in script
