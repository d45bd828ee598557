"""The examples in docstrings run, and show what they say."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import loglinear

# A kernel's file has no example: Triton reads its functions.
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(loglinear.__path__, "loglinear.")
    if not name.startswith("loglinear.ops.triton") and name != "loglinear.__main__"
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # some leave files behind
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    modules = (importlib.import_module(name) for name in MODULES)
    assert sum(bool(found.examples) for module in modules for found in finder.find(module)) > 20


def test_names_can_be_completed_before_they_are_imported() -> None:
    code = "import loglinear, sys; print({*loglinear.__all__} <= {*dir(loglinear)}, 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["True", "False"]
