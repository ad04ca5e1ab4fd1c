"""The loss without logits, against PyTorch's cross-entropy over all of them; in whole runs in test_loss.py."""

import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from colossal_llama2.engine import chunked_loss
from colossal_llama2.engine.chunked_loss import Blocks, HeadPart, chunked_cross_entropy, use_chunked_loss

TOKENS, WIDTH, VOCABULARY = 50, 16, 1003


# Blocks of 128 rows, the last of which is shorter; three of the eight are kept for the backward pass.
MANY_BLOCKS = Blocks(logits=1, min_rows=128, kept=3 * TOKENS * 128)


def inputs(dtype=torch.float32, padding_rows=0):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY + padding_rows, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[::3] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets):
    logits = (hidden @ weight[:VOCABULARY].T).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def error(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("padding_rows", [0, 5])
def test_loss_and_gradients_are_those_of_all_logits(padding_rows):
    hidden, weight, targets = inputs(padding_rows=padding_rows)
    expected = plain(hidden, weight, targets)
    gradients = torch.autograd.grad(expected * 3, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, targets, HeadPart(0, VOCABULARY, blocks=MANY_BLOCKS))
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(expected), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss * 3, (hidden, weight)), gradients, strict=True):
        assert error(ours, theirs) < 1e-6
    assert (gradients[1][VOCABULARY:] == 0).all()


def test_half_precision_is_as_exact_as_with_all_logits():
    exact = [value.double().detach().requires_grad_() for value in inputs(torch.bfloat16)[:2]]
    hidden, weight, targets = inputs(torch.bfloat16)
    expected = torch.autograd.grad(plain(*exact, targets), exact)
    with_logits = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, targets, HeadPart(0, VOCABULARY, blocks=MANY_BLOCKS))
    for ours, theirs, truth in zip(torch.autograd.grad(loss, (hidden, weight)), with_logits, expected, strict=True):
        assert ours.dtype == torch.bfloat16 and error(ours, truth) < 1.2 * error(theirs, truth)


def test_a_frozen_head_and_frozen_layers():
    hidden, weight, targets = inputs()
    loss = plain(hidden, weight, targets)
    for value, other in ((hidden, weight), (weight, hidden)):
        (expected,) = torch.autograd.grad(loss, value, retain_graph=True)
        other.requires_grad_(False)
        (gradient,) = torch.autograd.grad(
            chunked_cross_entropy(hidden, weight, targets, HeadPart(0, VOCABULARY, blocks=MANY_BLOCKS)), value
        )
        other.requires_grad_(True)
        assert error(gradient, expected) < 1e-6


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_computes_its_own_loss(model_dir, masked):
    ids = torch.arange(3, 35).view(2, 16)
    labels = torch.full_like(ids, -100) if masked else torch.where(ids % 4 == 0, -100, ids)
    models = [LlamaForCausalLM.from_pretrained(model_dir) for _ in range(2)]
    use_chunked_loss(models[1], HeadPart(0, models[1].config.vocab_size, blocks=MANY_BLOCKS))
    losses = [model(input_ids=ids, labels=labels, use_cache=False).loss for model in models]
    losses[1].backward()
    if masked:
        # No token is predicted: not the NaN of a mean over nothing, and a gradient for every parameter.
        assert losses[1] == 0 and all((param.grad == 0).all() for param in models[1].parameters())
        return
    losses[0].backward()
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-6)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert error(other.grad, one.grad) < 1e-5


def test_liger_is_for_gpus(monkeypatch):
    assert not chunked_loss.has_liger() and "liger_kernel" not in sys.modules
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for version, fits in (("0.8.5", True), ("0.5.2", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        assert chunked_loss.has_liger() == fits
