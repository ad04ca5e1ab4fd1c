"""The original's place of `load_tokenized_dataset`, for programs that import it from here."""

from colossal_llama2.dataset.read.prepared_data import load_tokenized_dataset

__all__ = ["load_tokenized_dataset"]
