"""The reference for training: a plain single-process PyTorch loop, without any of the suite's training code.

Only the order of samples comes from the suite (`SampleOrder`, which has its own tests), as if there were one rank.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import LlamaForCausalLM

from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prepared_data import load_tokenized_dataset


@dataclass
class Trace:
    """Loss and gradient norm of every step, and the weights after the last."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def learning_rate(step: int, total: int, peak: float) -> float:
    """Warm-up of 2.5 % of the steps, then a cosine to a tenth."""
    warmup = int(0.025 * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.1 * peak + 0.9 * peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def cross_entropy_sum(model, samples) -> torch.Tensor:
    """Sum of the loss over all predicted tokens, one unpadded sample at a time, in float32."""
    total = torch.zeros(())
    for ids, labels in samples:
        logits = model(torch.from_numpy(ids)[None]).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)[1:], reduction="sum")
    return total


def padded_cross_entropy_sum(model, samples) -> torch.Tensor:
    """The same as one batch, padded on the right with token 0, which no token before it attends to."""
    width = max(len(ids) for ids, _ in samples)
    inputs = torch.zeros(len(samples), width, dtype=torch.int64)
    targets = torch.full((len(samples), width), -100)
    for row, (ids, labels) in enumerate(samples):
        inputs[row, : len(ids)] = torch.from_numpy(ids)
        targets[row, : len(labels)] = torch.from_numpy(labels)
    logits = model(inputs).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum")


def loss_terms(model, samples, *, predicted: int, micro_batches: int) -> Iterator[torch.Tensor]:
    """Yield the parts of the mean loss over `predicted` tokens: one of unpadded samples if `micro_batches` is 0."""
    if not micro_batches:
        yield cross_entropy_sum(model, samples) / predicted
        return
    size = -(-len(samples) // micro_batches)
    for start in range(0, len(samples), size):
        yield padded_cross_entropy_sum(model, samples[start : start + size]) / predicted


def halve_matrices(model) -> None:
    """Let each layer and the head sum rounded halves, as two tensor-parallel ranks do, to show the effect on bf16."""
    linear = torch.nn.functional.linear

    def by_rows(module):
        return lambda x: _with_bias(torch.cat([linear(x, part) for part in module.weight.chunk(2)], -1), module)

    def by_columns(module):
        return lambda x: _with_bias(sum(map(linear, x.chunk(2, -1), module.weight.chunk(2, 1))), module)

    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")):
            module.forward = by_rows(module)
        elif name.endswith(("o_proj", "down_proj")):
            module.forward = by_columns(module)


def _with_bias(output: torch.Tensor, module) -> torch.Tensor:
    return output if module.bias is None else output + module.bias


def with_adapter(model, rank: int, seed: int, *, trains_embeddings: bool):
    """The model with a new adapter of PEFT, which alone is trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, param in adapted.named_parameters():
        if trains_embeddings and ("embed_tokens" in name or "lm_head" in name):
            param.requires_grad_(True)
    return adapted


def unspliced(samples, document_lengths):
    """Each document of each sample, as a separate sample."""
    for (ids, labels), lengths in zip(samples, document_lengths, strict=True):
        yield from zip(*(np.split(row, np.cumsum(lengths)[:-1]) for row in (ids, labels)), strict=True)


def train(
    model_dir,
    parts,
    *,
    precision: str,
    global_batch: int,
    lr: float,
    clip: float,
    decay: float = 0.1,
    freeze: bool = False,
    seed: int = 1024,
    micro_batches: int = 0,
    unsplice: bool = False,
    halved: bool = False,
    trained_rows: Sequence[tuple[int, int]] = (),
    attention: str = "eager",
    lora_rank: int | None = None,
    trains_embeddings: bool = False,
) -> Trace:
    """One epoch of AdamW with float32 master weights, in the given precision.

    Args:
        micro_batches: padded batches in which a step's gradient is summed up; 0 for sample by sample without padding.
        halved: see `halve_matrices`.
        trained_rows: with `freeze`, [begin, end) ranges of the rows whose gradients are not cleared.
        lora_rank: train an adapter of PEFT with alpha twice its rank, on all matrices of the layers; with
            `trains_embeddings` the embeddings too.
        attention: eager, which rounds the scores to the given precision, or sdpa, which does not.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = LlamaForCausalLM.from_pretrained(model_dir, torch_dtype=dtype, attn_implementation=attention)
    if halved:
        halve_matrices(model)
    if lora_rank is not None:
        model = with_adapter(model, lora_rank, seed, trains_embeddings=trains_embeddings)
    if freeze:
        for name, param in model.named_parameters():
            param.requires_grad_("embed_tokens" in name or "lm_head" in name)
    working = [param for param in model.parameters() if param.requires_grad]
    masters = [param.detach().clone().float().requires_grad_() for param in working]
    groups = [
        {"params": [master for master in masters if master.dim() > 1], "weight_decay": decay},
        {"params": [master for master in masters if master.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.95), eps=1e-8)
    rows = load_tokenized_dataset(parts, "on" if unsplice else "off")
    order = SampleOrder(
        num_samples=len(rows), micro_batch_size=global_batch, data_size=1, accumulation_steps=1, seed=seed
    )
    trace = Trace()
    total_steps = order.steps_after(0)
    for step, (indices, _) in enumerate(order.steps(0, 0, 0)):
        table = rows[indices[0]]
        samples = [
            (np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64))
            for ids, labels in zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True)
        ]
        if unsplice:
            samples = list(unspliced(samples, table["sequence_lengths"].to_pylist()))
        predicted = sum(int((labels[1:] != -100).sum()) for _, labels in samples)
        model.zero_grad()
        loss = 0.0
        for term in loss_terms(model, samples, predicted=predicted, micro_batches=micro_batches):
            term.backward()
            loss += term.item()
        for master, param in zip(masters, working, strict=True):
            master.grad = param.grad.float()
            if trained_rows:
                frozen = torch.ones(len(master), dtype=torch.bool)
                for begin, end in trained_rows:
                    frozen[begin:end] = False
                master.grad[frozen] = 0.0
        norm = torch.nn.utils.clip_grad_norm_(masters, clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps, lr)
        optimizer.step()
        with torch.no_grad():
            for master, param in zip(masters, working, strict=True):
                param.copy_(master)
        trace.losses.append(loss)
        trace.grad_norms.append(norm.item())
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad or lora_rank is None}
    trace.weights = {name.replace(".default", ""): param.detach().float() for name, param in trained.items()}
    return trace
