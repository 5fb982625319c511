"""Checks of Triton kernels in a process of their own: the variable that turns Triton's interpreter on must stand before
triton is imported."""

import os
import subprocess
import sys


def run(check: str, device: str, *dtypes: str, interpret: bool) -> None:
    """`check`, a program that is told `device` and names of dtypes and ends by printing "held"."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if interpret else {**os.environ}
    if not interpret:
        environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", check, device, *dtypes]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0 and found.stdout.strip() == "held", found.stderr[-2000:]
