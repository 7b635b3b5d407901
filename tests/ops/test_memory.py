"""dnd_hf.ops.memory: large blocks take the place of freed ones, unless the user has chosen otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dnd_hf.ops.memory import CHOSEN_BY_USERS, kept_memory


# In a process of its own, because what a heap has once grown to stays. A block of 64 MB is 16,384 pages.
COUNT_FAULTS = """
import resource
from dnd_hf.ops.memory import kept_memory

def faults_of_new_blocks():
    b"x" * 2**26
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        b"x" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults_of_new_blocks()
with kept_memory() as kept:
    print(kept, outside, faults_of_new_blocks())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_system_clears_new_pages_for_each_large_block_and_inside_no_longer():
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USERS}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", COUNT_FAULTS]
    kept, outside, inside = subprocess.check_output(command, env=environment, text=True).split()
    if kept == "False":
        pytest.skip("another C library")
    assert int(inside) < int(outside) / 10


def test_what_the_user_has_chosen_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "131072")
    with kept_memory() as kept:
        assert not kept
