"""Count text that the tokenizer has no tokens for (<unk>), and warn about it.

A tokenizer without a piece for each byte replaces every character that it lacks by <unk>. As a label, <unk> teaches the
model to write <unk>.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.dataset.layout.token_ledger import Tally, TokenLedger

# Names of notes in the token ledger.
TOKENS = "tokens of samples that are <unk>"
LABELS = "labels that are <unk>"


def count_unknown(ledger: TokenLedger, coded: np.ndarray, unknown_id: int) -> None:
    """Count <unk> in (tokens,) ids; tokens without loss are ~id. A negative `unknown_id` is no token."""
    if unknown_id < 0:
        return
    labels = int(np.count_nonzero(coded == unknown_id))
    tokens = labels + int(np.count_nonzero(coded == ~unknown_id))
    if tokens:
        ledger.count_note(TOKENS, tokens)
    if labels:
        ledger.count_note(LABELS, labels)


def warn_of_unknown(manifest: Mapping[str, Any], *, tokenizer: str) -> None:
    """Warn about the share of <unk> among the labels in the samples, if there is any."""
    unknown, unknown_labels = (manifest["notes"].get(name, 0) for name in (TOKENS, LABELS))
    if not unknown:
        return
    total = Tally.from_json(manifest["total"])
    logs.get_logger().warning(
        f"{unknown_labels:,} of {total.trained:,} labels ({unknown_labels / total.trained:.2%}) and {unknown:,} of "
        f"{total.kept:,} tokens are <unk>: the tokenizer of {tokenizer} lacks characters of this text, and the model "
        "learns to write <unk> instead. Give a tokenizer with pieces for bytes (byte_fallback), such as "
        "LLaMA-2's, or add the characters as pieces with init_tokenizer.py"
    )
