"""Every public name with its signature is written down in public_api.txt: nothing vanishes or changes unnoticed.

What changed on purpose is written down by ``python tests/test_public_api.py``, and has its line in CHANGELOG.md.
"""

import dataclasses
import difflib
import importlib
import inspect
import re
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("public_api.txt")
PARTS = ("", ".aggregators", ".data", ".losses", ".masked", ".models", ".plot", ".retrieval")


def signature(thing):
    try:
        text = str(inspect.signature(thing))
    except ValueError:  # exceptions
        return "(...)"
    text = re.sub(r"<[^<>]*?(\w+)[^<>]*? at 0x[0-9a-f]+>", r"\1", text)  # defaults without a name
    return re.sub(r"\b(?:collections\.abc|pathlib|typing|torch|numpy|np|temporal_agg(?:\.\w+)*)\.", "", text).replace(
        "'", '"'
    )


def members(cls):
    """The methods and attributes that the class itself defines, in the order of its source."""
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, (classmethod, staticmethod)):
            member = member.__func__
        if inspect.isfunction(member):
            yield f"    {name}{signature(member)}"
        elif isinstance(member, property):
            yield f"    {name}: property"


def describe():
    for part in PARTS:
        module = importlib.import_module(f"temporal_agg{part}")
        for name in sorted(module.__all__):
            thing = getattr(module, name)
            full = f"{module.__name__}.{name}"
            if inspect.ismodule(thing):
                yield f"{full}: module"
            elif part and name in importlib.import_module("temporal_agg").__all__:
                continue  # written down once, where people find it
            elif inspect.isclass(thing):
                yield f"class {full}{signature(thing)}"
                if not dataclasses.is_dataclass(thing) or thing.__doc__:
                    yield from members(thing)
            elif callable(thing):
                yield f"{full}{signature(thing)}"
            else:
                yield f"{full}: {type(thing).__name__}"


def test_public_signatures_are_those_written_down():
    written = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    found = list(describe())
    changes = [line for line in difflib.unified_diff(written, found, "public_api.txt", "the code", lineterm="", n=0)]
    assert not changes, "\n".join(changes)


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(describe()) + "\n", encoding="utf-8")
