"""Extend a byte-level BPE, the kind of LLaMA-3 and SmolLM2: tokenizer.json and the files beside it.

New tokens get the ids behind all others, special tokens included, so no id changes. `tokenizers` numbers added tokens
that are not in the model's vocabulary by the size of the vocabulary, so that new tokens would move them: LLaMA-3's
special tokens are therefore written into the vocabulary too, with the ids that they had. New merges rank behind all
others (byte_level_closure.py).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.encoding.byte_level_encoder import check_file_beside, check_settings, mark_ids, named_marks
from colossal_llama2.encoding.byte_level_file import ByteLevelModel
from colossal_llama2.encoding.byte_level_reach import unreached_tokens
from colossal_llama2.encoding.byte_level_tokens import extended, merges_into, shown_token, text_of
from colossal_llama2.encoding.file_names import (
    CONFIG_FILE,
    COPIED_FILES,
    FAST_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
)
from colossal_llama2.encoding.folder_files import SPECIAL_TOKENS, with_additional_tokens
from colossal_llama2.encoding.parity import (
    ByteLevelTokenizers,
    PieceFinder,
    texts_in_context,
    texts_of_old_pieces,
)
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.storage.files import contents_of, read_json, write_contents, write_json
from colossal_llama2.tokenizer.byte_level_closure import plan_byte_level
from colossal_llama2.tokenizer.closure import ExtensionPlan
from colossal_llama2.tokenizer.extension import ExtensionSettings, Proof, check_files, measure_groups
from colossal_llama2.tokenizer.new_pieces import NewPieces, read_new_pieces

REQUIRED_FILES = (FAST_FILE, CONFIG_FILE)
# The same vocabulary in the files of GPT-2's slow tokenizer. They would lack the new tokens.
OLDER_FILES = ("vocab.json", "merges.txt")
# The classes that leave tokenizer.json as it is in transformers 4.51 and 5.24, by trial of all. In version 5 the others
# put the normalizer, pre-tokenizer or decoder of their own models in place of the file's, or other merges (GPT-2, Qwen,
# Cohere, CodeLlama, Gemma, GPT-NeoX, ...), and TokenizersBackend is unknown to version 4.
PLAIN_CLASS = "PreTrainedTokenizerFast"
KEPT_CLASSES = (PLAIN_CLASS, "LlamaTokenizer", "LlamaTokenizerFast")
SHOWN_PIECES = 5


class ByteLevelExtension:
    """An `Extension` of a folder whose tokenizer.json is a byte-level BPE."""

    cure = "Use --closure complete"

    def __init__(self, source: Path):
        self._source = source
        self._model = ByteLevelModel.read(source)
        check_file_beside(self._model)
        check_files(source, REQUIRED_FILES, "LLaMA-3")
        check_settings(source)
        self._marks: dict[str, str] = {}
        self.vocabulary_size = self._model.size

    def read_pieces(self, path: Path) -> NewPieces:
        """The new pieces of a file, as tokens."""
        known = self._model.vocabulary.keys()
        return read_new_pieces(path, known=known, special_tokens=self._model.added.keys(), is_byte_level=True)

    def plan(self, wanted: Sequence[str], settings: ExtensionSettings) -> ExtensionPlan:
        """What to append; logs warnings about pieces that no text is encoded to."""
        if settings.piece_scores != "below":
            raise UserError(
                f"--piece_scores {settings.piece_scores} given, but {self._source} is a byte-level BPE, which ranks "
                "merges and has no scores; leave the flag out"
            )
        self._marks = self._given_marks(settings)
        plan = plan_byte_level(self._model, wanted, closure=settings.closure, max_added=settings.max_added_pieces)
        self._check_names(plan.pieces)
        if plan.split:
            logs.get_logger().warning(
                f"the pre-tokenizer of {self._source} divides a text inside {len(plan.split):,} of the pieces, so no "
                f"text is encoded to them: {_examples(plan.split, self._divided)}; give their parts, or pieces from "
                "mine_tokens.py, which divides text in the same way"
            )
        if plan.joined:
            logs.get_logger().warning(
                f"other merges always join the first or last byte of {len(plan.joined):,} of the pieces to the byte "
                f"beside it, so no text is encoded to them: {_examples(plan.joined)}"
            )
        if plan.blocked:
            logs.get_logger().warning(
                f"{len(plan.blocked):,} of the pieces can only be made through tokens that {self._source} has but its "
                "merges never make, or that its pre-tokenizer divides, so no text is encoded to them: "
                f"{_examples(plan.blocked)}"
            )
        return plan

    def _given_marks(self, settings: ExtensionSettings) -> dict[str, str]:
        """The tokens of --bos_token and --eos_token. Raises UserError if one cannot mark documents."""
        given = {"bos_token": settings.bos_token, "eos_token": settings.eos_token}
        marks = {key: text for key, text in given.items() if text is not None}
        for key, text in marks.items():
            if text not in self._model.added:
                raise UserError(
                    f"--{key} {text!r} given, but {self._model.path} has no such added token; it has "
                    f"{_examples(list(self._model.added), repr)}"
                )
        old_bos, old_eos = named_marks(self._source)
        bos, eos = marks.get("bos_token", old_bos), marks.get("eos_token", old_eos)
        if not eos:
            raise UserError(
                f"{self._source / CONFIG_FILE} names no eos_token, which marks the end of documents; give --eos_token, "
                "or copy the file again from the original tokenizer"
            )
        # Preparing data needs both.
        mark_ids(self._model, bos, eos)
        put = _put_around_texts(self._model.settings.get("post_processor") or {})
        for key, old in (("bos_token", old_bos), ("eos_token", old_eos)):
            if old in put and marks.get(key, old) != old:
                raise UserError(
                    f"--{key} {marks[key]!r} given, but the post_processor of {self._model.path} puts {old!r} around "
                    f"every text; change it there, or leave out --{key}"
                )
        return marks

    def _divided(self, token: str) -> str:
        """A token as reports write it, and how it is divided where it stands alone: "'3.14' (3|.|14)"."""
        text = text_of(token)
        if text is None:
            return repr(shown_token(token))
        parts = self._model.pre_tokenizer.pre_tokenize_str(text)
        return f"{shown_token(token)!r} ({'|'.join(shown_token(part) for part, _ in parts)})"

    def _check_names(self, tokens: Sequence[str]) -> None:
        """Raise UserError for a new token that is spelled like an added token: the vocabulary has each name once."""
        taken = next((token for token in tokens if token in self._model.added), None)
        if taken is not None:
            raise UserError(
                f"the new piece {shown_token(taken)!r} is spelled {taken!r} in {FAST_FILE}, which is an added token of "
                f"{self._source}; remove the piece, and others that contain it"
            )

    def write(self, folder: Path, plan: ExtensionPlan) -> None:
        """Write the files of the extended tokenizer to an existing folder."""
        _write_settings(self._source, folder, self._marks)
        _write_vocabulary(self._model, folder, plan.pieces)
        left = [name for name in OLDER_FILES if (self._source / name).is_file()]
        if left:
            logs.get_logger().info("%s: not copied, %s holds the same", ", ".join(left), FAST_FILE)

    def prove(self, folder: Path, plan: ExtensionPlan, documents: Sequence[str]) -> Proof:
        """Compare tokenizer.json's own merges with AutoTokenizer. Raises RunError for wrong ids."""
        model = ByteLevelModel.read(folder)
        source, target = ByteLevelTokenizers(self._source, self._model), ByteLevelTokenizers(folder, model)
        _check_ids(source, target, extended(self._model, plan.pieces), model)
        alone = [text for text in map(text_of, plan.pieces) if text is not None]
        old = [text for text in map(text_of, self._model.vocabulary) if text is not None]
        groups = {
            "new pieces alone": alone,
            "new pieces in context": texts_in_context(alone),
            "old pieces": texts_of_old_pieces(old),
            "parity text": documents,
        }
        activity = f"comparing the merges of {FAST_FILE} with AutoTokenizer"
        measured = measure_groups(source, target, groups, PieceFinder(plan.pieces), activity)
        return Proof([shown_token(token) for token in unreached_tokens(model, plan.pieces)], measured)

    def shown(self, piece: str) -> str:
        """The token's text with "▁" for spaces, or its bytes."""
        return shown_token(piece)


def _examples(tokens: Sequence[str], shown: Callable[[str], str] = lambda token: repr(shown_token(token))) -> str:
    return f"{', '.join(map(shown, tokens[:SHOWN_PIECES]))}{', ...' if len(tokens) > SHOWN_PIECES else ''}"


def _put_around_texts(post_processor: Mapping[str, Any]) -> set[str]:
    """The tokens that a post_processor of tokenizer.json puts before or after a single text."""
    if post_processor.get("type") == "Sequence":
        return {token for step in post_processor["processors"] for token in _put_around_texts(step)}
    if post_processor.get("type") == "TemplateProcessing":
        return {part["SpecialToken"]["id"] for part in post_processor["single"] if "SpecialToken" in part}
    # BERT's and RoBERTa's.
    return {post_processor[name][0] for name in ("cls", "sep") if name in post_processor}


# Writing the target.


def _write_settings(source: Path, folder: Path, marks: Mapping[str, str]) -> None:
    """Write everything except tokenizer.json. No id changes, so entries with ids stay as they are.

    Args:
        marks: what bos_token and eos_token become; without an entry they stay.
    """
    config = {**with_additional_tokens(read_json(source / CONFIG_FILE)), **marks}
    # Without a class, AutoTokenizer would need the model's config.json in the folder.
    named = config.get("tokenizer_class")
    if named not in KEPT_CLASSES:
        config["tokenizer_class"] = PLAIN_CLASS
        if named:
            logs.get_logger().info(
                f"tokenizer_class {named} is replaced by {PLAIN_CLASS}, with which every version of transformers reads "
                f"{FAST_FILE} as it is"
            )
    write_json(folder / CONFIG_FILE, config)
    write_contents(folder, contents_of(source, COPIED_FILES))
    _report_template(folder, config, marks)
    path = folder / SPECIAL_TOKENS_FILE
    if not path.exists():
        write_json(path, {name: config[name] for name in SPECIAL_TOKENS if config.get(name)})
    elif marks:
        write_json(path, {**read_json(path), **marks})


def _report_template(folder: Path, config: Mapping[str, Any], marks: Mapping[str, str]) -> None:
    """Warn of a chat template that uses a mark which has changed."""
    path = folder / TEMPLATE_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else str(config.get("chat_template"))
    for key in marks:
        if key in text:
            logs.get_logger().warning(
                f"the chat template of the source contains {key}, which is {marks[key]} from now on, in chats too; "
                "write the old token there if the chats should keep it"
            )


def _write_vocabulary(model: ByteLevelModel, folder: Path, tokens: Sequence[str]) -> None:
    """Write tokenizer.json: the source's, with more vocabulary and merges."""
    import orjson

    target = extended(model, tokens)
    old: dict[str, Any] = model.settings["model"]
    ids = {**target.vocabulary, **model.added}
    pairs = merges_into(tokens, target.vocabulary)
    # Files from before tokenizers 0.20 write a merge as "a b"; older versions read only that.
    spells_as_text = isinstance(old["merges"][0], str)
    changed = {
        **old,
        "vocab": dict(sorted(ids.items(), key=lambda entry: entry[1])),
        "merges": [*old["merges"], *(map(" ".join, pairs) if spells_as_text else pairs)],
    }
    content = {**model.settings, "model": changed}
    (folder / FAST_FILE).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


# Checking what was written, before it gets its final name.


def _check_ids(
    source: ByteLevelTokenizers, target: ByteLevelTokenizers, planned: ByteLevelModel, written: ByteLevelModel
) -> None:
    """Raise an error unless what was written is what was planned, and AutoTokenizer reads the same ids.

    Raises:
        UserError: AutoTokenizer adds a token that tokenizer.json lacks, and its id would move.
        RunError: the ids of other tokens are not those that were planned.
    """
    before, after = source.fast.get_vocab(), target.fast.get_vocab()
    known = {**planned.vocabulary, **planned.added}
    moved = [token for token, index in before.items() if after.get(token) != index]
    from_settings = [token for token in moved if token not in known]
    if from_settings:
        token = from_settings[0]
        raise UserError(
            f"--source_tokenizer_dir: transformers adds the token {token!r} with the id {before[token]}, because "
            f"{CONFIG_FILE} or its tokenizer_class names it and {FAST_FILE} lacks it; add it to {FAST_FILE}, or set it "
            f"to null in {CONFIG_FILE}"
        )
    wrong = moved + [token for token, index in known.items() if after.get(token) != index]
    is_as_planned = planned.vocabulary == written.vocabulary and planned.merges == written.merges
    if wrong or len(after) != len(known) or not is_as_planned or planned.added != written.added:
        raise RunError(
            f"transformers does not read back the ids of {wrong[:3] or 'the vocabulary'}; nothing was kept. "
            f"Check {FAST_FILE} and the added tokens of the source"
        )
