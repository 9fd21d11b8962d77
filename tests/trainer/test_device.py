"""Trainings on a pretended GPU: in a process of their own, for the device is torch's for good."""

import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("device_cases.py")


def test_no_step_of_a_training_mixes_devices() -> None:
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
