"""The reports of a run beside its checkpoints (settings, environment, loss curve), and the card of its model."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colossal_llama2 import logs
from colossal_llama2.dataset.read.loss_groups import Amount, amounts, merged
from colossal_llama2.dataset.read.token_counts import SourceRead
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import replace_file, to_json
from colossal_llama2.train.report import loss_plot, model_card, train_log
from colossal_llama2.train.run_folder import run_outputs
from colossal_llama2.train.run_folder.file_names import REPORT_NAMES
from colossal_llama2.train.run_folder.run_folder import RunFolder

if TYPE_CHECKING:
    import datasets


@dataclass
class RunReport:
    """What stays the same during a run, and is reported at its end.

    Attributes:
        settings: the content of --config_file.
        environment: see `environment`.
        amounts: documents and tokens of each source and category; None if the data does not record them.
        base_model: the name of the model that the weights come from.
        sources: names of the sources of --dataset.
    """

    folder: RunFolder
    settings: dict[str, Any]
    environment: dict[str, Any]
    amounts: list[Amount] | None
    base_model: str
    sources: Sequence[str] = ()

    def write_files(self) -> None:
        """Write the three files, each atomically. A failure is logged and does not end the run."""
        folder = self.folder
        if not folder.log.is_file():
            return
        try:
            folder.check_held()
            settings = {**self.settings, "run_id": run_outputs.identify(folder)}
            replace_file(folder.settings, to_json(settings).encode())
            replace_file(folder.environment, to_json(self.environment).encode())
            curves = loss_plot.curves_of(train_log.read(folder.log))
            if curves.losses:
                replace_file(folder.loss_plot, loss_plot.draw(curves, title=f"{folder.path.name}: training loss"))
        except UserError as error:
            logs.get_logger().warning("No loss curve is drawn: %s", error)
        except Exception as error:  # a bug of ours in the picture must not lose the model
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
        """The README.md of the model at the end of the run; None, with a warning, if it cannot be made.

        Args:
            tokens_seen: by the run, padding not counted.
            read: returns the samples and tokens that the run read from each source.
            stages: returns all stages of the model, the last of which is the run.
            skipped_steps: steps of the run without an update.
        """
        try:
            text = model_card.render(
                settings=self.settings,
                base_model=self.base_model,
                amounts=self.amounts or [],
                read=read(),
                stages=stages(),
                sources=self.sources,
                records=train_log.read(self.folder.log),
                tokens_seen=tokens_seen,
                skipped_steps=skipped_steps,
            )
            text.encode()
            return text
        except Exception as error:  # nor in the card
            logs.get_logger().warning("%s: the model gets no card (%s)", self.folder, in_words(error))
            return None


def in_words(error: Exception) -> str:
    """An error's message, with its type where the message alone may not be clear."""
    return str(error) if isinstance(error, OSError) else repr(error)


def amounts_of_all(dataset: "datasets.Dataset") -> list[Amount] | None:
    """Documents and tokens of each source and category; None if the data does not record them. Called on all ranks."""
    from colossal_llama2.engine.ranks import collectives

    rank, ranks = collectives.place()
    with collectives.all_or_none():
        mine = amounts(dataset, share=rank, shares=ranks)
    found = collectives.gather_values(mine)
    return None if None in found else merged(row for rows in found for row in rows)


def environment(versions: dict[str, Any]) -> dict[str, Any]:
    """Software versions, and the hosts with their devices and ranks. Called on all ranks."""
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
