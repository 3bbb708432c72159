"""What a wheel holds, and what installing it leaves alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import temporal_agg

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def test_the_wheel_is_whole(wheel):
    assert wheel.name == f"temporal_agg-{temporal_agg.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    listed = ["git", "ls-files", "temporal_agg"]
    kept = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert set(kept) == {name for name in names if name.startswith("temporal_agg/")}
    about = f"temporal_agg-{temporal_agg.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"temporal_agg", about}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    required = {
        line.split(": ")[1].split(">")[0] for line in lines if line.startswith("Requires-Dist") and ";" not in line
    }
    assert required == {"torch", "timm", "einops", "safetensors", "huggingface-hub", "numpy"}


@pytest.mark.slow
def test_pip_keeps_the_torch_that_somebody_has(wheel, tmp_path):
    """In an environment with an older torch and timm (their metadata; pip looks at nothing else)."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    installed = {"torch": "2.4.1", "timm": "1.0.9", "einops": "0.8.0", "safetensors": "0.4.5", "numpy": "1.26.4"}
    installed["huggingface-hub"] = "0.25.1"
    for name, version in installed.items():
        about = site / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (about / "INSTALLER").write_text("pip\n")
        (about / "RECORD").write_text("")
    command = [python, "-m", "pip", "install", "--dry-run", "--no-index", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (would,) = (line for line in done.stdout.splitlines() if line.startswith("Would install"))
    assert would == f"Would install temporal-agg-{temporal_agg.__version__}"
