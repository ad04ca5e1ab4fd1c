"""Teach a LLaMA-2 model a new language or domain.

Folders, each of which imports only folders above it in this list:

    errors.py, logs.py, launcher.py, ...   how a command ends, what it prints, and which rank it is
    storage/      files that appear complete or not at all, and bounded reading of what a user gives
    cli/          the flags of every command
    charts/       the style of all pictures
    encoding/     text to token ids and back; the files of a tokenizer
    corpus/       jsonl and the other input formats, to documents and conversations
    model/        a model's folder, weights, embeddings, attention; initialize new embedding rows
    dataset/      documents to token ids to spliced samples in bins; batches out of bins
    tokenizer/    extend a SentencePiece vocabulary, and compare tokenizers
    engine/       everything that touches ColossalAI
    train/        the loop, checkpoints, evaluation, reports, forecasts
    inference/    generate text with a trained model

Importing this package imports only interrupts.py, which acts only in our own commands.
"""

from colossal_llama2 import interrupts

__version__ = "0.1.0"

interrupts.watch_start()
