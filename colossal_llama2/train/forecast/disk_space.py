"""How much disk space the checkpoints of a run will take, and whether it is free."""

import shutil
from collections.abc import Sequence

from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.plurals import counted
from colossal_llama2.train.settings.config import SaveConfig
from colossal_llama2.train.stepping.state import TrainState


def saved_steps(
    order: SampleOrder,
    state: TrainState,
    num_epochs: int,
    save_interval: int,
    *,
    total_steps: int,
    skip_epochs: bool = False,
) -> list[int]:
    """The steps after which a run that begins at `state` saves.

    These are multiples of `save_interval`, the end of each epoch unless `skip_epochs`, and the end of the run.
    """
    first_end = state.step + order.steps_after(state.sample_start_index)
    saved = {total_steps, *range((state.step // save_interval + 1) * save_interval, total_steps + 1, save_interval)}
    if not skip_epochs:
        saved.update(first_end + epoch * order.steps_after(0) for epoch in range(num_epochs - state.epoch))
    return sorted(step for step in saved if state.step < step <= total_steps)


def most_kept(steps: Sequence[int], *, keep_last: int | None, keep_every: int | None) -> int:
    """The largest number of checkpoints on the disk at once: an old one is removed when the new one is complete."""
    most, kept = 0, []
    for step in steps:
        kept.append(step)
        most = max(most, len(kept))
        if keep_last is not None:
            kept = [old for old in kept[:-keep_last] if keep_every and old % keep_every == 0] + kept[-keep_last:]
    return most


def disk_lines(saving: SaveConfig, checkpoint_bytes: int, steps: Sequence[int]) -> str:
    """The space that checkpoints need and that is free, in --save_dir or where it will be created.

    Args:
        checkpoint_bytes: size of a checkpoint.
        steps: those after which the run saves.
    """
    count = most_kept(steps, keep_last=saving.keep_last, keep_every=saving.keep_every)
    folder = saving.folder.path.absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    lines = [
        f"disk: {counted(len(steps), 'checkpoint')} of {checkpoint_bytes / 1e9:,.1f} GB, at most {count} at once: "
        f"{count * checkpoint_bytes / 1e9:,.1f} GB of {free / 1e9:,.1f} GB free here"
    ]
    if free < count * checkpoint_bytes:
        lines.append(
            f"  there is room for {free // checkpoint_bytes} of them; free some space, or keep fewer with --keep_last"
        )
    return "\n".join(lines)
