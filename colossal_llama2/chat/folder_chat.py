"""The chat template of a model's or tokenizer's folder, with its tokenizer."""

from pathlib import Path

from colossal_llama2.chat.chat_tokens import ChatTokenizer
from colossal_llama2.chat.templates import MODEL, ChatTemplate, template_of_folder
from colossal_llama2.corpus.conversation import chat_template
from colossal_llama2.encoding.registry import puts_prefix_after_marks, shared_encoder


def chat_of_folder(folder: str | Path) -> ChatTokenizer | None:
    """What a model is asked with; None if its folder has no chat template.

    Raises:
        UserError: a file is damaged, or the tokenizer is of a kind that only transformers reads.
    """
    found = template_of_folder(folder)
    if found is None:
        return None
    template = ChatTemplate(MODEL, *found)
    encoder = shared_encoder(str(folder))
    return ChatTokenizer(template, encoder, folder, prefix_after_marks=puts_prefix_after_marks(folder))


def colossal_template_of(folder: str | Path) -> str:
    """The template `colossal` for a tokenizer's folder, with the default roles."""
    encoder = shared_encoder(str(folder))
    return chat_template(
        has_dummy_prefix=encoder.has_dummy_prefix,
        has_bos=encoder.bos_id >= 0,
        prefix_after_marks=puts_prefix_after_marks(folder),
    )
