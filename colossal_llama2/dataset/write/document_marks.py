"""Log what is unusual about how documents and conversations are marked with a tokenizer's tokens."""

from pathlib import Path

from colossal_llama2 import logs
from colossal_llama2.encoding.byte_level_encoder import ByteLevelEncoder
from colossal_llama2.encoding.byte_level_file import ByteLevelModel
from colossal_llama2.encoding.encoder import Encoder
from colossal_llama2.encoding.folder_files import has_other_chat_template

# What ends a turn in chats of these models (ChatML and SmolLM2, LLaMA-3, Phi-3), and what ended the documents of their
# pre-training.
DOCUMENT_ENDS = {"<|im_end|>": "<|endoftext|>", "<|eot_id|>": "<|end_of_text|>", "<|end|>": "<|endoftext|>"}
# Chats begin a turn with it. LLaMA-3's begin with the token that begins documents too.
CHAT_BEGINNING = "<|im_start|>"


def log_marks(encoder: Encoder, tokenizer_dir: str | Path, *, chat_template: str | None) -> None:
    """Log a missing bos_token, one that is the eos_token too, and what a chat model's folder has for its chats.

    Args:
        chat_template: in fine-tuning, the template of the conversations that are prepared; None in pre-training.
    """
    if encoder.bos_id < 0:
        logs.get_logger().info(
            f"the tokenizer of {tokenizer_dir} has no bos_token: documents begin without a mark, and "
            f"{encoder.eos_text} precedes the messages of a conversation"
        )
    elif encoder.bos_id == encoder.eos_id:
        logs.get_logger().info(
            f"the tokenizer of {tokenizer_dir} has one token, {encoder.eos_text}, for bos_token and eos_token: it "
            "marks the beginning and the end of documents"
        )
    if chat_template is None:
        if isinstance(encoder, ByteLevelEncoder) and encoder.eos_text in DOCUMENT_ENDS:
            _warn_of_chat_marks(encoder, tokenizer_dir)
    elif has_other_chat_template(tokenizer_dir, chat_template):
        before = encoder.bos_text if encoder.bos_id >= 0 else encoder.eos_text
        logs.get_logger().info(
            f"the tokenizer of {tokenizer_dir} has a chat template, which is not used: conversations are written as "
            f"Human: {before}...{encoder.eos_text}Assistant: {before}...{encoder.eos_text}, and train_sft.py replaces "
            "the template in the models that it saves; --chat_template model keeps it"
        )


def _warn_of_chat_marks(encoder: ByteLevelEncoder, tokenizer_dir: str | Path) -> None:
    """A chat model gives a turn's end after plain text a probability of almost 0: each document costs many nats."""
    end = DOCUMENT_ENDS[encoder.eos_text]
    if end not in ByteLevelModel.read(tokenizer_dir).added:
        return
    begins_as_chat = encoder.bos_text == CHAT_BEGINNING
    names = f"{encoder.bos_text} and {encoder.eos_text} mark" if begins_as_chat else f"{encoder.eos_text} marks"
    flags = f"--bos_token '{end}' --eos_token '{end}'" if begins_as_chat else f"--eos_token '{end}'"
    logs.get_logger().warning(
        f"{names} the turns of a chat, and here the documents too, since {tokenizer_dir} names "
        f"{'them as bos_token and eos_token' if begins_as_chat else 'it as eos_token'}. The model was probably "
        f"pre-trained on documents that end with {end}; extend its tokenizer with init_tokenizer.py {flags}, or change "
        f"the {'entries' if begins_as_chat else 'entry'} in a copy of tokenizer_config.json"
    )
