"""Where a long text can be cut so that its parts, encoded separately, give the same ids as the whole text.

SentencePiece's BPE makes symbols only by merging neighbours, or by matching a user-defined piece, and every symbol of
two or more characters is a piece. So a symbol can cross the border between two characters only if some piece contains
these two side by side. If no piece of the vocabulary contains the pair, nothing crosses the border in any text, and the
two sides do not depend on each other:

    pieces  a  b  c  ab  bc  ▁  ▁a        the text "abc abc" may be cut before the space, as no piece contains "c▁",
                                          and nowhere else

Without pieces for bytes, a run of unknown characters becomes one <unk>, so one character of the pair must be known.

This holds only if nothing but merges decides. With a normalizer, which may join or drop characters on both sides of a
border, and for other kinds of models, no cut is safe. A text without such a pair, such as a run of equal characters or
a DNA sequence, cannot be cut either.
"""

from collections.abc import Iterator, Sequence

SPACE = "▁"
# In no piece and in no text that can be encoded: half of a surrogate pair.
BETWEEN_PIECES = "\ud800"
# A part has half to all of this length where the text can be cut, and more where it cannot.
PART_CHARACTERS = 1 << 16


class TextCuts:
    """Cuts a text where `_is_safe` allows it. `can_cut` is False if it never does."""

    can_cut: bool

    def parts_of(self, text: str, size: int = PART_CHARACTERS) -> Iterator[str]:
        """The text in parts of at most `size` characters where it can be cut; joined, they are the text."""
        start = 0
        while self.can_cut and len(text) - start > size:
            stop = self._last_cut(text, start + size // 2, start + size) or self._next_cut(text, start + size)
            if stop is None:
                break
            yield text[start:stop]
            start = stop
        yield text[start:]

    def _last_cut(self, text: str, lowest: int, highest: int) -> int | None:
        places = range(highest, lowest, -1)
        return next((place for place in places if self._is_safe(text[place - 1], text[place])), None)

    def _next_cut(self, text: str, lowest: int) -> int | None:
        places = range(lowest + 1, len(text))
        return next((place for place in places if self._is_safe(text[place - 1], text[place])), None)

    def _is_safe(self, before: str, after: str) -> bool:
        """Whether a text can be cut between two characters."""
        raise NotImplementedError


class SafeCuts(TextCuts):
    """The safe cuts of one SentencePiece model. `can_cut` is False if there are none."""

    def __init__(self, content: bytes, pieces: Sequence[str]):
        """
        Args:
            content: the serialized tokenizer.model.
            pieces: all its pieces, by id.
        """
        from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

        model = ModelProto.FromString(content)
        kind, trainer, normalizer = model.SentencePiece, model.trainer_spec, model.normalizer_spec
        self.can_cut = (
            trainer.model_type == TrainerSpec.BPE
            and not trainer.treat_whitespace_as_suffix
            and normalizer.escape_whitespaces
            and not (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces)
        )
        self._pieces = ""
        self._is_joined: dict[str, bool] = {}
        self._known: set[str] | None = None
        if not self.can_cut:
            return
        # All kinds of pieces: pairs that merges cannot make only forbid a few more cuts. Few pairs are ever looked up;
        # a set of all of them would take each worker an eighth of a second.
        self._pieces = BETWEEN_PIECES.join(pieces).replace(" ", SPACE)
        if not any(entry.type == kind.BYTE for entry in model.pieces):
            known = (kind.NORMAL, kind.USER_DEFINED)
            types = (entry.type for entry in model.pieces)
            named = zip(pieces, types, strict=True)
            self._known = {piece for piece, type_ in named if type_ in known and len(piece) == 1}

    def _is_safe(self, before: str, after: str) -> bool:
        before, after = (SPACE if character == " " else character for character in (before, after))
        if self._known is not None and before not in self._known and after not in self._known:
            return False
        pair = before + after
        if pair not in self._is_joined:
            self._is_joined[pair] = pair in self._pieces
        return not self._is_joined[pair]
