"""Teach a LLaMA-2 model a new language or domain.

    arguments.py     every command's flags, each defined once
    errors.py        mistakes a user can make, told in one line
    files.py         JSON files, and folders that appear whole or not at all
    logs.py          log lines and progress bars, from rank 0 only
    tokenizer/       extend a SentencePiece vocabulary, load and encode with it
    model/           initialize new embedding rows; freezing, NEFTune, attention
    dataset/         jsonl to token ids to spliced samples in bins; batches out of bins
    train/           the loop, checkpoints, and train/engine/: all that touches ColossalAI
    inference/       generate text with a trained model

Importing this package imports nothing else of it but interrupts.py, which acts in our own commands alone.
"""

from colossal_llama2 import interrupts

__version__ = "0.1.0"

interrupts.watch_start()
