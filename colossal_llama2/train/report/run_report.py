"""What a run leaves beside its checkpoints, and in its model: settings, environment, the loss curve, the model card."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.dataset.read.loss_groups import Amount, amounts, merged
from colossal_llama2.dataset.read.token_counts import SourceRead
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import replace_file, to_json
from colossal_llama2.train.report import loss_plot, model_card, train_log
from colossal_llama2.train.run_folder import run_outputs
from colossal_llama2.train.run_folder.checkpoint_files import LOG_NAME, REPORT_NAMES

SETTINGS_NAME, ENVIRONMENT_NAME, PLOT_NAME = REPORT_NAMES


@dataclass
class RunReport:
    """Knows what is the same all through a run.

    Attributes:
        settings: what --config_file holds.
        environment: what `environment` gave.
        amounts: how much data of each source and category there is; None if the data does not say.
        base_model: the name of the model that the weights come from.
        sources: names of the folders of --dataset.
    """

    save_dir: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    amounts: list[Amount] | None
    base_model: str
    sources: Sequence[str] = ()

    def know_steps(self, total_steps: int, warmup_steps: int) -> None:
        """Add to the settings what the amount of data has decided."""
        self.settings.update(total_steps=total_steps, warmup_steps=warmup_steps)

    def write_files(self) -> None:
        """Write the three files, each whole or not at all. What fails is told, and ends nothing."""
        folder = Path(self.save_dir)
        if not (folder / LOG_NAME).is_file():
            return
        try:
            self.settings.setdefault("run_id", run_outputs.identify(self.save_dir))
            replace_file(folder / SETTINGS_NAME, to_json(self.settings).encode())
            replace_file(folder / ENVIRONMENT_NAME, to_json(self.environment).encode())
            curves = loss_plot.curves_of(train_log.read(folder / LOG_NAME))
            if curves.losses:
                replace_file(folder / PLOT_NAME, loss_plot.draw(curves, title=f"{folder.name}: training loss"))
        except UserError as error:
            logs.get_logger().warning("No loss curve is drawn: %s", error)
        except Exception as error:  # a bug of ours must not take the model along, which is worth more than a picture
            names = ", ".join(REPORT_NAMES)
            logs.get_logger().warning("%s: not all of %s could be written (%s)", folder, names, in_words(error))

    def card(
        self,
        *,
        tokens_seen: int,
        read: Callable[[], Sequence[SourceRead]],
        stages: Callable[[], Sequence[dict[str, Any]]] = list,
        skipped_steps: int = 0,
    ) -> str | None:
        """The README.md of the model at the end of the run; None, which is told, if it cannot be made.

        `read` gives what the run has read of each source, `stages` all of the model's, the last of which is the run;
        `skipped_steps` of its steps made no update.
        """
        try:
            text = model_card.render(
                settings=self.settings,
                base_model=self.base_model,
                amounts=self.amounts or [],
                read=read(),
                stages=stages(),
                sources=self.sources,
                records=train_log.read(Path(self.save_dir, LOG_NAME)),
                tokens_seen=tokens_seen,
                skipped_steps=skipped_steps,
            )
            text.encode()
            return text
        except Exception as error:  # nor a card
            logs.get_logger().warning("%s: the model gets no card (%s)", self.save_dir, in_words(error))
            return None


def in_words(error: Exception) -> str:
    """What an error says, with its type if the type is needed to understand it."""
    return str(error) if isinstance(error, OSError) else repr(error)


def amounts_of_all(dataset) -> list[Amount] | None:
    """How much data of each source and category there is, None if it does not say. Called on all ranks."""
    from colossal_llama2.engine.ranks import collectives

    rank, ranks = collectives.place()
    with collectives.all_or_none():
        mine = amounts(dataset, share=rank, shares=ranks)
    found = collectives.gather_values(mine)
    return None if None in found else merged(row for rows in found for row in rows)


def environment(versions: dict[str, Any]) -> dict[str, Any]:
    """Software, and the hosts with their devices and ranks. Called on all ranks."""
    import socket

    import torch

    from colossal_llama2.engine.ranks import collectives

    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    device = f"{gpu.name}, {gpu.total_memory:,} bytes" if gpu else "cpu"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mine = [socket.gethostname(), device, os.cpu_count(), memory, torch.get_num_threads()]
    ranks = collectives.gather_values(mine)
    hosts: dict[str, dict[str, Any]] = {}
    for rank, (host, device, cores, memory, threads) in enumerate(ranks):
        known = hosts.setdefault(host, {"cpu_cores": cores, "memory_bytes": memory, "ranks": {}})
        known["ranks"][str(rank)] = {"device": device, "threads": threads}
    return {
        "versions": versions,
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "processor": platform.processor() or platform.machine(),
        "world_size": len(ranks),
        "hosts": hosts,
    }
