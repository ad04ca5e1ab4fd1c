"""Load a tokenizer's folder with transformers or tokenizers, which read tokenizer.json and the settings beside it."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.encoding.folder_files import check_tokenizer_files, loader_of, loading_arguments
from colossal_llama2.encoding.library_panics import panics_as_errors
from colossal_llama2.errors import UserError
from colossal_llama2.storage.unpickling_guard import unpickling_refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PADDING_SIDE = "right"
PAD_TOKENS = ("unk", "eos")


def load_tokenizer(path: str | Path, *, pad_token: str = "unk") -> "PreTrainedTokenizerBase":
    """The transformers tokenizer of a local folder or a Hugging Face name. It pads on the right.

    A folder is read from disk only, and code that comes with a tokenizer is never run.

    Args:
        pad_token: the token that pads, "unk" or "eos". A tokenizer without <unk>, such as LLaMA-3's, pads with its own
            pad token, or with its eos token. What pads is masked, and has no loss.

    Raises:
        UserError: there is no tokenizer, or it lacks a token that could pad.
    """
    if pad_token not in PAD_TOKENS:
        raise ValueError(f"pad_token is {pad_token!r}; allowed are {PAD_TOKENS}")
    from transformers import AutoTokenizer

    is_folder = Path(path).is_dir()
    # A Hugging Face name is NAME or OWNER/NAME; anything else must be a folder.
    if not is_folder and (Path(path).exists() or Path(path).is_absolute() or len(Path(path).parts) > 2):
        raise UserError(f"{path} is not a folder; give the folder of a tokenizer")
    if is_folder:
        check_tokenizer_files(path)
    try:
        with unpickling_refused(offline=is_folder), panics_as_errors():
            loader = loader_of(path) if is_folder else AutoTokenizer
            tokenizer = loader.from_pretrained(
                path,
                local_files_only=is_folder,
                trust_remote_code=False,
                padding_side=PADDING_SIDE,
                **(loading_arguments(path) if is_folder else {}),
            )
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot parse
        kind = "the folder" if is_folder else "the Hugging Face name (no such folder exists)"
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise UserError(
            f"no tokenizer can be loaded from {kind} {path} ({reason}); give a folder with tokenizer_config.json, and "
            "tokenizer.model or tokenizer.json of a byte-level BPE"
        )
    names = ("unk", "pad", "eos") if pad_token == "unk" else ("eos",)
    pad = next(filter(None, (getattr(tokenizer, f"{name}_token") for name in names)), None)
    if pad is None:
        raise UserError(
            f"the tokenizer of {path} has no {' and no '.join(names)} token to pad with; give a tokenizer with one"
        )
    tokenizer.pad_token = pad
    return tokenizer


def load_fast(path: str | Path) -> "Tokenizer":
    """The `tokenizers.Tokenizer` of a tokenizer.json. Raises UserError if it is damaged."""
    from tokenizers import Tokenizer

    try:
        with panics_as_errors():
            return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path} cannot be read ({error}); copy it again from the original tokenizer")
