"""Prepare data, from folders of jsonl to bins of samples: prepare_pretrain_dataset.py and prepare_sft_dataset.py.

    plan       divide the input files into units of work (`data_files`)
    units      read, check, tokenize and cut each unit, and write it to the cache (`tokenize_unit`), in all workers
    deal       assign the pieces of all units to bins (`assign_bins`), by their lengths alone
    bins       splice each bin, and write it as arrow and jsonl (`bins`), in all workers
    manifest   check the counts of every token (`token_ledger`), write `manifest`, rename the folders (`output_folder`)

Every step writes complete files, so a run that was killed continues where it stopped. The output depends only on the
input, the settings and the tokenizer: not on the number of workers, the machine, or how often the run was killed.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.chat.chat_tokens import ChatTokenizer
from colossal_llama2.chat.templates import ChatTemplate, find_template
from colossal_llama2.corpus.conversation import chat_template
from colossal_llama2.corpus.data_files import InputFile, Inputs, LostFile, Unit, find_inputs, units_of
from colossal_llama2.dataset.layout import manifest, store, token_ledger
from colossal_llama2.dataset.layout.arrow_folder import DATA_FILE
from colossal_llama2.dataset.layout.output_folder import DATA_MANIFEST_FILE, WORK_PLAN_FILE, OutputDirs
from colossal_llama2.dataset.layout.prepare_settings import Execution, Settings, WorkSizes
from colossal_llama2.dataset.layout.token_ledger import Tally, TokenLedger
from colossal_llama2.dataset.write import bins as bins_module
from colossal_llama2.dataset.write.assign_bins import deal_units
from colossal_llama2.dataset.write.bad_rows import report_lost, roles_in_words, warn_of_many, write_bad_rows
from colossal_llama2.dataset.write.bins import BinTask, write_bin
from colossal_llama2.dataset.write.choose_encoder import choose_encoder
from colossal_llama2.dataset.write.document_marks import log_marks
from colossal_llama2.dataset.write.executors import task_runner
from colossal_llama2.dataset.write.overlap import count_overlaps
from colossal_llama2.dataset.write.prepare_config import PrepareConfig
from colossal_llama2.dataset.write.ray_node import SHARED_SECONDS
from colossal_llama2.dataset.write.sample_lengths import warn_if_too_long
from colossal_llama2.dataset.write.tokenization import FIRST_EXCHANGE_TOO_LONG, TRAINED_TOO_LONG, smallest_exchange
from colossal_llama2.dataset.write.tokenize_chat import chat_tokenizer_of, smallest_conversation
from colossal_llama2.dataset.write.tokenize_unit import UnitTask, do_unit
from colossal_llama2.dataset.write.unit_files import is_done, unit_file
from colossal_llama2.dataset.write.unknown_tokens import warn_of_unknown
from colossal_llama2.encoding.encoder import Encoder
from colossal_llama2.encoding.file_names import TEMPLATE_FILE
from colossal_llama2.encoding.registry import kind_of, load_encoder, puts_prefix_after_marks, shared_encoder
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.plurals import counted


def prepare_pretrain(**flags: Any) -> None:
    """Tokenize {"source", "target", "category"} records and splice them into samples of at most `max_length` tokens.

    Takes the flags of prepare_pretrain_dataset.py as keywords, with the same defaults. Writes arrow folders part-00000,
    ... with the columns of `columns`, part-00000.jsonl, ... and manifest.json, and prints the counts of all tokens.

    Raises:
        UserError: something is wrong with flags, folders or records. Nothing is left behind.
        RunError: the disk is full, a worker was killed or token counts do not balance; the same command continues. Or,
            with `on_bad_row` "skip" and `on_bad_file` "fail", input files could not be read to their end; the output
            is complete apart from them.
    """
    prepare(PrepareConfig.of_flags("pretrain", flags))


def prepare_sft(**flags: Any) -> None:
    """Tokenize conversations, one per sample of at most `max_length` tokens unless `splicing` joins them.

    Like `prepare_pretrain`, with four more columns: `inputs_decode`, `labels_decode`, `seq_length`, `seq_category`; and
    with chat_template.jinja beside the manifest.
    """
    prepare(PrepareConfig.of_flags("sft", flags))


def prepare(config: PrepareConfig) -> None:
    """Run one prepare command. Raises the errors of `prepare_pretrain`."""
    encoder = load_encoder(config.tokenizer_dir)
    is_sft = config.stage == "sft"
    has_prefix = is_sft and puts_prefix_after_marks(config.tokenizer_dir)
    template = find_template(config.chat_template, config.tokenizer_dir) if is_sft else None
    settings = config.settings(prefix_after_marks=has_prefix, template=template)
    log_marks(encoder, config.tokenizer_dir, chat_template=_chat_template(settings, encoder))
    turn_end = _turn_end(template, encoder, config.tokenizer_dir, has_prefix=has_prefix) if is_sft else None
    folders = OutputDirs(cache=config.data_cache_dir, jsonl=config.jsonl_dir, arrow=config.data_arrow_output_dir)
    warn_if_too_long(config.max_length, config.tokenizer_dir)
    if not folders.is_finished:
        folders.check()
    inputs = find_inputs(config.data_input_dirs, skips_bad_files=config.on_bad_file == "skip")
    content = manifest.plan_content(
        settings,
        inputs.files,
        tokenizer_sha256=encoder.fingerprint,
        folders=folders,
        unit_bytes=config.sizes.unit_bytes,
    )
    if folders.is_finished:
        _report_finished(folders, content, config.on_bad_file)
        return
    execution = config.execution
    # Ray first: if it is missing, the work of an earlier run must stay.
    with task_runner(execution) as run_tasks, folders.locked(config.shard):
        run = _Run(
            settings=settings,
            execution=execution,
            run_tasks=run_tasks,
            folders=folders,
            inputs=inputs,
            units=units_of(inputs.files, config.sizes.unit_bytes),
            tokenizer_dir=str(Path(config.tokenizer_dir).resolve()),
            on_bad_file=config.on_bad_file,
            sizes=config.sizes,
            turn_end=turn_end,
        )
        run.go(content)


def _chat_template(settings: Settings, encoder: Encoder) -> str | None:
    """The template of the conversations that are prepared, in Jinja; None in pre-training."""
    if settings.stage != "sft":
        return None
    if settings.template_text:
        return settings.template_text
    return chat_template(
        has_dummy_prefix=encoder.has_dummy_prefix,
        has_bos=encoder.bos_id >= 0,
        prefix_after_marks=settings.prefix_after_marks,
        speakers=settings.speakers,
        masks_opening=settings.masks_opening,
    )


def _turn_end(template: ChatTemplate | None, encoder: Encoder, tokenizer_dir: str, *, has_prefix: bool) -> list[int]:
    """The ids of the tokens that end an answer. Raises UserError for a template that cannot be used."""
    if template is None:
        return [encoder.eos_id]
    tokenizer = ChatTokenizer(template, encoder, tokenizer_dir, prefix_after_marks=has_prefix)
    try:
        return tokenizer.turn_ends
    finally:
        tokenizer.close()


def _report_finished(folders: OutputDirs, content: dict[str, Any], on_bad_file: str) -> None:
    """Log that there is nothing to do, or raise UserError; clean up after a run that died while emptying the cache."""
    written = manifest.check_finished(folders, content)
    folders.tidy_up(lambda: store.read_json_or_none(folders.cache / WORK_PLAN_FILE) == content)
    token_ledger.print_tables(written)
    logs.get_logger().info(f"nothing to do: {folders.final_arrow} is complete, and has the same input and settings")
    report_lost(written.get("lost_files", ()), on_bad_file=on_bad_file, output=folders.final_arrow)


def _elsewhere(kind: str, name: str, missing: int, total: int, folder: str) -> RunError:
    return RunError(
        f"{counted(missing, kind)} of {total:,}, such as {name}, cannot be seen in {folder} after they were done; "
        f"let all machines share this folder, {store.GO_ON}"
    )


@dataclass
class _Run:
    """One command with its folders locked."""

    settings: Settings
    execution: Execution
    run_tasks: Callable
    folders: OutputDirs
    inputs: Inputs
    units: list[Unit]
    tokenizer_dir: str
    on_bad_file: str
    sizes: WorkSizes
    turn_end: list[int] | None
    sample: dict[str, int] = field(default_factory=dict)

    @property
    def files(self) -> list[InputFile]:
        """The files to read."""
        return self.inputs.files

    def go(self, content: dict[str, Any]) -> None:
        """Do everything that is not done yet."""
        if manifest.begin_or_continue(self.folders, content) and not self.execution.shard:
            logs.get_logger().info(f"continuing the unfinished run in {self.folders.cache}")
        if not self.execution.shard:
            self._remove_leftovers()
        if not self.folders.is_being_published:
            encoder, self.sample = choose_encoder(self.tokenizer_dir, self.files, self.settings)
            self._do_units(encoder)
            missing = self._unseen(
                self.units, lambda unit: is_done(self.folders.cache, unit), waits=not self.execution.shard
            )
            if missing and not self.execution.shard:
                raise _elsewhere("unit", missing[0].name, len(missing), len(self.units), str(self.folders.cache))
            if missing:
                logs.get_logger().info(f"this share is done; other shares lack {counted(len(missing), 'unit')}")
                return
        with self.folders.finishing() as is_ours:
            if not is_ours:
                logs.get_logger().info("this share is done; another run writes the bins")
                return
            written = self._finish(content)
        report_lost(written.get("lost_files", ()), on_bad_file=self.on_bad_file, output=self.folders.final_arrow)

    def _unseen(self, items: Sequence[Any], is_written: Callable[[Any], bool], *, waits: bool) -> list[Any]:
        """Those of the items that are not written.

        Args:
            waits: whether all are done, perhaps on other nodes, whose files may appear here later.
        """
        end = time.monotonic() + (SHARED_SECONDS if waits and self.execution.executor == "ray" else 0)
        missing = [item for item in items if not is_written(item)]
        while missing and time.monotonic() < end:
            time.sleep(1)
            missing = [item for item in missing if not is_written(item)]
        return missing

    def _remove_leftovers(self) -> None:
        count = self.folders.remove_leftovers()
        if count:
            logs.get_logger().info(f"removed {count:,} half-written files and folders of an earlier run")

    def _do_units(self, encoder: type[Encoder]) -> None:
        """Do the units of this share that are not done yet."""
        number, shares = self.execution.shard or (1, 1)
        own = [unit for unit in self.units if unit.number % shares == number - 1]
        waiting = [unit for unit in own if not is_done(self.folders.cache, unit)]
        documents = tokens = 0
        total, left = (sum(unit.size for unit in units) for units in (own, waiting))
        tasks = (self._unit_task(unit, encoder) for unit in waiting)
        start = time.monotonic()
        with logs.progress(
            total=total, initial=total - left, description="tokenize", unit="B", unit_scale=True
        ) as progress:
            for done in self.run_tasks(do_unit, tasks):
                documents += done.documents
                tokens += done.tokens
                rate = documents / max(time.monotonic() - start, 1e-9)
                progress.update(done.size, documents=f"{documents:,} ({rate:,.0f}/s)", tokens=f"{tokens:,}")

    def _unit_task(self, unit: Unit, encoder: type[Encoder]) -> UnitTask:
        files = {span.file: self.files[span.file] for span in unit.spans}
        fails_at_bad_file = (self.settings.on_bad_row, self.on_bad_file) == ("fail", "fail")
        return UnitTask(
            unit,
            files,
            self.settings,
            self.tokenizer_dir,
            encoder,
            str(self.folders.cache),
            os.getcwd(),
            fails_at_bad_file,
            self.sizes,
        )

    def _finish(self, content: dict[str, Any]) -> dict[str, Any]:
        """Write the bins and the manifest, rename the folders, print the token counts, and return the manifest."""
        if self.folders.is_being_published:
            written = store.read_json_or_none(self.folders.arrow / DATA_MANIFEST_FILE)
        else:
            written = self._write(content)
        self.folders.publish()
        self.folders.empty_cache()
        token_ledger.print_tables(written)
        warn_of_unknown(written, tokenizer=self.tokenizer_dir)
        # Manifests of earlier versions have none.
        if roles := written.get("unknown_roles"):
            logs.get_logger().warning(f"bad rows were skipped for {roles_in_words(roles)}")
        return written

    def _write(self, content: dict[str, Any]) -> dict[str, Any]:
        """Write the bins, the files beside them, and last the manifest. Returns the manifest."""
        if self.execution.shard:
            self._remove_leftovers()
        manifest.check_unchanged(self.files)
        ledger, hashes, lost = self._collect()
        warn_of_many(ledger, self.files)
        self._check_enough(ledger, lost)
        bins = self._write_bins()
        kept = Tally(trained=sum(entry["trained"] for entry in bins))
        kept.masked = sum(entry["tokens"] for entry in bins) - kept.trained
        kept.predicted = sum(entry["predicted"] for entry in bins)
        ledger.check({number: file.path for number, file in enumerate(self.files)}, bins=kept)
        if self.settings.on_bad_row == "skip":
            write_bad_rows(self.folders.arrow, self._lines_before_units(), self.folders.cache)
        self._write_chat_template()
        overlaps = {"eval_dedup": self._count_overlaps()} if self.settings.eval_dedup else {}
        whole = manifest.manifest_content(
            self.settings,
            self.files,
            tokenizer={"sha256": content["tokenizer"], **self.sample},
            hashes=hashes,
            ledger=ledger,
            bins=bins,
            lost=lost,
            left_out=self.inputs.left_out,
        )
        whole.update(overlaps)
        if self.turn_end is not None:
            whole["turn_end"] = self.turn_end
        store.write_json_whole(self.folders.arrow / DATA_MANIFEST_FILE, whole)
        return whole

    def _collect(self) -> tuple[TokenLedger, dict[int, str], list[LostFile]]:
        """The sum of the counts of all units, the hash of each file, and the files that were not read to their end."""
        ledger, hashes, lost = TokenLedger(), {}, list(self.inputs.lost)
        for unit in self.units:
            path = unit_file(self.folders.cache, unit, "json")
            content = store.read_json(path)
            with store.damage_reported(path):
                ledger.add(TokenLedger.from_json(content["account"]))
                hashes.update({int(file): digest for file, digest in content["hashes"].items()})
                lost += [LostFile(**entry) for entry in content["lost"]]
        return ledger, hashes, lost

    def _check_enough(self, ledger: TokenLedger, lost: Sequence[LostFile]) -> None:
        """Raise UserError unless every bin, and eval, gets at least one piece."""
        total, num_bins = ledger.total(), self.settings.num_bins
        if self.settings.has_eval and not total.held_out_pieces:
            raise UserError(
                f"--eval_fraction {self.settings.eval_fraction} holds out nothing of "
                f"{counted(total.documents, 'document')}; give a larger fraction, or 0"
            )
        pieces = total.pieces - total.held_out_pieces
        if pieces >= num_bins:
            return
        reasons = "".join(f", {count} dropped: {reason}" for reason, (count, _) in sorted(total.dropped.items()))
        left = (
            f"{counted(total.documents, 'record')} gave {counted(pieces, 'piece')} of at most "
            f"{self.settings.max_length:,} tokens{reasons}"
        )
        if total.held_out_documents:
            left += f", {counted(total.held_out_documents, 'record')} held out by --eval_fraction"
        if ledger.unknown_roles:
            left += f", {roles_in_words(ledger.unknown_roles)}"
        if ledger.bad_rows:
            reason, count = next(iter(ledger.bad_reasons().items()))
            left += f", {counted(ledger.bad_rows, 'bad row')} skipped, most often ({count}): {reason}"
        if lost:
            left += f", {counted(len(lost), 'file')} not read to the end, such as {lost[0]}"
        if not pieces:
            raise UserError(f"nothing to prepare: {left}; {self._cure(total.dropped)}")
        raise UserError(
            f"--num_spliced_dataset_bins {num_bins} given, but {left}; "
            f"give at most {counted(pieces, 'bin')} or more data"
        )

    def _cure(self, dropped: Mapping[str, Any]) -> str:
        """The cure if no record gave a sample."""
        if dropped.keys().isdisjoint((FIRST_EXCHANGE_TOO_LONG, TRAINED_TOO_LONG)):
            return "give folders with usable records"
        prefix = self.settings.prefix_after_marks
        rendering = chat_tokenizer_of(self.settings, self.tokenizer_dir)
        if rendering is not None:
            least = smallest_conversation(rendering)
            return f"give a larger --max_length, such as 4096 (two messages of one letter take {least} tokens)"
        least = smallest_exchange(load_encoder(self.tokenizer_dir), prefix_after_marks=prefix)
        return (
            f"give a larger --max_length, such as 4096 (the usual system text and the names of the speakers take "
            f"{least} tokens before the first message)"
        )

    def _write_bins(self) -> list[dict[str, Any]]:
        """Write the bins that are not written yet. Returns the counts of all bins."""
        categories, sources = deal_units(
            self.units,
            self.files,
            settings=self.settings,
            cache_dir=self.folders.cache,
            held_pieces=self.sizes.held_pieces,
        )
        paths = self.folders.paths()
        tasks = [
            BinTask(number, self.settings, self.tokenizer_dir, **paths, categories=categories, sources=sources)
            for number in self.settings.all_bins
        ]
        waiting = [task for task in tasks if not self._is_written(task)]
        with logs.progress(
            total=len(tasks), initial=len(tasks) - len(waiting), description="write bins", unit="bins"
        ) as progress:
            for _ in self.run_tasks(write_bin, waiting):
                progress.update()
        self._check_seen(tasks)
        if self.execution.executor == "ray":
            # Left by workers that were lost; others have done their tasks. One of the lost may be at work here again.
            self.folders.remove_leftovers()
            self._check_seen(tasks)
        names = [self.settings.bin_name(number) for number in self.settings.all_bins]
        return [store.read_json(bins_module.bin_counts_file(paths["cache_dir"], name)) for name in names]

    def _check_seen(self, tasks: list[BinTask]) -> None:
        """Raise RunError unless all bins are in the output folders."""
        if missing := self._unseen(tasks, self._is_written, waits=True):
            folders = " and ".join(str(folder) for folder in (self.folders.arrow, self.folders.jsonl) if folder)
            raise _elsewhere("bin", missing[0].name, len(missing), len(tasks), folders)

    def _is_written(self, task: BinTask) -> bool:
        name = self.settings.bin_name(task.number)
        ledger = store.read_json_or_none(bins_module.bin_counts_file(task.cache_dir, name))
        data = Path(task.arrow_dir, name, DATA_FILE)
        return (
            ledger is not None
            and data.is_file()
            and data.stat().st_size == ledger["bytes"]
            and (not self.settings.writes_jsonl or Path(task.jsonl_dir, f"{name}.jsonl").is_file())
        )

    def _lines_before_units(self) -> Iterator[tuple[Unit, int]]:
        """Yield each unit, and how many lines of its file are in earlier units: 0 for a unit of whole files."""
        lines: dict[int, int] = {}
        for unit in self.units:
            (file, _, stop), *_ = unit.spans
            yield unit, lines.get(file, 0)
            if stop is not None:
                content = store.read_json(unit_file(self.folders.cache, unit, "json"))
                lines[file] = lines.get(file, 0) + content["account"]["lines"]

    def _count_overlaps(self) -> dict[str, Any]:
        # The encoder does not matter here.
        encoder = kind_of(self.tokenizer_dir).encoder
        tasks = [self._unit_task(unit, encoder) for unit in self.units]
        lines_before = {unit.number: lines for unit, lines in self._lines_before_units()}
        paths = [file.path for file in self.files]
        return count_overlaps(
            tasks, lines_before, run_tasks=self.run_tasks, paths=paths, max_grams=self.sizes.max_grams
        )

    def _write_chat_template(self) -> None:
        """Write the chat template, which train_sft.py copies into the folder of every model it saves."""
        template = _chat_template(self.settings, shared_encoder(self.tokenizer_dir))
        if template is not None:
            with store.appearing_file(self.folders.arrow / TEMPLATE_FILE) as file:
                file.write(template.encode())
