import copy
import importlib
import json
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path[:0] = [str(RECIPES), str(RECIPES / "benchmarks")]  # as when a script there is run


@pytest.fixture(scope="session")
def recipe():
    """Loads a script of recipes/ as a module: recipe("train")."""
    return importlib.import_module


@pytest.fixture
def wrong():
    """Writes JSON with another value, or without one, at a place: wrong(file, content, ["key", 0], value)."""

    def write(file, content, place, *value):
        content = inner = copy.deepcopy(content)
        *outer, last = place
        for key in outer:
            inner = inner[key]
        if value:
            inner[last] = value[0]
        else:
            del inner[last]
        file.write_text(json.dumps(content))

    return write
