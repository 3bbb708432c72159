"""What holds the package together: who imports whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import temporal_agg

ROOT = Path(temporal_agg.__file__).parent

# Along frames -> backbone -> aggregator -> embedding -> ranked list, nothing looks backwards: masked -> losses ->
# aggregators -> models; data and retrieval need none of them.
MAY_IMPORT = {
    "_files": set(),
    "files": {"_files"},
    "_options": set(),
    "_version": set(),
    "masked": set(),
    "losses": {"_options", "masked"},
    "aggregators": {"_options", "data", "losses", "masked"},  # of data: ClipConfig, which is no data but how to cut it
    "models": {"_files", "_options", "_version", "aggregators", "masked"},
    "data": {"_files"},
    "retrieval": {"_files", "data"},  # _files: the store; data: at need, for tracklets
    "inference": {"aggregators", "models", "data", "retrieval"},
    "stream": {"data", "inference", "models"},
    "export": {"_files", "_version", "aggregators", "models"},
    "plot": {"aggregators", "models", "data", "retrieval", "inference"},
    "_embed": {"_files", "_version", "models", "data", "retrieval", "inference"},
    "cli": {"_embed", "_files", "_version", "aggregators", "models", "data", "retrieval"},
}
ANYWHERE = {"einops", "numpy", "torch"}
THIRD_PARTY = {  # beside torch, einops, numpy and the standard library
    "models": {"huggingface_hub", "safetensors", "timm"},
    "data": {"PIL", "h5py", "scipy", "torchvision"},
    "retrieval": {"PIL", "faiss", "pyarrow"},
    "inference": {"tqdm"},
    "stream": {"PIL"},  # for types
    "export": {"onnx", "onnxruntime", "onnxscript"},
    "plot": {"matplotlib"},
}


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """The parts of the package and the other packages that a file imports, wherever in it."""
    package = ["temporal_agg", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            modules = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for module in modules:
            if module[0] == "temporal_agg":
                yield "part", module[1] if len(module) > 1 else ""
            elif module[0] not in sys.stdlib_module_names:
                yield "package", module[0]


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_directions(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"a new part {part!r} of the package: say here what it may import"
    imports = set(imported(path))
    backwards = {name for kind, name in imports if kind == "part"} - MAY_IMPORT[part] - {part}
    assert not backwards, f"temporal_agg.{part} must not import {backwards}"
    foreign = {name for kind, name in imports if kind == "package"} - ANYWHERE - THIRD_PARTY.get(part, set())
    assert not foreign, f"temporal_agg.{part} must not import {foreign}"


def test_the_import_scan_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "new.py"
    path.write_text(
        "import os, timm.data\nfrom .. import data, __version__\nfrom ..losses.triplet import x\nfrom . import hub\n"
        "def f():\n    from temporal_agg.retrieval import evaluate\n    import temporal_agg.inference\n"
    )
    assert set(imported(path)) == {
        ("package", "timm"),
        *(("part", p) for p in ("data", "__version__", "losses", "models", "retrieval", "inference")),
    }


@pytest.mark.slow
def test_importing_does_nothing_and_needs_no_extra():
    heavy = ["accelerate", "h5py", "matplotlib", "onnx", "onnxruntime", "onnxscript", "scipy", "tensorboard"]
    heavy += ["pyarrow", "tqdm", "yaml"]
    # timm and huggingface_hub import some of them themselves.
    code = (
        "import sys\n"
        "import torch, timm, torchvision, huggingface_hub, safetensors.torch\n"
        "before = set(sys.modules)\n"
        "import socket\n"
        "def refuse(*args): raise RuntimeError('network')\n"
        "socket.socket.connect = refuse\n"
        "state = torch.get_rng_state()\n"
        "import temporal_agg\n"
        "assert torch.equal(torch.get_rng_state(), state)\n"
        f"print(sorted(set({heavy}) & (set(sys.modules) - before)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"
    assert result.stderr == ""
