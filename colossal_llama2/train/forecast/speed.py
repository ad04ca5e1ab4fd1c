"""Forecast of the time of a step on GPUs: computed from sizes, settings and data sheets, and calibrated on one run.

A step computes its FLOPs at EFFICIENCY of the peak, waits where a pipeline fills and drains, and communicates. Nothing
is assumed to overlap, so communication is overstated for ddp, zero2 and gemini, which send while they compute.

EFFICIENCY is that of the original's own run: 8.5 B tokens in 15 hours on 64 A800, with zero2, 8 samples of 4,096 tokens
on each GPU and recomputation (its README and train.example.sh). That is 37 % MFU, and with recomputation and
communication 0.50 of the peak while a GPU computes. tests/scaling_page.py compares with other published runs.

Traffic is counted in bytes that a rank sends. An all-gather or a reduce-scatter of n bytes over d ranks sends
(d - 1) / d of them, an all-reduce twice that ("Bandwidth optimal all-reduce algorithms", Patarasu and Yuan 2009).
"""

from dataclasses import dataclass, replace

from colossal_llama2.gpus import GPUS_PER_HOST, Gpu
from colossal_llama2.train.forecast.activations import ModelShape, StageShape
from colossal_llama2.train.forecast.memory import Plan, stage_shapes, trained_weights

EFFICIENCY = 0.50
# Share of a link's speed that collectives reach: NCCL's bus bandwidth over the data sheet's.
LINK_SHARE = 0.7
# Bytes a second between a GPU and its host (PCIe 4 x16), and parameters a second that a host's Adam updates for each of
# its GPUs, where 8 of them share about 200 GB/s of memory and each parameter moves about 30 bytes.
HOST_COPY, HOST_ADAM = 20e9, 0.8e9
AXES = ("data", "tensor", "sequence", "pipeline")


@dataclass(frozen=True)
class StepForecast:
    """One optimizer step of a rank.

    Attributes:
        compute: seconds of computation, recomputed activations included.
        waiting: seconds in which a pipeline fills and drains, and stages wait for the slowest.
        sent: bytes by axis; communication: seconds by axis.
        offload: seconds for moving gradients and weights, and for updating, in the host's memory.
        mfu: share of the GPU's peak that the model's FLOPs reach, recomputation not counted.
    """

    compute: float
    waiting: float
    sent: dict[str, float]
    communication: dict[str, float]
    offload: float
    mfu: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.waiting + sum(self.communication.values()) + self.offload


def token_flops(shape: ModelShape, length: int, *, trains_weights: bool = True) -> float:
    """FLOPs of a token as `engine.device.flops_per_token` counts them, for a shape instead of a model."""
    layers, head = shape.layers * _layer_elements(shape), shape.vocab_size * shape.hidden_size
    attention = 12.0 * shape.layers * shape.hidden_size * length
    # The last norm is among the weights there.
    return (6.0 if trains_weights else 4.0) * (layers + shape.hidden_size + head) + attention


def step_forecast(shape: ModelShape, plan: Plan, gpu: Gpu, *, step_tokens: int) -> StepForecast:
    """The time of a step of `step_tokens` tokens over all ranks."""
    settings, stages = plan.settings, stage_shapes(shape, plan.settings)
    trains_weights = settings.trainable.adapter is None
    model_flops = token_flops(shape, plan.max_length, trains_weights=trains_weights)
    forward = shape.layers * (2.0 * _layer_elements(shape) + 4.0 * shape.hidden_size * plan.max_length)
    flops = model_flops + (forward if plan.checkpointing else 0)
    speed = EFFICIENCY * gpu.relative_speed * gpu.peak_tflops * 1e12
    compute = step_tokens * flops / plan.ranks / speed
    parts = _parts(plan, step_tokens)
    # 1F1B: (stages - 1) of the parts are waited for (Narayanan et al., arXiv 2104.04473, section 2.2).
    slowest = _imbalance(shape, stages, plan.max_length)
    waiting = compute * (slowest * (1 + (settings.pp_size - 1) / parts) - 1)
    # Most stages of a pipeline are alike.
    of_stages = [_sent(stage, plan, parts) for stage in dict.fromkeys(stages)]
    sent = {axis: max(sizes[axis] for sizes in of_stages) for axis in AXES}
    communication = {axis: size / _bandwidth(axis, plan, gpu) for axis, size in sent.items()}
    seconds = compute + waiting + sum(communication.values()) + (offload := _offload_seconds(stages, plan))
    mfu = step_tokens * model_flops / plan.ranks / (gpu.peak_tflops * 1e12) / seconds
    return StepForecast(compute, waiting, sent, communication, offload, mfu)


def _layer_elements(shape: ModelShape) -> int:
    stage = StageShape(shape, layers=1, splits=1, has_embeddings=False, has_head=False)
    return sum(size for _, size in stage.layer_weights())


def _parts(plan: Plan, step_tokens: int) -> int:
    """Micro batches of a step on each data-parallel rank."""
    return max(round(step_tokens / plan.max_length / plan.data_ranks / plan.micro_batch().samples), 1)


def _imbalance(shape: ModelShape, stages: list[StageShape], length: int) -> float:
    """FLOPs of the stage with the most over the mean: the last one has the head, and layers may not divide evenly."""
    layer = 6.0 * _layer_elements(shape) + 12.0 * shape.hidden_size * length
    head = 6.0 * shape.vocab_size * shape.hidden_size
    flops = [stage.layers * layer + stage.has_head * head for stage in stages]
    return max(flops) / (sum(flops) / len(flops))


def _sent(stage: StageShape, plan: Plan, parts: int) -> dict[str, float]:
    """Bytes that a rank of a stage sends in a step, by axis."""
    settings, batch = plan.settings, plan.micro_batch()
    tp, hidden = settings.tp_size, stage.model.hidden_size * plan.element
    matrix = batch.tokens * hidden
    passes = 3 if plan.checkpointing else 2
    # An all-reduce after attention and one after the MLP, in each pass; with --sp_mode split_gather and ring, a gather
    # before and a scatter after, which is as much. One for the embeddings, one for the head.
    reductions = 2 * passes * stage.layers + stage.has_embeddings + stage.has_head
    tensor = parts * reductions * 2 * matrix * (tp - 1) / tp
    # Queries, keys, values and the result change from whole heads to whole samples and back.
    exchanged = batch.tokens * 2 * (stage.query_width + stage.key_width) * plan.element
    sp = settings.sp_size if settings.sp_mode == "all_to_all" else 1
    sequence = parts * passes * stage.layers * exchanged * (sp - 1) / sp
    # Forward to the next stage, backward to the one before.
    is_split = settings.sp_mode in ("split_gather", "ring")
    pipeline = parts * 2 * matrix / (tp if is_split else 1) if settings.pp_size > 1 else 0.0
    return {"data": _data_bytes(stage, plan, parts), "tensor": tensor, "sequence": sequence, "pipeline": pipeline}


def _data_bytes(stage: StageShape, plan: Plan, parts: int) -> float:
    """Bytes of gradients and weights that a rank exchanges with those that hold the same part of the model."""
    trained = plan.element * _trained_elements(stage, plan)
    # zero/low_level/low_level_optim.py:362,382,624: stage 1 all-reduces gradients once, stage 2 scatters those of each
    # micro batch, and both gather weights. Gemini gathers weights for forward and for backward of each micro batch.
    times = {0: 2, 1: 3, 2: parts + 1, 3: 3 * parts}[plan.plugin.zero_stage]
    return times * trained * (plan.shards - 1) / plan.shards


def _trained_elements(stage: StageShape, plan: Plan) -> int:
    """The sum of `trained_weights`, in a time that does not depend on the number of layers."""
    none, one = (
        sum(size for _, size in trained_weights(replace(stage, layers=layers), plan.settings)) for layers in (0, 1)
    )
    return none + stage.layers * (one - none)


def _bandwidth(axis: str, plan: Plan, gpu: Gpu) -> float:
    """Bytes a second of a rank in the groups of an axis.

    Ranks are numbered along sequences first, then tensors, stages and data (hybrid_parallel_plugin.py:1104). A group
    that spans hosts has one network adapter for each of its ranks on a host, and is no faster than the links there.
    """
    settings = plan.settings
    sp = settings.sp_size if settings.sp_mode == "all_to_all" else 1
    strides = {"sequence": 1, "tensor": sp, "pipeline": sp * settings.tp_size, "data": settings.model_ranks}
    sizes = {"sequence": sp, "tensor": settings.tp_size, "pipeline": settings.pp_size, "data": plan.data_ranks}
    stride, extent = strides[axis], strides[axis] * sizes[axis]
    if axis == "data" and sp > 1:
        # Over the sequence-parallel ranks as well, which are neighbours.
        stride = max(settings.model_ranks // sp, 1)
    if extent <= GPUS_PER_HOST:
        return LINK_SHARE * gpu.host_link
    members = 1 if axis == "pipeline" else max(GPUS_PER_HOST // stride, 1)
    return LINK_SHARE * min(gpu.host_link, members * gpu.network)


def _offload_seconds(stages: list[StageShape], plan: Plan) -> float:
    """Seconds for an update in the host's memory, if the optimizer is there."""
    if "optimizer" not in plan.plugin.offloaded:
        return 0.0
    share = max(_trained_elements(stage, plan) for stage in stages) / plan.shards
    return share * (2 * plan.element / HOST_COPY + 1 / HOST_ADAM)
