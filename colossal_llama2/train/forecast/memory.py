"""Forecast of a rank's memory in bytes, by purpose: computed from sizes and settings, never measured.

Three moments decide: `loss`, when all activations exist; `backward`, at its peak; and `update`. Each is the sum of
parts, and the largest is the peak. Weights and states are counted as in "ZeRO: memory optimizations toward training
trillion parameter models" (Rajbhandari et al., arXiv 1910.02054, section 3), activations in activations.py, and buffers
as in ColossalAI 0.5.0, whose files are named below (paths inside the package).

Not counted: the memory of a process before it has a model (Python, libraries; on a GPU CUDA and NCCL), fragmentation,
loading and saving.
"""

import bisect
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from colossal_llama2.engine.plugins import Gemini, Plugin, plugin_of
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.model.trainable import Trainable
from colossal_llama2.train.forecast import activations
from colossal_llama2.train.forecast.activations import FLOAT32, MicroBatch, ModelShape, StageShape

MOMENTS = ("loss", "backward", "update")
PARTS = ("weights", "master weights", "gradients", "optimizer", "activations", "logits", "buffers")
FLOAT64 = 8
# booster/plugin/low_level_zero_plugin.py:410 and hybrid_parallel_plugin.py:1030: elements that are reduced at once.
ZERO_BUCKET = 12 * 2**20
# zero/gemini/chunk/utils.py: steps in which a size of chunks is searched.
CHUNK_INTERVAL = 1024

Weights = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Plan:
    """The settings that, besides the model, decide the memory of a rank.

    Attributes:
        settings: the flags that decide how a step is computed.
        ranks: of the whole job.
        max_length: tokens of a sample; all samples are assumed to be that long.
        attention: sdpa or flash, as activations.MicroBatch has it.
        chunked_loss, checkpointing, has_documents: as there.
        on_cpu: a rehearsal, in which the device's memory is the host's.
    """

    settings: EngineSettings
    ranks: int
    max_length: int
    attention: str
    chunked_loss: bool
    checkpointing: bool
    has_documents: bool
    on_cpu: bool

    @property
    def plugin(self) -> Plugin:
        """The plugin that splits the model."""
        return plugin_of(self.settings)

    @property
    def element(self) -> int:
        """Bytes of a number in the working precision."""
        return FLOAT32 if self.settings.precision == "fp32" else 2

    @property
    def data_ranks(self) -> int:
        """Number of data-parallel ranks."""
        return self.ranks // self.settings.model_ranks

    @property
    def shards(self) -> int:
        """Number of ranks over which ZeRO and Gemini shard: those that hold the same weights."""
        return self.data_ranks * (self.settings.sp_size if self.settings.sp_mode == "all_to_all" else 1)

    @property
    def passes(self) -> int:
        """Backward passes of a step, whose gradients are added; a pipeline has one for each microbatch."""
        settings = self.settings
        parts = settings.micro_batch_size // settings.microbatch_size if settings.pp_size > 1 else 1
        return parts * settings.accumulation_steps

    def micro_batch(self) -> MicroBatch:
        """The micro batch of a rank."""
        settings = self.settings
        is_split = settings.sp_mode in ("split_gather", "ring")
        # ColossalAI's attention gives PyTorch's kernels a mask even if it is only causal (attn.py:186).
        makes_mask = self.plugin.replaces_attention and not self.on_cpu
        return MicroBatch(
            samples=settings.microbatch_size if settings.pp_size > 1 else settings.micro_batch_size,
            length=self.max_length,
            element=self.element,
            attention=self.attention,
            chunked_loss=self.chunked_loss,
            checkpointing=self.checkpointing,
            has_documents=self.has_documents or makes_mask,
            trains_layers=settings.trainable.trains_layers,
            trains_embeddings=settings.trainable.trains_embeddings,
            adapter=settings.trainable.adapter,
            hidden_splits=settings.tp_size if is_split else 1,
            sample_splits=settings.sp_size if settings.sp_mode == "all_to_all" else 1,
            on_cpu=self.on_cpu,
        )


@dataclass
class RankMemory:
    """Bytes that a rank needs, by moment and part.

    Attributes:
        device: of its GPU, or of the machine in a rehearsal: {"loss": {"weights": ..., ...}, ...}
        host: what is offloaded to the host's memory; empty in a rehearsal, where both are the same memory.
    """

    device: dict[str, dict[str, int]]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak_moment(self) -> str:
        """The moment that needs the most memory."""
        return max(MOMENTS, key=lambda moment: sum(self.device[moment].values()))

    @property
    def peak(self) -> int:
        """Bytes of device memory at that moment."""
        return sum(self.device[self.peak_moment].values())


def rank_memory(shape: ModelShape, plan: Plan) -> RankMemory:
    """The memory of the rank that needs the most."""
    stages = [_stage_memory(stage, plan, number) for number, stage in enumerate(stage_shapes(shape, plan.settings))]
    return max(stages, key=lambda memory: memory.peak)


def loss_memory(shape: ModelShape, plan: Plan) -> int:
    """The bytes of device memory at the end of forward: a lower bound of `rank_memory`'s peak, computed much faster."""
    most = 0
    for number, stage in enumerate(stage_shapes(shape, plan.settings)):
        keeper = _keeper(stage, plan)
        placed = _placed({"loss": _loss_parts(stage, plan, keeper, number)}, keeper.constant(), plan)
        most = max(most, sum(placed.device["loss"].values()))
    return most


def constant_memory(shape: ModelShape, plan: Plan) -> dict[str, int]:
    """The bytes that the first stage holds from the first update on, by part, on its device and on the host."""
    return _keeper(stage_shapes(shape, plan.settings)[0], plan).constant()


def stage_shapes(shape: ModelShape, settings: EngineSettings) -> list[StageShape]:
    """The parts of a model that the stages of a pipeline hold; a single one without a pipeline.

    Remaining layers go to the middle stages (pipeline/stage_manager.py, distribute_layers).
    """
    stages = settings.pp_size
    layers, more = divmod(shape.layers, stages)
    first = stages // 2 - more // 2
    return [
        StageShape(
            model=shape,
            layers=layers + (first <= stage < first + more),
            splits=settings.tp_size,
            has_embeddings=stage == 0,
            has_head=stage == stages - 1,
        )
        for stage in range(stages)
    ]


def _stage_memory(stage: StageShape, plan: Plan, number: int) -> RankMemory:
    batch = plan.micro_batch()
    keeper = _keeper(stage, plan)
    others = _other_batches(stage, plan, number)
    device = {"loss": _loss_parts(stage, plan, keeper, number)}
    device["backward"] = max(_backward(stage, batch, keeper, others), key=lambda parts: sum(parts.values()))
    device["update"] = {"activations": 0, "logits": 0, **keeper.update()}
    placed = _placed(device, keeper.constant(), plan)
    placed.host.update(keeper.host())
    return placed


def _loss_parts(stage: StageShape, plan: Plan, keeper: "_Keeper", number: int) -> dict[str, int]:
    """The parts that change, at the end of forward."""
    batch = plan.micro_batch()
    kept = activations.kept_bytes(stage, batch)
    loss_forward, _ = activations.loss_bytes(stage, batch)
    return {"activations": kept + _other_batches(stage, plan, number), "logits": loss_forward, **keeper.forward()}


def _other_batches(stage: StageShape, plan: Plan, number: int) -> int:
    """Bytes of the batches that a pipeline's stage holds besides the one that it computes.

    One forward, one backward: a stage holds the batches of all that come after it.
    """
    if plan.settings.pp_size == 1:
        return 0
    flights = min(plan.settings.pp_size - number, plan.passes)
    return (flights - 1) * activations.kept_bytes(stage, plan.micro_batch())


def _backward(stage: StageShape, batch: MicroBatch, keeper: "_Keeper", others: int) -> Iterator[dict[str, int]]:
    """The parts that change during backward, at each of its operations."""
    for moment in activations.backward_moments(stage, batch):
        yield from (
            {"activations": moment.activations + others, "logits": moment.logits, **found}
            for found in keeper.after(moment.weights)
        )
    yield from ({"activations": 0, "logits": 0, **found} for found in keeper.end())


def _placed(device: dict[str, dict[str, int]], constant: dict[str, int], plan: Plan) -> RankMemory:
    """Combine the changing and the constant parts, and count offloaded parts for the host."""
    host = {}
    if not plan.on_cpu:
        host = {part: constant[part] for part in plan.plugin.offloaded}
    here = {part: size for part, size in constant.items() if part not in host}
    moments = {}
    for name, parts in device.items():
        whole = {part: parts.get(part, 0) + here.get(part, 0) for part in PARTS}
        moments[name] = {part: size for part, size in whole.items() if part not in host}
    return RankMemory(moments, host)


def trained_weights(stage: StageShape, settings: EngineSettings) -> list[tuple[str, int]]:
    """Names and elements of this stage's weights that have gradients, in the order in which they compute."""
    embeddings = [("embeddings", stage.embedding_weights())]
    trainable = settings.trainable
    if trainable.adapter is not None:
        layers = stage.layers * stage.adapter_weights(trainable.adapter)
        if not trainable.trains_embeddings:
            return layers
        return embeddings + layers + ([] if stage.model.ties_embeddings else [("head", stage.embedding_weights())])
    trains_layers = trainable.trains_layers
    layers = stage.layers * stage.layer_weights() if trains_layers else []
    norm = [("norm", stage.model.hidden_size)] if trains_layers else []
    head = [] if stage.model.ties_embeddings and stage.has_embeddings else [("head", stage.embedding_weights())]
    return stage.has_embeddings * embeddings + layers + stage.has_head * (norm + head)


def all_weights(stage: StageShape, settings: EngineSettings) -> int:
    """Elements of all weights of this stage."""
    own = sum(size for _, size in trained_weights(stage, replace(settings, trainable=Trainable())))
    adapter = settings.trainable.adapter
    return own + (0 if adapter is None else stage.layers * sum(size for _, size in stage.adapter_weights(adapter)))


class _Keeper:
    """How a plugin keeps weights, gradients and states. The base class shards none of them (3d without ZeRO).

    Methods return bytes by part as a dictionary; those that return a list have one dictionary for each event.
    """

    def __init__(self, stage: StageShape, plan: Plan):
        self.plan, self.element = plan, plan.element
        self.weights = trained_weights(stage, plan.settings)
        self.all = all_weights(stage, plan.settings)
        self.trained = sum(size for _, size in self.weights)
        self.largest = max((size for _, size in self.weights), default=0)
        # Gradients of earlier micro batches, to which those of the last one are added.
        self.earlier = self.trained * self.element if plan.passes > 1 else 0
        self.gradients = self.earlier
        # DistributedDataParallel copies all gradients into its buckets, since the plugin leaves gradient_as_bucket_view
        # off (booster/plugin/hybrid_parallel_plugin.py:1028), and reduces them there.
        wraps = plan.shards > 1 and plan.settings.pp_size == 1
        self.buckets = self.trained * self.element if wraps else 0

    def constant(self) -> dict[str, int]:
        """Bytes that exist from the first update on: weights, and Adam's two moments in float32."""
        # amp/naive_amp/mixed_precision_optimizer.py: a float32 copy of what is not float32 itself.
        masters = FLOAT32 * self.trained if self.element < FLOAT32 else 0
        return {
            "weights": self.element * self.all,
            "master weights": masters,
            "optimizer": 2 * FLOAT32 * self.trained,
            "buffers": self.buckets,
        }

    def host(self) -> dict[str, int]:
        """Bytes in the host's memory besides the offloaded parts."""
        return {}

    def forward(self) -> dict[str, int]:
        return {"gradients": self.gradients}

    def after(self, weights: Weights) -> list[dict[str, int]]:
        for _, size in weights:
            # If there is already one, the new one is added to it and freed.
            self.gradients += 0 if self.earlier else size * self.element
        passing = max((size for _, size in weights), default=0) * self.element if self.earlier else 0
        return [{"gradients": self.gradients + passing}]

    def end(self) -> list[dict[str, int]]:
        return []

    def update(self) -> dict[str, int]:
        # All gradients in float32, and one squared in float64 for the norm.
        copies = FLOAT32 * self.trained if self.element < FLOAT32 else 0
        # Each half-precision gradient is freed when it is copied.
        gradients = max(self.trained * self.element, copies + (self.largest * self.element if copies else 0))
        return {"gradients": gradients, "buffers": FLOAT64 * self.largest}


class _ReplicaKeeper(_Keeper):
    """TorchDDPPlugin. Gradients are views of the buckets, except those of micro batches before the last."""

    def __init__(self, stage: StageShape, plan: Plan):
        super().__init__(stage, plan)
        # DistributedDataParallel has its buckets on a single rank too.
        self.buckets = self.trained * self.element

    def after(self, weights: Weights) -> list[dict[str, int]]:
        # One is on its way into its bucket.
        found = {"gradients": self.gradients + max((size for _, size in weights), default=0) * self.element}
        if self.earlier:
            self.gradients -= sum(size for _, size in weights) * self.element
        return [found]

    def update(self) -> dict[str, int]:
        copies = FLOAT32 * self.trained if self.element < FLOAT32 else 0
        return {"gradients": copies, "buffers": FLOAT64 * self.largest}


class _ZeroKeeper(_Keeper):
    """LowLevelZeroPlugin, and ZeRO inside 3d (zero/low_level/low_level_optim.py)."""

    def __init__(self, stage: StageShape, plan: Plan):
        super().__init__(stage, plan)
        self.splits = plan.plugin.zero_stage == 2
        self.shards, self.buckets = plan.shards, 0
        self.shard = sum(-(-size // self.shards) for _, size in self.weights)
        # Stage 1 keeps gradients until the last micro batch; stage 2 reduces and adds each.
        self.kept = self.shard if self.splits else self.trained
        self.gradients = self.kept * self.element if self.earlier else 0
        # Without overlap stage 1 begins to reduce when backward is done (:738).
        self.waits = not self.splits and plan.on_cpu
        # One for matrices and one for norms (bug_fixes.fill_buckets).
        self.bucket: dict[bool, list[int]] = {False: [], True: []}

    def constant(self) -> dict[str, int]:
        # :277, a float32 copy of this rank's part, in fp32 too.
        return {
            "weights": self.element * self.all,
            "master weights": FLOAT32 * self.shard,
            "optimizer": 2 * FLOAT32 * self.shard,
            "buffers": 0,
        }

    def after(self, weights: Weights) -> list[dict[str, int]]:
        if self.waits:
            return super().after(weights)
        found = [self._now()]
        for name, size in weights:
            found += self._add(name, size)
        return found

    def end(self) -> list[dict[str, int]]:
        found = []
        if self.waits:
            waiting, self.gradients = self.gradients, 0
            for name, size in reversed(self.weights):
                for parts in self._add(name, size):
                    # Those that are not in a bucket yet are still where backward wrote them.
                    waiting_now = max(waiting - self.gradients - self._in_buckets(), 0)
                    found.append({**parts, "gradients": parts["gradients"] + waiting_now})
        return found + self._reduce()

    def _add(self, name: str, size: int) -> list[dict[str, int]]:
        """Add a gradient to the bucket of its group; all buckets are reduced before if that one is full (:439)."""
        found, bucket = [], self.bucket[name == "norm"]
        if sum(bucket) + size > ZERO_BUCKET:
            found = self._reduce(coming=0 if self.waits else size)
        bucket.append(size)
        return [*found, self._now()]

    def _reduce(self, coming: int = 0) -> list[dict[str, int]]:
        """Flatten each bucket in turn into a copy, reduce it, and keep this rank's part (stage 1: all; :356)."""
        return [self._reduce_one(bucket, coming) for bucket in self.bucket.values() if bucket]

    def _reduce_one(self, bucket: list[int], coming: int) -> dict[str, int]:
        elements = sum(bucket)
        copies = elements + (elements // self.shards if self.splits else 0)
        if self.plan.on_cpu and self.splits:
            # The parts of the other ranks, and the sum (gloo_collectives.py).
            copies += elements
        parts = self._now()
        parts["gradients"] += coming * self.element
        parts["buffers"] += copies * self.element
        bucket.clear()
        if not self.earlier or self.waits:
            self.gradients += (elements // self.shards if self.splits else elements) * self.element
        return parts

    def _in_buckets(self) -> int:
        return sum(map(sum, self.bucket.values())) * self.element

    def _now(self) -> dict[str, int]:
        return {"gradients": self.gradients, "buffers": self._in_buckets()}

    def update(self) -> dict[str, int]:
        kept, is_half = self.kept * self.element, self.element < FLOAT32
        # The norm's squares in float64, one weight at a time, beside float32 copies of half-precision gradients (:555).
        shares = [-(-size // self.shards) for _, size in self.weights]
        copies = FLOAT32 * self.shard if is_half else 0
        norm = {"gradients": kept + copies, "buffers": FLOAT64 * max(shares, default=0)}
        gather = {"gradients": kept, "buffers": self._gather_bytes(shares, is_half)}
        return max(norm, gather, key=lambda parts: sum(parts.values()))

    def _gather_bytes(self, shares: Sequence[int], is_half: bool) -> int:
        """Bytes of buffers for gathering the updated weights (:594, bookkeeping/tensor_bucket.py:70)."""
        most = fill = 0
        for share in shares:
            if share > ZERO_BUCKET:
                # Directly into the weights.
                most = max(most, (share + fill) * is_half)
            elif fill + share > ZERO_BUCKET:
                most, fill = max(most, self._bucket_elements(fill, is_half) + share * is_half), share
            else:
                fill += share
        return max(most, self._bucket_elements(fill, is_half)) * self.element

    def _bucket_elements(self, fill: int, is_half: bool) -> int:
        # The updated parts in half precision, one flat copy of them, what comes from all ranks, and of that one weight
        # put together (:86).
        return fill * is_half + fill + fill * self.shards + min(fill * self.shards, self.largest)


class _GeminiKeeper(_Keeper):
    """GeminiPlugin: weights in chunks that are gathered around an operation (zero/gemini)."""

    def __init__(self, stage: StageShape, plan: Plan):
        super().__init__(stage, plan)
        self.shards, self.reuses = plan.shards, plan.settings.accumulation_steps == 1
        sizes = [size for _, size in self.weights]
        assert isinstance(plan.plugin, Gemini)
        self.is_auto = plan.plugin.policy == "auto"
        # As in train/checks.py.
        split = self.all if plan.settings.trainable.adapter is None else self.trained
        arguments = plan.plugin.arguments(parameters=split, on_cpu=plan.on_cpu)
        self.chunks = chunk_sizes(tuple(sizes), minimum_m=arguments["min_chunk_size_m"], shards=self.shards)
        places = _places(sizes, self.chunks)
        # Backward uses the weights of a name from the last one on.
        self.waiting: dict[str, list[int]] = {}
        for (name, _), chunk in zip(self.weights, places, strict=True):
            self.waiting.setdefault(name, []).append(chunk)
        self.left = [places.count(chunk) for chunk in range(len(self.chunks))]
        self.elements = sum(self.chunks)
        self.shard = self.elements // self.shards
        self.ahead = arguments["max_prefetch"]
        self.gathered: set[int] = set(range(len(self.chunks))) if self.is_auto else set()

    def constant(self) -> dict[str, int]:
        frozen = (self.all - self.trained) * self.element
        # Gradients take the weights' place in their chunks, unless they are accumulated (gemini_ddp.py:79).
        return {
            "weights": self.element * self.shard + frozen,
            "master weights": FLOAT32 * self.shard,
            "optimizer": 2 * FLOAT32 * self.shard,
            "gradients": 0 if self.reuses else self.element * self.shard,
            "buffers": 0,
        }

    def host(self) -> dict[str, int]:
        """A copy of each shard, page-locked for good by asynchronous reduction (plugin/gemini_plugin.py:491)."""
        if self.plan.on_cpu:
            return {}
        # With automatic placement master weights are there in any case.
        copies = self.element + (0 if self.is_auto else FLOAT32) + (0 if self.reuses else self.element)
        return {"page-locked copies": copies * self.shard}

    def _extra(self, chunks: Iterable[int]) -> int:
        """Bytes of gathered chunks beyond those of their shards, which they replace (chunk.py:550)."""
        return sum(self.chunks[chunk] - self.chunks[chunk] // self.shards for chunk in chunks) * self.element

    def forward(self) -> dict[str, int]:
        # placement_policy.py:66, static: before an operation all others are released, and the next ones are gathered
        # while it runs. auto: none is released while there is room.
        by_size = sorted(range(len(self.chunks)), key=self.chunks.__getitem__, reverse=True)
        ahead = by_size[1 : 1 + self.ahead]
        return {"buffers": self._extra(self.gathered) or self._extra([by_size[0], *ahead]) + self._sent(ahead)}

    def after(self, weights: Weights) -> list[dict[str, int]]:
        found = []
        for name, size in weights:
            found += self._gradient(self.waiting[name].pop(), size)
        return found or [{"buffers": self._buffers()}]

    def _buffers(self) -> int:
        """Bytes of the gathered and the prefetched chunks, at any distance: backward goes from the last one down."""
        next_ones = [chunk for chunk, left in enumerate(self.left) if left and chunk not in self.gathered]
        ahead = next_ones[-self.ahead :] if self.ahead else []
        return self._extra(self.gathered.union(ahead)) + self._sent(ahead)

    def _sent(self, chunks: Sequence[int]) -> int:
        """Bytes of the shards that messages in flight keep alive: gloo sends them in place."""
        return sum(self.chunks[chunk] // self.shards for chunk in chunks) * self.element * self.plan.on_cpu

    def _gradient(self, chunk: int, size: int) -> list[dict[str, int]]:
        """Add a gradient to its chunk, which is reduced after its last gradient (gemini_ddp.py:357)."""
        self.gathered.add(chunk)
        own = 0 if self.reuses else self.chunks[chunk] * self.element
        parts = {"gradients": size * self.element, "buffers": self._buffers() + own}
        self.left[chunk] -= 1
        if self.left[chunk] > 0:
            return [parts]
        # The result has its own memory; on a CPU, so do the other ranks' parts and the sum (gloo_collectives.py).
        elements = self.chunks[chunk] // self.shards + (self.chunks[chunk] if self.plan.on_cpu else 0)
        reducing = {**parts, "buffers": parts["buffers"] + elements * self.element}
        self.gathered.discard(chunk)
        return [parts, reducing]

    def update(self) -> dict[str, int]:
        if not self.plan.on_cpu:
            return {}
        # bug_fixes.py, clip_in_bf16: float32 copies of all gradients. adam_kernels.py: one is divided into a copy.
        copies = FLOAT32 * self.shard if self.plan.settings.precision == "bf16" else 0
        largest = min(self.largest, max(self.chunks) // self.shards)
        return {"gradients": copies, "buffers": 2 * FLOAT32 * largest}


@functools.lru_cache(maxsize=32)
def chunk_sizes(sizes: tuple[int, ...], *, minimum_m: float, shards: int) -> tuple[int, ...]:
    """Elements of each of Gemini's chunks for weights of these sizes, padding included.

    The size with the least waste between `minimum_m` x 2**20 and twice that, or from the largest weight that is not an
    outlier (zero/gemini/chunk/search_utils.py:84); a larger weight has a separate chunk (manager.py:83).
    """
    minimum = round(minimum_m * 2**20)
    if sum(sizes) < minimum:
        return (sum(sizes),)
    mean = sum(sizes) / len(sizes)
    limit = mean + 3 * math.sqrt(sum((size - mean) ** 2 for size in sizes) / len(sizes))
    usual = [size for size in sizes if size <= limit]
    start = math.ceil(max(minimum, *usual) / CHUNK_INTERVAL) * CHUNK_INTERVAL
    ends = list(accumulate(usual))
    best = _least_waste(range(start, start + minimum + 1, CHUNK_INTERVAL), ends)
    best += -best % shards
    return tuple(size if size > best else best for size in _own_sizes(sizes, best, shards))


def _least_waste(candidates: range, ends: Sequence[int]) -> int:
    """The smallest size whose chunks together have the fewest elements."""
    best, place = (math.inf, 0), 0
    while place < len(candidates):
        count = _chunks_needed(ends, candidates[place])
        best = min(best, (count * candidates[place], candidates[place]))
        # Larger chunks are never more, and of those that are as many the first have the fewest elements.
        place = bisect.bisect_right(candidates, -count, lo=place, key=lambda size: -_chunks_needed(ends, size))
    return int(best[1])


def _chunks_needed(ends: Sequence[int], size: int) -> int:
    """Number of chunks of that size for consecutive weights; `ends` are the running totals of their sizes."""
    count = done = 0
    while done < len(ends):
        begun = ends[done - 1] if done else 0
        done = bisect.bisect_right(ends, begun + size)
        count += 1
    return count


def _own_sizes(sizes: Sequence[int], usual: int, shards: int) -> list[int]:
    chunks, room = [], 0
    for size in sizes:
        if size > room:
            chunks.append(max(usual, size + (-size % shards) if size > usual else 0))
            room = chunks[-1]
        room -= size
    return chunks


def _places(sizes: Sequence[int], chunks: Sequence[int]) -> list[int]:
    """The number of each weight's chunk."""
    places, room = [], 0
    chunk = -1
    for size in sizes:
        if size > room:
            chunk += 1
            room = chunks[chunk]
        room -= size
        places.append(chunk)
    return places


# By `Plugin.zero_stage`. Gemini is the only plugin that also splits the weights.
KEEPERS: dict[int, type[_Keeper]] = {0: _Keeper, 1: _ZeroKeeper, 2: _ZeroKeeper, 3: _GeminiKeeper}


def _keeper(stage: StageShape, plan: Plan) -> _Keeper:
    kind = _ReplicaKeeper if plan.plugin.is_replicated else KEEPERS[plan.plugin.zero_stage]
    return kind(stage, plan)
