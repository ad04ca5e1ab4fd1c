"""Another kind of tokenizer needs one class and one line in the registry; here one with an id for each byte."""

import hashlib
from pathlib import Path

import datasets
import numpy as np
import pytest

from colossal_llama2.dataset.inspect_data import InspectSettings, inspect_part
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.layout.manifest import check_parts_fit
from colossal_llama2.dataset.write.prepare import prepare_pretrain, prepare_sft
from colossal_llama2.encoding import registry
from colossal_llama2.errors import UserError
from tests.preparing import manifest, settings, write_lines

MARKS_FILE = "marks.txt"


class ByteEncoder:
    """The ids of a text are its UTF-8 bytes; 256 and 257 are the marks, spelled as in marks.txt."""

    name = "bytes"
    bos_id, eos_id, unk_id, vocab_size = 256, 257, -1, 258
    files = (MARKS_FILE,)
    has_dummy_prefix = False
    other_texts = "none"

    def __init__(self, tokenizer_dir, part_characters=1 << 16):
        self._content = Path(tokenizer_dir, MARKS_FILE).read_bytes()
        self.bos_text, self.eos_text = self._content.decode().split()
        self._part_characters = part_characters

    @classmethod
    def is_in(cls, folder) -> bool:
        return Path(folder, MARKS_FILE).is_file()

    @classmethod
    def fingerprint_of(cls, folder) -> str:
        return cls(folder).fingerprint

    @classmethod
    def puts_prefix_after_marks(cls, folder) -> bool:
        return False

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._content).hexdigest()

    def is_long(self, text: str) -> bool:
        return len(text) > self._part_characters

    def problem_of(self, text: str) -> str | None:
        return None

    def encode(self, texts, *, dummy_prefix=True):
        return [list(text.encode()) for text in texts]

    def encode_long(self, text, *, dummy_prefix=True):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids, *, dummy_prefix=True) -> str:
        return bytes(ids).decode(errors="replace")

    def bytes_of_tokens(self, text, ids, *, dummy_prefix=True):
        return np.ones(len(ids), np.int32)


@pytest.fixture
def byte_dir(tmp_path, monkeypatch) -> Path:
    """A folder of the other kind, which is registered."""
    monkeypatch.setattr(registry, "KINDS", (registry.Kind(ByteEncoder, lambda folder: ByteEncoder), *registry.KINDS))
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / MARKS_FILE).write_text("[BOS] [EOS]")
    return tmp_path / "bytes"


def test_pretraining_data(byte_dir, tokenizer_dir, tmp_path):
    rows = [{"target": "Hi there"}, {"source": "Say: ", "target": "é" * 40}]
    write_lines(tmp_path / "in" / "rows.jsonl", rows)
    prepare_pretrain(**settings([tmp_path / "in"], byte_dir, tmp_path, max_length=50))
    assert manifest(tmp_path)["tokenizer"]["sha256"] == ByteEncoder(byte_dir).fingerprint
    part = tmp_path / "arrow" / "part-00000"
    samples = datasets.load_from_disk(str(part))
    ids = [token for sample in samples for token in sample["input_ids"]]
    assert sorted(ids) == sorted([256, *b"Hi there", 257, 256, *b"Say: ", *("é" * 40).encode(), 257])
    # 8 bytes of the complete document; of the cut one all but the byte that begins its second piece.
    assert sum(size for sample in samples for size in sample["document_target_bytes"]) == 8 + 80 - 1
    check_parts_fit([str(part)], stage="pretrain", tokenizer_dir=str(byte_dir))
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        check_parts_fit([str(part)], stage="pretrain", tokenizer_dir=str(tokenizer_dir))
    shown = "\n".join(inspect_part(InspectSettings(str(part), str(byte_dir), 9, 0, None), is_coloured=False))
    assert "[BOS]Hi there[EOS]" in shown and "<s>" not in shown


def test_conversations(byte_dir, tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<s> is text"}]
    write_lines(tmp_path / "in" / "rows.jsonl", [{"messages": messages, "system": "Be kind."}])
    prepare_sft(**settings([tmp_path / "in"], byte_dir, tmp_path))
    (sample,) = datasets.load_from_disk(str(tmp_path / "arrow" / "part-00000"))
    answer = [*b"<s> is text", 257]
    human, assistant = b"Be kind.\n\nHuman: ", b"Assistant: "
    assert sample["input_ids"] == [256, *human, 256, *b"Hi", 257, *assistant, 256, *answer]
    assert [label for label in sample["labels"] if label != IGNORE_INDEX] == answer
    assert sample["inputs_decode"] == "[BOS]Be kind.\n\nHuman: [BOS]Hi[EOS]Assistant: [BOS]<s> is text[EOS]"


def test_a_folder_without_any_kind_is_reported_with_the_files_of_both(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer.model .* and no tokenizer.json"):
        registry.load_encoder(tmp_path)
