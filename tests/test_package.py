"""What a wheel holds, and what importing the installed package costs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import temporal_agg

ROOT = Path(__file__).parents[1]


def test_the_wheel_is_whole(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"temporal_agg-{temporal_agg.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "temporal_agg").rglob("*.py")}
    assert modules | {"temporal_agg/py.typed", "temporal_agg/models/manifest.json"} == {
        name for name in names if name.startswith("temporal_agg/")
    }
    about = f"temporal_agg-{temporal_agg.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"temporal_agg", about}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    required = {
        line.split(": ")[1].split(">")[0] for line in lines if line.startswith("Requires-Dist") and ";" not in line
    }
    assert required == {"torch", "timm", "einops", "safetensors", "huggingface-hub", "numpy"}


def test_importing_takes_less_than_five_seconds_of_processor_time():
    code = "import time; import temporal_agg; print(time.process_time())"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)  # compiles and caches
    runs = [subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 5
