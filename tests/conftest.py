"""What every test shares: one thread per process, no network, fixed seeds, readable ids, the `gpu` marker."""

import os

# Read when torch, matplotlib and the hub client are first imported; commands that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import zlib
from collections.abc import Iterator

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run through Triton's interpreter; it is chosen when they are defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Spells shapes, dtypes and options in test ids: `T65,K8`, `2x65x4`, `float64`; else pytest chooses."""
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, tuple) and hasattr(val, "_asdict"):
        val = val._asdict()
    if isinstance(val, dict):
        return ",".join(f"{key}{_short(value)}" for key, value in val.items())
    if isinstance(val, (tuple, list)) and all(isinstance(entry, (int, str)) for entry in val):
        return "x".join(_short(entry) for entry in val) or "empty"
    if val is None or isinstance(val, (bool, int)):
        return f"{argname}={val}"
    return None


def _short(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (tuple, list)):
        return "x".join(_short(entry) for entry in value)
    return str(value)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Seeds the generators from the test's id: different inputs in every test, the same in every run."""
    number = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(number)
    numpy.random.seed(number)


@pytest.fixture(autouse=True)
def give_memory_back() -> Iterator[None]:
    """Processes that test side by side share a GPU: what a large test has taken is given back, not kept for later."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**30:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def told_to():
    """Tells torch how to multiply float32, for one test."""
    before = torch.backends.cuda.matmul.fp32_precision

    def tell(precision):
        torch.backends.cuda.matmul.fp32_precision = precision

    yield tell
    tell(before)
