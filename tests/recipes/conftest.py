import importlib.util
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))  # as when a script there is run


@pytest.fixture(scope="session")
def recipe():
    """Loads a script of recipes/ as a module: recipe("train")."""

    def load(name):
        key = f"recipes_{name}"
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, RECIPES / f"{name}.py")
            sys.modules[key] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[key])
        return sys.modules[key]

    return load
