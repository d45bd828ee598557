"""Training speed of whole models: one step (forward, backward, AdamW) on random tokens, in tokens per
second.
"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loglinear.bench.measure import PeakMemory, time_call

if TYPE_CHECKING:
    from loglinear.bench.worker import Result

STEP = "training step"
COMPILED, RECOMPUTED = "compiled", "activations recomputed"


@dataclass(frozen=True)
class ModelCase:
    """A preset trained at one length, `tokens` per step; the batch is halved until a step fits into memory, and
    where one sequence does not fit, activations are recomputed in the backward pass (gradient checkpointing).

    `compile`: blocks go through `torch.compile`.
    """

    preset: str
    length: int
    tokens: int
    device: str
    budget_s: float
    compile: bool = False


def run_model_case(case: ModelCase) -> Iterator["Result"]:
    """Times training steps of a preset in bfloat16 autocast (a GPU) or float32 (a processor), weights in
    float32, fused AdamW.
    """
    from loglinear.bench.worker import Result
    from loglinear.models import LogLinearConfig, LogLinearForCausalLM

    device = torch.device(case.device)
    torch.manual_seed(0)
    config = LogLinearConfig.preset(case.preset, max_position_embeddings=case.length)
    model = LogLinearForCausalLM(config).train()
    torch.nn.Module.to(model, device)  # in place
    if case.compile:
        model.model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch, recompute = max(1, case.tokens // case.length), False
    while True:
        ids = torch.randint(config.vocab_size, (batch, case.length), device=device)

        def step(ids: torch.Tensor = ids) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        try:
            step()
            started = time.perf_counter()
            with PeakMemory(device) as peak:
                step()
            timing = time_call(step, device, case.budget_s, time.perf_counter() - started)
        except torch.OutOfMemoryError:
            if recompute:
                raise
            if batch == 1:
                recompute = True
                with warnings.catch_warnings():  # the newest transformers has another name for it, the oldest has not
                    warnings.simplefilter("ignore", FutureWarning)
                    model.gradient_checkpointing_enable({"use_reentrant": False})
            optimizer.zero_grad(set_to_none=True)
            batch = max(1, batch // 2)
        else:
            break
        torch.cuda.empty_cache()
    how = [COMPILED] * case.compile + [RECOMPUTED] * recompute
    yield Result(
        ", ".join([STEP, *how]),
        "ok",
        timing.median_ms,
        timing.low_ms,
        timing.high_ms,
        timing.repeats,
        peak.bytes,
        batch=batch,
    )
