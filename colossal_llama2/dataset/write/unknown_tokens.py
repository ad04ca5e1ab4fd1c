"""Text that the tokenizer has no tokens for: how many <unk> the samples hold, and a warning that says what to do.

A tokenizer without a piece for each byte puts <unk> in place of every character that it lacks. As a label, it teaches
the model to write <unk>.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.dataset.layout.token_ledger import Account, Tally

# Names of notes in the account.
TOKENS = "tokens of samples that are <unk>"
LABELS = "labels that are <unk>"


def note_unknown(account: Account, coded: np.ndarray, unknown_id: int) -> None:
    """Count <unk> in tokens of which those without loss are ~id."""
    labels = int(np.count_nonzero(coded == unknown_id))
    tokens = labels + int(np.count_nonzero(coded == ~unknown_id))
    if tokens:
        account.note(TOKENS, tokens)
    if labels:
        account.note(LABELS, labels)


def warn_of_unknown(manifest: Mapping[str, Any], *, tokenizer: str) -> None:
    """Log which part of the labels in the samples is <unk>, if any is."""
    unknown, unknown_labels = (manifest["notes"].get(name, 0) for name in (TOKENS, LABELS))
    if not unknown:
        return
    total = Tally.from_json(manifest["total"])
    logs.get_logger().warning(
        f"{unknown_labels:,} of {total.trained:,} labels ({unknown_labels / total.trained:.2%}) and {unknown:,} of "
        f"{total.kept:,} tokens are <unk>: the tokenizer of {tokenizer} lacks characters of this text, and the model "
        "learns to write <unk> in their place. Give a tokenizer with pieces for bytes (byte_fallback), such as "
        "LLaMA-2's, or add the characters as pieces by init_tokenizer.py"
    )
