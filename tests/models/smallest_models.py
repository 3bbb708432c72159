"""Writes smallest_models.json: the model with the fewest parameters of every timm family (file of timm.models).

    python tests/models/smallest_models.py

takes some minutes and little memory, since nothing is allocated. Run it with the newest timm.
"""

import json
import warnings
from pathlib import Path

import timm
import torch

PATH = Path(__file__).with_suffix(".json")


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    families = {}
    for family in timm.list_modules():
        models = timm.list_models(module=family)
        count, name = min((parameters(name), name) for name in models)
        families[family] = {"model": name, "parameters": count}
        print(f"{family}: {name}, {count / 1e6:.1f} M of {len(models)} models")
    PATH.write_text(json.dumps({"timm": timm.__version__, "families": families}, indent=1) + "\n")
