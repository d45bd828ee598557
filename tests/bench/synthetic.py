"""Rows that were never measured."""

import dataclasses

from loglinear.bench.rows import Row, environment


def make_row(**changes) -> Row:
    values = {
        "suite": "operators",
        "operator": "log-linear",
        "mechanism": "log-linear",
        "shape": "mamba2",
        "direction": "forward",
        "batch": 2,
        "length": 4096,
        "heads": 48,
        "groups": 1,
        "key_dim": 128,
        "value_dim": 64,
        "levels": 13,
        "dtype": "bfloat16",
        "status": "ok",
        "time_ms": 1.25,
        "time_low_ms": 1.0,
        "time_high_ms": 1.5,
        "repeats": 10,
        "tokens_per_second": 6_553_600.0,
        "peak_memory_bytes": 123_456_789_012,
        "error": 2.5e-3,
        "tolerance": 5e-3,
        **dataclasses.asdict(environment("cpu")),
    }
    return Row(**{**values, **changes})
