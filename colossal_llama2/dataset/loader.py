"""`load_tokenized_dataset` under the import path of the original project."""

from colossal_llama2.dataset.read.prepared_data import load_tokenized_dataset

__all__ = ["load_tokenized_dataset"]
