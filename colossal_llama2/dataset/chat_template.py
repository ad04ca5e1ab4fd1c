"""The chat template in tokenizer folders: writing it there, and whether transformers makes the same ids with it.

With a fast tokenizer of LLaMA-2's kind (`legacy: false`), `apply_chat_template` gives the ids of `tokenize_sft`, and
with `return_assistant_tokens_mask=True` its mask. Two things it cannot do, whatever the template says. With
`legacy: true`, and with the Prepend normalizer of some tokenizer.json, transformers puts a "▁" in front of the text
behind each mark, so that every message begins with another token: `chat_template_fault` tells. And a mark that a
message spells out, such as the characters "<s>", becomes the mark's id, which in training it never does.
"""

import os
from pathlib import Path
from typing import Optional, Union

from colossal_llama2.dataset import IGNORE_INDEX
from colossal_llama2.dataset.conversation import CHAT_TEMPLATE
from colossal_llama2.dataset.tokenization import read_sft_row, tokenize_sft
from colossal_llama2.files import read_json, write_json
from colossal_llama2.tokenizer import CONFIG_FILE, TEMPLATE_FILES, Encoder, load_tokenizer

# What tokenizers differ in: leading and double spaces, line breaks, bytes, an empty answer, a second round.
_PROBE = [
    {"role": "system", "content": " Be kind.\n"},
    {"role": "user", "content": " What's  new?\n\n你好 "},
    {"role": "assistant", "content": "人工智能 😀 It is a test.\n"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "  Bye!"},
]


def add_chat_template(folder: Union[str, Path]) -> bool:
    """Add `CHAT_TEMPLATE` to the tokenizer of a folder, unless it has a template; returns whether it was added.

    The change appears whole or not at all. Raises UserError if the folder has no readable tokenizer_config.json.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    if config.get("chat_template") or any((folder / name).exists() for name in TEMPLATE_FILES):
        return False
    partial = folder / f".{CONFIG_FILE}.partial"
    try:
        write_json(partial, {**config, "chat_template": CHAT_TEMPLATE})
        os.replace(partial, folder / CONFIG_FILE)
    finally:
        partial.unlink(missing_ok=True)
    return True


def chat_template_fault(folder: Union[str, Path]) -> Optional[str]:
    """None if the tokenizer of a folder gives the ids and the mask of `tokenize_sft` by `CHAT_TEMPLATE`, else why not.

    Found by encoding a conversation both ways, since several settings in several files have a say.
    """
    encoder, tokenizer = Encoder(folder), load_tokenizer(folder)
    if not tokenizer.is_fast:
        return f"{folder} has no fast tokenizer, which alone can tell which tokens are the assistant's"
    (row,) = tokenize_sft([read_sft_row({"messages": _PROBE})], encoder=encoder, max_length=1 << 20)
    applied = tokenizer.apply_chat_template(
        _PROBE, chat_template=CHAT_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    trained = [int(label != IGNORE_INDEX) for label in row.labels]
    if (applied["input_ids"], applied["assistant_masks"]) == (row.input_ids, trained):
        return None
    behind_mark = tokenizer("<s>a", add_special_tokens=False)["input_ids"][1:]
    if behind_mark != encoder.encode(["a"], dummy_prefix=False)[0]:
        return (
            f'the tokenizer of {folder} puts "▁" before the text behind each mark (legacy, or a Prepend normalizer in '
            "tokenizer.json), so by the chat template every message begins with another token than in training; load "
            "it with AutoTokenizer.from_pretrained(..., from_slow=True, legacy=False) and save that tokenizer.json"
        )
    return f"by the chat template the tokenizer of {folder} gives other ids than its tokenizer.model, as in training"
