"""Extend a SentencePiece tokenizer: tokenizer.model, and the files that transformers reads beside it.

New pieces are appended after the source's pieces, and its added tokens move behind them. Their scores are below every
old merge.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from colossal_llama2 import logs
from colossal_llama2.encoding.added_tokens import read_added_tokens
from colossal_llama2.encoding.bpe_model import BpeModel, merges, unreachable, with_pieces
from colossal_llama2.encoding.file_names import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    COPIED_FILES,
    FAST_FILE,
    MODEL_FILE,
    SPECIAL_TOKENS_FILE,
)
from colossal_llama2.encoding.parity import (
    PieceFinder,
    Tokenizers,
    load_with_transformers,
    texts_alone,
    texts_in_context,
    texts_of_old_pieces,
)
from colossal_llama2.encoding.sentencepiece_file import sentencepiece_file
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.storage.files import contents_of, read_json, write_contents, write_json
from colossal_llama2.tokenizer.closure import ExtensionPlan, plan_extension
from colossal_llama2.tokenizer.extension import ExtensionSettings, Proof, check_files, measure_groups
from colossal_llama2.tokenizer.new_pieces import NewPieces, read_new_pieces

# What LLaMA-2 ships beside its weights, and what transformers needs to load a tokenizer with its settings.
REQUIRED_FILES = (MODEL_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE)
SHOWN_PIECES = 5


class SentencePieceExtension:
    """An `Extension` of a folder with tokenizer.model."""

    cure = "Use --piece_scores below and --closure complete"

    def __init__(self, source: Path):
        sentencepiece_file(source)
        check_files(source, REQUIRED_FILES, "LLaMA-2")
        self._source = source
        self._model = BpeModel.read(source)
        self._added_tokens = read_added_tokens(source, len(self._model.pieces))
        self.vocabulary_size = len(self._model.pieces)

    def read_pieces(self, path: Path) -> NewPieces:
        """The new pieces of a file."""
        special_tokens = _special_tokens(self._source, self._model, self._added_tokens)
        return read_new_pieces(path, known=self._model.scores, special_tokens=special_tokens)

    def plan(self, wanted: Sequence[str], settings: ExtensionSettings) -> ExtensionPlan:
        """What to append; logs a warning about pieces that the normalizer never produces."""
        if settings.bos_token is not None or settings.eos_token is not None:
            raise UserError(
                f"--bos_token and --eos_token are for a byte-level BPE, and {self._source} is a SentencePiece "
                "tokenizer, whose documents begin with <s> and end with </s>; leave them out"
            )
        plan = plan_extension(
            self._model,
            wanted,
            closure=settings.closure,
            piece_scores=settings.piece_scores,
            max_added=settings.max_added_pieces,
        )
        _warn_of_altered(self._source, plan.altered)
        return plan

    def write(self, folder: Path, plan: ExtensionPlan) -> None:
        """Write the files of the extended tokenizer."""
        _write_tokenizer(self._source, folder, self._model, plan)

    def prove(self, folder: Path, plan: ExtensionPlan, documents: Sequence[str]) -> Proof:
        """Compare SentencePiece with the slow and the fast tokenizer. Raises RunError for wrong ids."""
        target = Tokenizers(folder)
        _check_ids(target, self._model, plan, self._added_tokens)
        alone = texts_alone(plan.pieces)
        old = texts_alone([piece for piece in self._model.pieces if piece in self._model.scores])
        groups = {
            "new pieces alone": alone,
            "new pieces in context": texts_in_context(alone),
            "old pieces": texts_of_old_pieces(old),
            "parity text": documents,
        }
        source = Tokenizers(self._source)
        compared = "SentencePiece, slow and fast tokenizer"
        if not (source.slow and target.slow):
            logs.get_logger().info(
                "transformers has no slow tokenizer for these folders, so only its fast one is compared"
            )
            compared = "SentencePiece and fast tokenizer"
        measured = measure_groups(source, target, groups, PieceFinder(plan.pieces), f"comparing {compared}")
        return Proof(unreachable((folder / MODEL_FILE).read_bytes(), plan.pieces), measured)

    def shown(self, piece: str) -> str:
        """The piece as it is."""
        return piece


# Reading the source.


def _special_tokens(source: Path, model: BpeModel, added_tokens: dict[str, int]) -> set[str]:
    """Every token that is not ordinary text: <s>, <0x0A> and the like, and the special tokens of transformers."""
    special = set(model.pieces).difference(model.scores).union(model.user_defined)
    for value in read_json(source / SPECIAL_TOKENS_FILE).values():
        for token in value if isinstance(value, list) else [value]:
            content = token.get("content") if isinstance(token, dict) else token
            if not isinstance(content, str):
                raise UserError(f"{source / SPECIAL_TOKENS_FILE}: {token!r} is not a token; copy the file again")
            special.add(content)
    return special.union(added_tokens)


def _warn_of_altered(source: Path, altered: Sequence[str]) -> None:
    """Warn about pieces that the source's normalizer never produces."""
    if not altered:
        return
    shown = ", ".join(map(repr, altered[:SHOWN_PIECES])) + (", ..." if len(altered) > SHOWN_PIECES else "")
    logs.get_logger().warning(
        f"the normalizer of {source} never produces {len(altered):,} of the pieces, so no text is encoded to them: "
        f"{shown}; remove them from the file, or extend a tokenizer without a normalizer, such as LLaMA-2's"
    )


# Writing the target.


def _write_tokenizer(source: Path, folder: Path, model: BpeModel, plan: ExtensionPlan) -> None:
    num_source, num_added = len(model.pieces), len(plan.pieces)
    (folder / MODEL_FILE).write_bytes(with_pieces(model.content, plan.pieces, plan.scores))
    _write_settings(source, folder, num_source, num_added)
    _write_fast_tokenizer(source, folder, model, plan)


def _write_settings(source: Path, folder: Path, num_source_pieces: int, num_added: int) -> None:
    """Write everything except the two vocabularies, with the ids of added tokens moved after the new pieces."""
    config = read_json(source / CONFIG_FILE)
    if config.get("added_tokens_decoder"):
        config["added_tokens_decoder"] = {
            str(_moved(int(index), num_source_pieces, num_added)): token
            for index, token in config["added_tokens_decoder"].items()
        }
    # Without a class, AutoTokenizer would need the model's config.json in the folder.
    config["tokenizer_class"] = config.get("tokenizer_class") or "LlamaTokenizer"
    write_json(folder / CONFIG_FILE, config)
    if (source / ADDED_TOKENS_FILE).is_file():
        added = read_json(source / ADDED_TOKENS_FILE)
        moved = {token: _moved(index, num_source_pieces, num_added) for token, index in added.items()}
        write_json(folder / ADDED_TOKENS_FILE, moved)
    write_contents(folder, contents_of(source, COPIED_FILES))


def _moved(index: int, num_source_pieces: int, num_added: int) -> int:
    return index if index < num_source_pieces else index + num_added


def _write_fast_tokenizer(source: Path, folder: Path, model: BpeModel, plan: ExtensionPlan) -> None:
    """Write tokenizer.json, with vocabulary and merges of the new tokenizer.model and the rest from the source."""
    import orjson

    if (source / FAST_FILE).is_file():
        fast = read_json(source / FAST_FILE)
    else:
        fast = orjson.loads(load_with_transformers(source).backend_tokenizer.to_str())
    if fast.get("model", {}).get("type") != "BPE":
        raise UserError(f"{source / FAST_FILE} is not a BPE tokenizer, as {MODEL_FILE} is; remove it")
    num_source, num_added = len(model.pieces), len(plan.pieces)
    pieces = model.pieces + plan.pieces
    scores = [model.scores.get(piece, 0.0) for piece in model.pieces] + plan.scores
    pairs = merges(pieces, scores, [*model.scores, *plan.pieces])
    old_merges = fast["model"]["merges"]
    _warn_if_merges_differ(old_merges, pairs, set(model.pieces))
    # Files from before tokenizers 0.20, such as LLaMA-2's, write a merge as "a b"; older versions read only that.
    spells_as_text = bool(old_merges) and isinstance(old_merges[0], str)
    fast["model"]["merges"] = list(map(" ".join, pairs)) if spells_as_text else pairs
    fast["model"]["vocab"] = {piece: index for index, piece in enumerate(pieces)}
    for token in fast.get("added_tokens", []):
        token["id"] = _moved(token["id"], num_source, num_added)
    _move_post_processor_ids(fast.get("post_processor"), num_source, num_added)
    # orjson: the standard library takes a minute to indent a million pieces.
    (folder / FAST_FILE).write_bytes(orjson.dumps(fast, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _warn_if_merges_differ(source_merges: list, pairs: list, source_pieces: set[str]) -> None:
    """Warn if the old merges change or lose their order: then old text may be tokenized differently.

    The order of the splits of one piece does not matter, since all but one of them never happen (byte_level_closure.py
    has the reason). transformers 4 writes the longest left part first, version 5 the shortest.
    """
    old = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in source_merges]
    kept = [
        (left, right)
        for left, right in pairs
        if left in source_pieces and right in source_pieces and left + right in source_pieces
    ]
    if _by_piece(old) != _by_piece(kept):
        logs.get_logger().warning(
            "the source's %s and %s have different merges (%d and %d); the target follows %s",
            FAST_FILE,
            MODEL_FILE,
            len(old),
            len(kept),
            MODEL_FILE,
        )


def _by_piece(pairs: Iterable[tuple[str, ...]]) -> list[set[tuple[str, ...]]]:
    """The splits of each piece, in the order of pieces."""
    return [set(splits) for _, splits in groupby(pairs, key="".join)]


def _move_post_processor_ids(processor: dict | None, num_source_pieces: int, num_added: int) -> None:
    """Move the ids of special tokens in a template or a sequence of post-processors."""
    if processor is None:
        return
    for part in processor.get("processors", []):
        _move_post_processor_ids(part, num_source_pieces, num_added)
    if processor.get("type") == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [_moved(index, num_source_pieces, num_added) for index in token["ids"]]


# Checking what was written, before it gets its final name.


def _check_ids(tokenizers: Tokenizers, model: BpeModel, plan: ExtensionPlan, added_tokens: dict[str, int]) -> None:
    """Raise RunError unless the fast tokenizer has exactly the old, new and added tokens with their ids."""
    expected = {piece: index for index, piece in enumerate(plan.pieces, start=len(model.pieces))}
    expected.update({token: index + len(plan.pieces) for token, index in added_tokens.items()})
    vocabulary = tokenizers.fast.get_vocab()
    wrong = [token for token, index in expected.items() if vocabulary.get(token) != index]
    if wrong or len(vocabulary) != len(model.pieces) + len(expected):
        raise RunError(
            f"transformers does not read back the ids of {wrong[:3] or 'the vocabulary'}; nothing was kept. "
            f"Check {FAST_FILE} and the added tokens of the source"
        )
