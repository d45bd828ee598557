"""Every kernel compiles for Hopper, which the interpreter cannot tell; spills stay within what was accepted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
ROOT = Path(__file__).parents[2]

MAMBA2 = ["--heads", "48", "--groups", "1", "--key", "128", "--value", "64"]

# Kernels of the paper's shapes, and the most that a thread of any of them may spill.
CASES = {
    "scalar": (["scalar", *MAMBA2], 200),
    "scalar with a state": (["scalar", *MAMBA2, "--state"], 300),
    "delta": (["delta"], 300),
    "delta, float32": (["delta", "--dtype", "float32"], 2500),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_hopper(case):
    options, most = CASES[case]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    script = [sys.executable, str(ROOT / "tests/ops/compile_kernels.py"), *options, "--json"]
    told = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    rows = json.loads(told.stdout.splitlines()[-1])
    assert len(rows) > 5
    for row in rows:
        assert row["failed"] is None, f"{row['kernel']}: {row['failed']}"
        assert row["spilled_bytes"] <= most, row
