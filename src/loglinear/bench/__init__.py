"""The benchmark harness: operators side by side, checked against fp64 and then timed, as rows of a CSV with
tables and plots.

suite = bench.cpu_suite(lengths=(1024, 4096))
rows = bench.run_operators(suite)
print(bench.to_markdown(rows))
"""

from loglinear.bench.report import to_markdown, write_report
from loglinear.bench.rows import Row, fit_growth, merge_rows, read_rows, write_rows
from loglinear.bench.runner import Suite, cpu_suite, gpu_suite, run_models, run_operators

__all__ = [
    "Row",
    "Suite",
    "cpu_suite",
    "fit_growth",
    "gpu_suite",
    "merge_rows",
    "read_rows",
    "to_markdown",
    "run_models",
    "run_operators",
    "write_report",
    "write_rows",
]
