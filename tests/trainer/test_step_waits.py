"""Waits of an update for its device: in a process of their own, see `tests/pretend_gpu.py`."""

import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("step_waits_cases.py")


def test_an_update_waits_for_its_device_a_fixed_number_of_times() -> None:
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "4 passed" in done.stdout
