"""Says what a training step of a model of a comparison takes on this machine's GPU, and which kernels it consists of.

    PYTHONPATH=src python tests/train/time_steps.py experiments/language.yaml log-linear-mamba2 gated-deltanet

For each model: milliseconds a step from one end to the other, how many of them the device computes (means of profiled
steps after the first 30, in which everything is compiled), and the kernels that take longest. Texts with needles are
left out of the data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from loglinear.evals.comparison import ComparisonConfig, ComparisonRun
from loglinear.train import train
from loglinear.train.trainer import PackedTrainer

BEFORE, PROFILED = 30, 10  # steps


class Watch:
    """Profiles some steps of a training, and times as many before them without the profiler."""

    def __init__(self):
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.marks: dict[int, float] = {}
        self.step = PackedTrainer.training_step

    def __call__(self, trainer: PackedTrainer, *arguments, **options) -> torch.Tensor:
        done = trainer.state.global_step
        if done in (BEFORE, BEFORE + PROFILED, BEFORE + 2 * PROFILED):
            torch.cuda.synchronize()
            self.marks[done] = time.perf_counter()
            if done == BEFORE + PROFILED:
                self.profiler.start()
            elif done == BEFORE + 2 * PROFILED:
                self.profiler.stop()
        return self.step(trainer, *arguments, **options)

    def report(self, kernels: int) -> None:
        whole = (self.marks[BEFORE + PROFILED] - self.marks[BEFORE]) / PROFILED * 1000
        found = {event.key: event.self_device_time_total / PROFILED / 1000 for event in self.profiler.key_averages()}
        calls = sum(event.count for event in self.profiler.key_averages()) / PROFILED
        print(f"  {whole:.1f} ms a step, {sum(found.values()):.1f} of them of the device, {calls:.0f} kernels")
        for name in sorted(found, key=lambda name: -found[name])[:kernels]:
            print(f"  {found[name]:8.3f}  {name[:110]}")


def time_model(run: ComparisonRun, kernels: int) -> None:
    watch = Watch()
    PackedTrainer.training_step = lambda trainer, *arguments, **options: watch(trainer, *arguments, **options)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model.json"
            model.write_text(json.dumps(run.options), encoding="utf-8")
            changes = {"model": str(model), "output": folder, "steps": BEFORE + 2 * PROFILED + 1, "log_every": 1000}
            train(run.training.replace(**changes, progress=False, device="cuda"))
    finally:
        PackedTrainer.training_step = watch.step
    print(f"{run.model}:")
    watch.report(kernels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="of a comparison")
    parser.add_argument("models", nargs="*", help="default: all of them")
    parser.add_argument("--kernels", type=int, default=25, help="how many to show")
    options = parser.parse_args()
    config = ComparisonConfig.from_file(options.file)
    for name in options.models or config.models:
        time_model(ComparisonRun(config, name, config.seeds[0], config.rates_of(name)[0]), options.kernels)


if __name__ == "__main__":
    main()
