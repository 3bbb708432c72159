"""What every recipe stands on."""

import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
LAST_TIME = """
import resource
import common
import torch

common.keep_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc, of Linux, that gives memory back")
def test_memory_that_was_freed_is_there_for_the_next_step():
    """256 MB are 62,500 pages, which the system would hand out anew."""
    command = [sys.executable, "-c", LAST_TIME]
    faults = subprocess.run(command, cwd=RECIPES, capture_output=True, text=True, check=True).stdout
    assert int(faults) < 1000
