import importlib
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path[:0] = [str(RECIPES), str(RECIPES / "benchmarks")]  # as when a script there is run


@pytest.fixture(scope="session")
def recipe():
    """Loads a script of recipes/ as a module: recipe("train")."""
    return importlib.import_module
