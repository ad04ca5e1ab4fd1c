"""Bits per byte computed from token ids with SentencePiece and transformers, without this package's code.

python -m tests.bits_per_byte EVAL_FOLDER MODEL_FOLDER [on|off]    the figure of a prepared folder under a model
"""

import math
import re
import sys

import datasets
import sentencepiece
import torch
from transformers import AutoModelForCausalLM

BYTE = re.compile("<0x([0-9A-F]{2})>")


def load_processor(model_file) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromFile(str(model_file))
    return processor


def spelt(processor, ids: list[int]) -> list[bytes]:
    """The bytes that each token spells, without the leading space of a text that follows <s>."""
    found = []
    for place, token in enumerate(ids):
        piece = processor.id_to_piece(token)
        if processor.is_control(token):
            found.append(b"")
        elif BYTE.fullmatch(piece):
            found.append(bytes.fromhex(BYTE.fullmatch(piece)[1]))
        else:
            text = piece.replace("▁", " ").encode()
            found.append(text[1:] if place and ids[place - 1] == processor.bos_id() else text)
    return found


def pieces_of(sample: dict) -> list[tuple[int, int]]:
    """Where each piece of a document in a sample begins and ends."""
    bounds, start = [], 0
    for length in sample["sequence_lengths"]:
        bounds.append((start, start + length))
        start += length
    return bounds


def predicted_bytes(processor, sample: dict) -> list[int]:
    """The bytes of the predicted tokens of each piece of a sample."""
    found = []
    for start, stop in pieces_of(sample):
        texts = spelt(processor, sample["input_ids"][start:stop])
        labels = sample["labels"][start:stop]
        found.append(sum(len(text) for text, label in zip(texts[1:], labels[1:], strict=True) if label != -100))
    return found


@torch.no_grad()
def summed_nats(model, sample: dict, *, apart: bool) -> tuple[float, int]:
    """The loss of a sample's predicted tokens, and their number; pieces attend to each other unless `apart`."""
    ids, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
    for start, _ in pieces_of(sample):
        labels[start] = -100
    bounds = pieces_of(sample) if apart else [(0, len(ids))]
    nats = 0.0
    for start, stop in bounds:
        logits = model(ids[None, start:stop]).logits[0, :-1].double()
        chosen = labels[start + 1 : stop]
        losses = torch.logsumexp(logits, 1) - logits.gather(1, chosen.clamp(min=0)[:, None])[:, 0]
        nats += float(losses[chosen != -100].sum())
    return nats, int((labels != -100).sum())


def figure(eval_folder, model, processor, *, apart: bool = True) -> float:
    """Bits per byte of a prepared folder."""
    samples = datasets.load_from_disk(str(eval_folder)).to_list()
    nats = sum(summed_nats(model, sample, apart=apart)[0] for sample in samples)
    return nats / math.log(2) / sum(sum(predicted_bytes(processor, sample)) for sample in samples)


if __name__ == "__main__":
    folder, model_dir, mask = [*sys.argv[1:], "on"][:3]
    loaded = AutoModelForCausalLM.from_pretrained(model_dir)
    print(figure(folder, loaded, load_processor(f"{model_dir}/tokenizer.model"), apart=mask == "on"))
