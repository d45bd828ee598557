"""Resuming: the checkpoint that a run goes on from, what must be as it was, and what is said where something is
not.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from loglinear.data import PackedRows
from loglinear.folders import check_output_folder
from loglinear.models import LogLinearConfig
from loglinear.train.checkpoints import POSITION_FILE, checkpoint_step, newest_checkpoint
from loglinear.train.config import CONFIG_FILE, TrainConfig
from loglinear.train.schedule import schedule_of

# What the Trainer would begin anew if it were missing, and say nothing.
TRAINER_PARTS = ("optimizer.pt", "scheduler.pt")


def starting_point(config: TrainConfig, parts: Sequence[str] = TRAINER_PARTS) -> Path | None:
    """The checkpoint to go on from; None to start.

    Args:
        parts: files that a checkpoint of this kind has beside the model and the configuration.

    Raises:
        FileExistsError: there is a run and resume is off.
        FileExistsError, PermissionError: the folder cannot be written.
        FileNotFoundError: the checkpoint has lost a part.
        ValueError: the saved configuration differs where it must not.
    """
    output = Path(config.output)
    check_output_folder(output)
    checkpoint = newest_checkpoint(output)
    if not config.resume:
        if checkpoint is not None:
            raise FileExistsError(
                f"output: {output} holds a run up to step {checkpoint_step(checkpoint)}; "
                "resume it, or give another folder"
            )
    elif checkpoint is not None:
        absent = [name for name in (CONFIG_FILE, *parts) if not (checkpoint / name).is_file()]
        if absent:
            raise FileNotFoundError(f"cannot resume {checkpoint}: it holds no {' and no '.join(absent)}")
        config.check_resumes(TrainConfig.from_file(checkpoint / CONFIG_FILE))
    return checkpoint


def save_position(checkpoint: Path, rows: PackedRows, step: int, rows_per_step: int, machine: dict[str, str]) -> None:
    """Write into a checkpoint where in the data it is, and what no option says: rows per step over all devices,
    and the machine.
    """
    position = rows.position(step * rows_per_step)
    (checkpoint / POSITION_FILE).write_text(json.dumps(position | {"rows_per_step": rows_per_step} | machine))


def check_position(checkpoint: Path, rows: PackedRows, config: TrainConfig, world_size: int) -> int:
    """The step of a checkpoint, whose position in the data must be this run's.

    Raises:
        ValueError: the data, or the number of rows per step, is not what it was.
    """
    position = _saved_position(checkpoint)
    rows_per_step = config.rows * config.accumulation * world_size
    saved = position["rows_per_step"]
    if saved != rows_per_step:
        raise ValueError(
            f"cannot resume {checkpoint}: a step took {saved} rows, and would take {rows_per_step} now "
            f"({world_size} process(es) of {config.rows} rows, accumulated {config.accumulation} times)"
        )
    return rows.row_at(position) // rows_per_step


def check_model(checkpoint: Path, config: LogLinearConfig) -> None:
    """The checkpoint's model must be this run's. The options may name the same model file while its content is
    another, and the Trainer loads the weights that fit and leaves the rest as it is, without a word.

    Raises:
        ValueError: names every field of the model's configuration that differs.
    """
    saved = LogLinearConfig.from_pretrained(checkpoint)
    changed = [
        f"{name}: saved {getattr(saved, name)!r}, now {getattr(config, name)!r}"
        for name in LogLinearConfig.field_names()
        if name not in _WRITTEN_BY_SAVING and getattr(saved, name) != getattr(config, name)
    ]
    if changed:
        raise ValueError(
            f"cannot resume {checkpoint}: its model is another ({'; '.join(changed)}); "
            "give the model as it was, or another output folder"
        )


_WRITTEN_BY_SAVING = ("architectures", "dtype", "transformers_version")


def machine_of(arguments: TrainingArguments) -> dict[str, str]:
    """What `auto` came to: the kind of device, and the precision."""
    return {"device": arguments.device.type, "precision": "bf16" if arguments.bf16 else "fp32"}


def what_changes(
    checkpoint: Path, config: TrainConfig, steps: int, saved_steps: int, first_step: int, machine: dict[str, str]
) -> list[str]:
    """A line for each way in which the run that goes on is not the one that stopped: none where it is the same.

    Args:
        steps, saved_steps: length of the run now, and as it was begun.
        first_step: steps done.
        machine: as `machine_of` says.
    """
    saved = TrainConfig.from_file(checkpoint / CONFIG_FILE)
    lines = []
    if schedule := _schedule_line(config, steps, saved_steps, first_step):
        lines.append(schedule)
    position = _saved_position(checkpoint)
    before = {name: position.get(name, value) for name, value in machine.items()}
    if before != machine:
        lines.append(
            f"machine: {machine['device']} in {machine['precision']} now (was {before['device']} in "
            f"{before['precision']}): steps from {first_step + 1:,} on are those of the run that stopped only up to "
            "rounding"
        )
    if others := config.resumed_otherwise(saved):
        lines.append(f"options: {', '.join(others)}")
    return lines


def _schedule_line(config: TrainConfig, steps: int, saved_steps: int, first_step: int) -> str | None:
    """What another length of the run does to its learning rate; None where no step's rate depends on it."""
    now, before = schedule_of(config, steps), schedule_of(config, saved_steps)
    if first_step == 0 or all(now(step) == before(step) for step in range(first_step, steps)):
        return None
    peak, last, first = config.learning_rate, before(first_step - 1), now(first_step)
    return (
        f"schedule: {config.schedule} over {steps:,} steps now (was {saved_steps:,}); the learning rate goes from "
        f"{last * peak:.3g} at step {first_step:,} to {first * peak:.3g} at step {first_step + 1:,}. Steps from there "
        f"on are not those of the run of {saved_steps:,} steps, nor of one of {steps:,} from the start"
    )


def _saved_position(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / POSITION_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot resume {checkpoint}: {POSITION_FILE} cannot be read: {error}") from error
