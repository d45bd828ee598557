"""The benchmark harness: operators side by side, checked against fp64 and then timed, as rows of a CSV with
tables and plots.

    suite = bench.cpu_suite(lengths=(1024, 4096))
    rows = bench.run_operators(suite)
    print(bench.to_markdown(rows))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loglinear.bench.report import to_markdown, write_report
    from loglinear.bench.rows import Row, fit_growth, merge_rows, read_rows, write_rows
    from loglinear.bench.runner import Suite, cpu_suite, gpu_suite, run_decoding, run_models, run_operators

__all__ = [
    "Row",
    "Suite",
    "cpu_suite",
    "fit_growth",
    "gpu_suite",
    "merge_rows",
    "read_rows",
    "run_decoding",
    "run_models",
    "run_operators",
    "to_markdown",
    "write_report",
    "write_rows",
]

# Imported on first use: a worker process, started anew for every case on a processor, needs no plots.
_MODULES = {
    "report": ("to_markdown", "write_report"),
    "rows": ("Row", "fit_growth", "merge_rows", "read_rows", "write_rows"),
    "runner": ("Suite", "cpu_suite", "gpu_suite", "run_decoding", "run_models", "run_operators"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"loglinear.bench.{module}"), name)
    raise AttributeError(f"module 'loglinear.bench' has no attribute {name!r}")
