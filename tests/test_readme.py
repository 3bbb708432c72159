"""The README's Python blocks run, in order, each in a fresh namespace; what it promises by name exists."""

import re
from pathlib import Path

import pytest

import temporal_agg

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    exec(compile(code, "README.md", "exec"), {})


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
