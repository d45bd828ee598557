"""Every kernel compiles for Hopper, which the interpreter cannot tell; spills stay within what was accepted, and the
machine code reads nothing that it has not written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
ROOT = Path(__file__).parents[2]

MAMBA2 = ["--heads", "48", "--groups", "1", "--key", "128", "--value", "64"]

# Kernels of the paper's shapes and of others, and the most that a thread of any of them may spill.
CASES = {
    "scalar": (["scalar", *MAMBA2], 200),
    "scalar with a state": (["scalar", *MAMBA2, "--state"], 300),
    "delta": (["delta"], 300),
    "delta, float16, computed as float32": (["delta", "--dtype", "float16"], 2500),
    "delta, all columns in a program": (["delta", "--heads", "2", "--key", "96", "--value", "128"], 420),
    "delta, on Hopper": (["delta", "--heads", "2", "--key", "128", "--value", "128", "--gluon"], 300),
    "delta, on Hopper, wide": (["delta", "--heads", "2", "--gluon"], 500),
    "delta, on Hopper, with a state": (
        ["delta", "--heads", "1", "--key", "128", "--value", "128", "--state", "--gluon"],
        300,
    ),
    "delta, narrow": (["delta", "--heads", "2", "--key", "16", "--value", "32"], 300),
    "delta, narrow, with a state": (["delta", "--heads", "2", "--key", "64", "--value", "64", "--state"], 300),
}


# What is run as it is compiled, too.
RUNS = {
    "scalar": ["scalar", "--key", "64", "--value", "32", "--levels", "10"],
    "delta": ["delta", "--key", "192", "--value", "64"],
    "delta, on Hopper": ["delta", "--key", "128", "--value", "128", "--gluon"],
    "delta, on Hopper, wide": ["delta", "--key", "192", "--value", "128", "--gluon"],
}


def run(*arguments, name="compile_kernels.py"):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))
    script = str(ROOT / "tests/ops" / name)
    command = [sys.executable, *(argument.replace("SCRIPT", script) for argument in arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_reads_of_unwritten():
    """In a process of its own, as the script asks."""
    assert run("-m", "doctest", "SCRIPT") == ""


def test_products_of_float64_compile_for_blackwell():
    """Whose tensor cores they must not go to."""
    options = ["delta", "--heads", "2", "--key", "64", "--value", "64", "--dtype", "float16", "--capability", "100"]
    rows = json.loads(run("SCRIPT", *options, "--json").splitlines()[-1])
    assert len(rows) > 5
    assert [row for row in rows if row["failed"] is not None] == []


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_hopper(case):
    options, most = CASES[case]
    rows = json.loads(run("SCRIPT", *options, "--json").splitlines()[-1])
    assert len(rows) > 5
    for row in rows:
        assert row["failed"] is None, f"{row['kernel']}: {row['failed']}"
        assert row["spilled_bytes"] <= most, row
        assert not row["unwritten"], row
    if "--gluon" in options:
        assert sum("hopper" in row["kernel"] for row in rows) == (10 if "wide" in case else 9)


@pytest.mark.parametrize("case", RUNS)
def test_compiled_kernels_compute_what_they_should(case):
    """Without a GPU; warps do not get in each other's way."""
    found = json.loads(run("SCRIPT", *RUNS[case], "--json", name="run_compiled.py").splitlines()[-1])
    assert len(found["launches"]) > 5
    assert [one for one in found["launches"] if one["races"]] == []
    for name, error in found["errors"].items():
        assert error <= (1e-2 if name.startswith("d ") else 5e-3), f"{name}: {error:.1e}"
