"""How a model is split over ranks: ColossalAI's Booster and one of its plugins, behind the few calls a loop needs."""

import atexit
import contextlib
import gc
import itertools
import logging
import math
import os
import socket
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from colossal_llama2 import launcher, logs
from colossal_llama2.engine import loss_scale
from colossal_llama2.engine.chunked_loss import HeadPart, takes_liger, use_chunked_loss
from colossal_llama2.engine.loss_tally import LossTally
from colossal_llama2.engine.patches import bug_fixes
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.errors import UserError
from colossal_llama2.model.documents import MaskForm, attention_inputs
from colossal_llama2.model.freezing import train_rows_only
from colossal_llama2.model.loading import dtype_of
from colossal_llama2.storage.unpickling_guard import unpickling_refused

if TYPE_CHECKING:
    from colossal_llama2.dataset.read.batch import Batch

ADAM_BETAS = (0.9, 0.95)
# Gemini groups parameters into chunks of at least this many million elements, and never shards a model that is smaller.
GEMINI_MIN_CHUNK_M = 32.0
GEMINI_CHUNKS_AT_LEAST = 8
# Chunks that are gathered while the one before is computed with. With automatic placement none is: the chunk that was
# gathered last is not counted in what is free (placement_policy.py:210), and a step could fail for want of memory.
GEMINI_PREFETCHED = {"static": 1, "auto": 0}


def launch(seed: int, *, timeout_seconds: float | None = None, meet: Callable[[], None] = lambda: None) -> None:
    """Join the process group of the launcher; without one, form one of this process alone.

    Args:
        timeout_seconds: how long ranks wait for each other at most; None is PyTorch's default.
        meet: called when the libraries are there, before the ranks are joined.

    Raises:
        UserError: there are more processes on this host than GPUs.
    """
    here = launcher.settle()
    # Nothing here is compiled by PyTorch, whose pool of compilers would be started at import all the same.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # At import ColossalAI tells of packages that are missing (apex, tensornvme), of which at most apex's norms would be
    # used, and PyTorch warns of TorchScript on a module that ColossalAI imports.
    with warnings.catch_warnings(record=True):
        import colossalai.booster.plugin
        import torch.distributed.optim
    from colossalai.logging import get_dist_logger

    # Its hints are about calls that this file makes on purpose.
    get_dist_logger().set_level("ERROR")
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    if not torch.cuda.is_available():
        from colossal_llama2.engine.patches import cpu_device

        cpu_device.install()
    bug_fixes.install()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        os.environ.setdefault(name, str(value))
    if here.world_size == 1 and not here.uses_agent_store:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(_free_port()))
    if timeout_seconds is not None:
        _set_timeout(timeout_seconds)
    if torch.cuda.is_available() and here.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={here.local_rank}, but {socket.gethostname()} has {torch.cuda.device_count()} GPUs; start one "
            f"process for each GPU, such as with --nproc_per_node {torch.cuda.device_count()}"
        )
    meet()
    colossalai.launch(
        rank=here.rank,
        world_size=here.world_size,
        local_rank=here.local_rank,
        host=os.environ["MASTER_ADDR"],
        port=int(os.environ["MASTER_PORT"]),
        seed=seed,
        verbose=False,
    )
    if not torch.cuda.is_available():
        logs.get_logger().info("No GPU: this is a rehearsal on the CPU (gloo, PyTorch's Adam and attention kernels)")


def _set_timeout(seconds: float) -> None:
    """colossalai.launch and its meshes of groups take PyTorch's default, of which there is one per kind of network."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=seconds)


def current_device():
    """The torch.device of this rank."""
    from colossalai.accelerator import get_accelerator

    return get_accelerator().get_current_device()


def leave() -> None:
    """Leave the process group, once all ranks are done.

    gloo sometimes waits for ever, with all threads, for connections whose other end has closed already (measured in one
    of about 40 short runs). All is done by then, so a process with partners ends without closing them itself.
    """
    import torch.distributed as dist

    dist.barrier()
    if dist.get_world_size() > 1 and dist.get_backend() == "gloo":
        atexit.register(_end_without_closing)
    else:
        dist.destroy_process_group()


def _end_without_closing() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


# Arguments of ColossalAI's plugins, as plain dictionaries, so that they can be compared without building a plugin.


def _common_arguments(settings: EngineSettings) -> dict[str, Any]:
    # An infinite bound clips nothing, and unlike 0 still lets the plugin compute the norm, which is logged. Gemini on a
    # GPU must have it: it frees a chunk that accumulates while another stream copies from it (chunk.py:556), and only
    # the host's wait for the norm keeps others from taking that memory before.
    arguments: dict[str, Any] = {"precision": settings.precision, "max_norm": settings.max_norm or math.inf}
    return {**arguments, "initial_scale": loss_scale.INITIAL_SCALE, "hysteresis": loss_scale.HYSTERESIS}


def gemini_arguments(settings: EngineSettings, *, parameters: int, on_cpu: bool, policy: str) -> dict[str, Any]:
    """Keyword arguments of GeminiPlugin for a model of that many parameters."""
    chunk_m = min(GEMINI_MIN_CHUNK_M, parameters / 2**20 / GEMINI_CHUNKS_AT_LEAST)
    arguments = _common_arguments(settings)
    arguments.update(
        placement_policy=policy,
        enable_gradient_accumulation=settings.accumulation_steps > 1,
        min_chunk_size_m=chunk_m,
        search_range_m=chunk_m,
        max_prefetch=GEMINI_PREFETCHED[policy],
        # Asynchronous reduction pins host memory, which needs a GPU, and frees what it sends.
        enable_async_reduce=not on_cpu,
    )
    return arguments


def zero_arguments(settings: EngineSettings, *, on_cpu: bool, offload: bool) -> dict[str, Any]:
    """Keyword arguments of LowLevelZeroPlugin at stage 2."""
    # Overlapping records tensors on a CUDA stream.
    return {**_common_arguments(settings), "stage": 2, "overlap_communication": not on_cpu, "cpu_offload": offload}


def has_apex_norm() -> bool:
    """True if a GPU is there, and apex with its compiled RMSNorm, which ColossalAI can put in place of the model's."""
    import importlib

    import torch

    if not torch.cuda.is_available():
        return False
    try:
        norms = importlib.import_module("apex.normalization")
        importlib.import_module("fused_layer_norm_cuda")
    except Exception:
        # What was compiled for another PyTorch fails in many ways.
        return False
    return hasattr(norms, "FusedRMSNorm")


def hybrid_arguments(settings: EngineSettings, *, on_cpu: bool, fused_norm: bool = False) -> dict[str, Any]:
    """Keyword arguments of HybridParallelPlugin."""
    arguments = _common_arguments(settings)
    arguments.update(
        tp_size=settings.tp_size,
        pp_size=settings.pp_size,
        zero_stage=settings.zero_stage,
        # Its other attention keeps a matrix of length x length for each head.
        enable_flash_attention=settings.uses_colossal_attention,
        enable_fused_normalization=fused_norm,
        overlap_communication=not on_cpu,
        # They are those of rotary positions, which each rank computes for itself.
        broadcast_buffers=False,
        # Pad the vocabulary to a multiple of tp_size and no further.
        make_vocab_size_divisible_by=1,
    )
    if settings.pp_size > 1:
        # The cache would keep the shape of the first batch, and batches are as long as their longest sample.
        arguments.update(microbatch_size=settings.microbatch_size, enable_metadata_cache=False)
    if settings.sp_mode is not None:
        arguments.update(
            enable_sequence_parallelism=True, sequence_parallelism_mode=settings.sp_mode, sp_size=settings.sp_size
        )
    return arguments


def _gemini_plugin(settings: EngineSettings, parameters: int, on_cpu: bool, policy: str = "static"):
    from colossalai.booster.plugin import GeminiPlugin

    return GeminiPlugin(**gemini_arguments(settings, parameters=parameters, on_cpu=on_cpu, policy=policy))


def _zero_plugin(settings: EngineSettings, parameters: int, on_cpu: bool, offload: bool = False):
    from colossalai.booster.plugin import LowLevelZeroPlugin

    return LowLevelZeroPlugin(**zero_arguments(settings, on_cpu=on_cpu, offload=offload))


def _hybrid_plugin(settings: EngineSettings, parameters: int, on_cpu: bool):
    from colossalai.booster.plugin import HybridParallelPlugin

    # Everywhere or nowhere: copies of a norm that are computed in two ways would drift apart.
    fused_norm = not on_cpu and not collectives.any_rank(not has_apex_norm())
    if fused_norm:
        logs.get_logger().info("Norms: fused, by apex")
    return HybridParallelPlugin(**hybrid_arguments(settings, on_cpu=on_cpu, fused_norm=fused_norm))


@dataclass(frozen=True)
class PluginKind:
    """In what the plugins differ.

    Attributes:
        build: makes ColossalAI's plugin from (settings, parameters, on_cpu).
        is_gemini: parameters live in chunks. That takes half precision, clips inside Adam, and keeps steps as tensors.
        is_hybrid: has a mesh of groups of ranks, of which one sees different data.
        needs_moments: it saves no optimizer that has made no update, as where fp16 overflows from the first step on.
        is_lazy: the model may be initialized without its weights, which are read when it is already split.
    """

    build: Callable[..., Any]
    is_gemini: bool = False
    is_hybrid: bool = False
    needs_moments: bool = False
    is_lazy: bool = False


PLUGINS: dict[str, PluginKind] = {
    "gemini": PluginKind(_gemini_plugin, is_gemini=True, is_lazy=True),
    "gemini_auto": PluginKind(partial(_gemini_plugin, policy="auto"), is_gemini=True, is_lazy=True),
    "zero2": PluginKind(_zero_plugin, needs_moments=True),
    "zero2_cpu": PluginKind(partial(_zero_plugin, offload=True), needs_moments=True),
    "3d": PluginKind(_hybrid_plugin, is_hybrid=True, is_lazy=True),
}


def settings_problems(settings: EngineSettings, world_size: int) -> list[str]:
    """What is wrong with the settings for so many ranks: one sentence each, none if they can run."""
    kind = PLUGINS[settings.plugin]
    problems = []
    if kind.is_gemini and settings.precision == "fp32":
        problems.append(f"--plugin {settings.plugin} trains in fp16 or bf16, --mixed_precision fp32 needs zero2 or 3d")
    if kind.is_hybrid and settings.precision == "fp32" and settings.zero_stage > 0:
        problems.append("--plugin 3d with --mixed_precision fp32 needs --zero 0, since its ZeRO trains in fp16 or bf16")
    if not kind.is_hybrid and settings.tp_size > 1:
        problems.append(f"--tp {settings.tp_size} needs --plugin 3d, {settings.plugin} has no tensor parallelism")
    if not kind.is_hybrid and settings.pp_size > 1:
        problems.append(f"--pp {settings.pp_size} needs --plugin 3d, {settings.plugin} has no pipeline")
    if not kind.is_hybrid and settings.sp_mode is not None:
        problems.append(f"--enable_sequence_parallelism needs --plugin 3d, {settings.plugin} does not split samples")
    if world_size % settings.model_ranks:
        sizes = {"--tp": settings.tp_size, "--pp": settings.pp_size, "--sp": settings.sp_size}
        given = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1)
        problems.append(f"{given} does not divide the {world_size} processes of this job")
    return problems + _pipeline_problems(settings) + _sequence_problems(settings)


def _pipeline_problems(settings: EngineSettings) -> list[str]:
    if settings.pp_size == 1:
        return []
    problems = []
    batch, part = settings.micro_batch_size, settings.microbatch_size
    if batch % part or batch // part < settings.pp_size:
        problems.append(
            f"--micro_batch_size {batch} with --microbatch_size {part} keeps no {settings.pp_size} pipeline stages "
            f"busy; give a multiple of --microbatch_size, at least {settings.pp_size * part}"
        )
    if settings.zero_stage == 2:
        problems.append(f"--pp {settings.pp_size} needs --zero 0 or 1, stage 2 would reduce gradients too often")
    if settings.embeddings_only and settings.pp_size > 2:
        problems.append(
            f"--pp {settings.pp_size} leaves stages that train nothing, with --freeze_non_embeds_params or "
            f"--train_new_rows_only; give --pp 2"
        )
    return problems


def _sequence_problems(settings: EngineSettings) -> list[str]:
    if settings.sp_mode is None:
        return [f"--sp {settings.sp_size} needs --enable_sequence_parallelism"] if settings.sp_size > 1 else []
    problems = []
    if settings.sp_mode == "all_to_all" and settings.sp_size == 1:
        problems.append("--sp_mode all_to_all needs --sp, the number of ranks that share a sample")
    if settings.sp_mode != "all_to_all" and settings.tp_size == 1:
        problems.append(f"--sp_mode {settings.sp_mode} needs --tp, whose ranks share a sample")
    if settings.sp_mode != "all_to_all" and settings.sp_size > 1:
        problems.append(f"--sp is for --sp_mode all_to_all, {settings.sp_mode} takes the ranks of --tp; leave it out")
    if settings.sp_mode != "all_to_all" and settings.zero_stage == 2 and settings.accumulation_steps > 1:
        problems.append(
            f"--sp_mode {settings.sp_mode} with --accumulation_steps {settings.accumulation_steps} needs --zero 0 or "
            f"1, since stage 2 cannot wait for the last micro batch"
        )
    return problems


class Engine:
    """A boosted model and its optimizer on this rank.

    Ranks that see the same data (the partners of a tensor-parallel or sequence-parallel group, and the stages of a
    pipeline) share `data_rank`, from 0 to `data_size` - 1.
    """

    def __init__(self, settings: EngineSettings, parameters: int):
        import torch
        import torch.distributed as dist
        from colossalai.booster import Booster

        self.settings = settings
        self.device = current_device()
        self._kind = PLUGINS[settings.plugin]
        plugin = self._kind.build(settings, parameters, not torch.cuda.is_available())
        self._plugin, self._booster = plugin, Booster(plugin=plugin)
        self._tp_group = plugin.tp_group if settings.tp_size > 1 else None
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # Where the ranks talk through GPUs, another way between their hosts.
        self._host_group = dist.new_group(backend="gloo") if self.pins_batches else None
        # The default group is that of all ranks.
        self._data_group = plugin.dp_group if self._kind.is_hybrid else None
        self.data_rank, self.data_size = dist.get_rank(self._data_group), dist.get_world_size(self._data_group)
        self.model = self.optimizer = None
        # That of the last `step`.
        self.used_loss_scale = 1.0
        self.loss_tally = LossTally(self.device, unfed=self._why_no_rank_has_token_losses())

    def initializing(self, *, ties_embeddings: bool) -> contextlib.AbstractContextManager:
        """A context to load the model in: lazily where the plugin shards it before it exists whole on a rank."""
        # The last stage of a pipeline would drop the embeddings before it has read the head that is tied to them.
        if not self._kind.is_lazy or (ties_embeddings and self.is_pipelined):
            return contextlib.nullcontext()
        from colossalai.lazy import LazyInitContext

        return LazyInitContext(default_device=self.device)

    def boost(self, model) -> None:
        """Take over a loaded transformers model: split it and give it an optimizer over its trainable parameters."""
        from colossalai.nn.optimizer import HybridAdam

        optimizer = HybridAdam(
            # Decay would move the rows that are not trained, and it cannot be told to spare them.
            _parameter_groups(model, 0.0 if self.settings.trained_rows else self.settings.weight_decay),
            lr=self.settings.learning_rate,
            betas=ADAM_BETAS,
            adamw_mode=True,
        )
        if self._kind.is_gemini:
            bug_fixes.clip_in_bf16(optimizer)
            _order_layers_by_use(model)
        if self.settings.uses_colossal_attention:
            from colossal_llama2.engine.patches import document_attention

            document_attention.install(use_flash_attn=self.settings.use_flash_attn)
        # A model that was initialized lazily is read from its files now.
        with unpickling_refused(), bug_fixes.unrounded_buffers(model):
            self.model, self.optimizer, *_ = self._booster.boost(model, optimizer)
        if self._kind.is_gemini:
            bug_fixes.agree_on_memory(self.model)
        if hasattr(self.optimizer, "pg_to_bucket_store"):
            bug_fixes.fill_buckets(self.optimizer)
        self._guard_updates()
        self._train_rows_only(model.config.vocab_size)
        has_head = not self.is_pipelined or self._plugin.stage_manager.is_last_stage()
        if self.settings.chunked_loss != "off" and has_head:
            splits = self.settings.sp_mode == "all_to_all"
            use_chunked_loss(
                self.unwrapped_model,
                self._head_part(model.config.vocab_size),
                sample_group=self._plugin.sp_group if splits else None,
                tell=self.loss_tally.add,
            )
        # Lazy loading leaves cycles of references, in which whole weights wait for Python to look (64 MB of 85 M
        # parameters, measured).
        gc.collect()

    def _train_rows_only(self, vocab_size: int) -> None:
        has_embedding = not self.is_pipelined or self._plugin.stage_manager.is_first_stage()
        if self.settings.trained_rows and has_embedding:
            embedding = self.unwrapped_model.get_input_embeddings()
            train_rows_only(embedding, self.settings.trained_rows, vocab_size=vocab_size)

    def _why_no_rank_has_token_losses(self) -> str | None:
        """The reason of this rank, or that others have one: all ranks add up their sums, or none. Called on all."""
        reason = self._why_no_token_losses()
        if collectives.any_rank(reason is not None) and reason is None:
            return "Liger's kernel, which is installed on other hosts, gives the sum of all tokens alone"
        return reason

    def _why_no_token_losses(self) -> str | None:
        if self.is_pipelined:
            return "the stages of a pipeline share the loss of their samples alone"
        if self.settings.chunked_loss == "off":
            return "--chunked_loss off gives the mean of all tokens alone"
        # As in the chunked loss: a head of which a part is held, or trained, is none for it.
        is_whole = self._tp_group is None and self.settings.trained_rows is None
        if is_whole and takes_liger(self.device, dtype_of(self.settings.precision)):
            return "Liger's kernel gives the sum of all tokens alone"
        return None

    def _guard_updates(self) -> None:
        """Let Adam do nothing where loss or gradient norm is no number.

        The plugin around it goes through its step as always, since it has to let go of the gradients: Gemini's lie
        where its weights were. All ranks know the same norm, so none of them updates.
        """
        # Weak, since a cycle of references would keep the plugin's process groups until Python looks for cycles, which
        # each rank does at another moment. The groups close at their end, and for that the ranks have to meet.
        adam_reference, wrapper_reference = weakref.ref(self.optimizer.optim), weakref.ref(self.optimizer)

        def update_if_finite(*args, **kwargs):
            adam, norm = adam_reference(), wrapper_reference()._current_grad_norm
            if adam.may_update and (norm is None or math.isfinite(norm)):
                type(adam).step(adam, *args, **kwargs)
            else:
                _begin_moments(adam)

        self.optimizer.optim.step = update_if_finite

    @property
    def unwrapped_model(self):
        """The transformers model inside the plugin's wrapper; under 3d its layers hold this rank's shards."""
        return self.model.unwrap()

    def _head_part(self, vocab_size: int) -> HeadPart:
        if self._tp_group is None:
            return HeadPart(first_token=0, rows=vocab_size, trained=self.settings.trained_rows)
        import torch.distributed as dist

        # The ranks hold equally many rows, of which the last ones pad the vocabulary.
        rows = len(self.unwrapped_model.lm_head.weight)
        first = dist.get_rank(self._tp_group) * rows
        return HeadPart(
            first_token=first,
            rows=min(max(vocab_size - first, 0), rows),
            group=self._tp_group,
            trained=self.settings.trained_rows,
        )

    def attention_inputs(self, batch: "Batch") -> dict[str, Any]:
        """Keyword arguments of the model that say which tokens of a batch see which."""
        form = MaskForm.BLOCKS
        if self.settings.uses_colossal_attention:
            form = MaskForm.NUMBERS
        elif self.unwrapped_model.config._attn_implementation == "flash_attention_2":
            form = MaskForm.BORDERS
        dtype = dtype_of(self.settings.precision)
        shape = tuple(batch.input_ids.shape)
        return attention_inputs(
            batch.attention_mask, batch.documents, form=form, dtype=dtype, device=self.device, shape=shape
        )

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the next optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes without gradients, after which training goes on as if there had been none."""
        import torch

        self.model.eval()
        try:
            with torch.no_grad(), self._gemini_evaluating():
                yield
        finally:
            self.model.train()

    @contextlib.contextmanager
    def _gemini_evaluating(self) -> Iterator[None]:
        """Under Gemini: let the weights come as a forward pass alone needs them."""
        manager = getattr(self.model, "gemini_manager", None)
        if manager is None:
            yield
            return
        # In its first step it learns what comes next, which at the end of forward would be backward.
        policy = manager.placement_policy
        before, policy.max_prefetch = policy.max_prefetch, 0
        # Automatic placement also learns what memory each operation of a step takes, and counts them.
        collector = manager._mem_stats_collector
        operation = None if collector is None else collector._step_idx
        # With automatic placement it takes no pass without gradients before that step.
        needs_step = manager.need_warmup and manager.is_warmup()
        try:
            with bug_fixes.gathered_weights(self.model) if needs_step else contextlib.nullcontext():
                yield
        finally:
            policy.max_prefetch = before
            if collector is not None:
                collector._step_idx = operation

    @property
    def is_pipelined(self) -> bool:
        """True if a step goes through `run_pipeline` instead of forward and `backward`."""
        return self.settings.pp_size > 1

    def run_pipeline(
        self,
        inputs: dict[str, Any],
        *,
        more_inputs: Callable[[int], dict[str, Any]],
        criterion: Callable[[Any, int], Any],
    ) -> float:
        """Forward and backward of a step's samples through all stages, `microbatch_size` samples at a time.

        Where gradients are switched off, forward alone.

        Args:
            inputs: the model's keyword arguments, tensors of (samples, ...).
            more_inputs: called on every stage, before it computes, with the number of the microbatch, from 0; gives
                more keyword arguments.
            criterion: called on the last stage with the model's outputs and that number; gives the loss to add.

        Returns:
            The sum of the losses, on every stage.
        """
        import torch
        import torch.distributed as dist

        scheduler = self._plugin.scheduler
        # It holds to the size of the first step, and the last one of an epoch may be smaller.
        scheduler.num_microbatches = scheduler.last_batch_size = None
        forwards, losses = itertools.count(), itertools.count()

        def add_inputs(_, args, inputs):
            return args, {**inputs, **more_inputs(next(forwards))}

        def loss_to_add(outputs, _):
            # ColossalAI takes the mean of the microbatches' losses.
            return criterion(outputs, next(losses)) * scheduler.num_microbatches

        # Without gradients there are none to exchange, which ColossalAI would do all the same.
        trains = torch.is_grad_enabled()
        optimizer, exchanging = (self.optimizer, contextlib.nullcontext()) if trains else (None, self.model.no_sync())
        handle = self.unwrapped_model.register_forward_pre_hook(add_inputs, with_kwargs=True)
        try:
            with exchanging:
                outputs = self._booster.execute_pipeline(iter([inputs]), self.model, loss_to_add, optimizer)
        finally:
            handle.remove()
        known = outputs["loss"] is not None
        loss = torch.tensor(float(outputs["loss"]) if known else 0.0, dtype=torch.float64, device=self.device)
        dist.all_reduce(loss, group=self._plugin.pp_group)
        return float(loss)

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager:
        """A context for forward and `backward`, in which ranks exchange no gradients before the `last` of a step."""
        # ZeRO stage 2 and Gemini split gradients as they come.
        waits = not last and self._kind.is_hybrid and self.settings.zero_stage < 2
        return self._booster.no_sync(self.model, self.optimizer) if waits else contextlib.nullcontext()

    def backward(self, loss) -> None:
        """Accumulate the gradients of a loss."""
        self._booster.backward(loss, self.optimizer)

    def step(self, *, update: bool = True) -> float | None:
        """Clip, update the parameters, clear the gradients.

        Without `update`, and where the norm is no number, parameters and moments stay as they are.

        Returns:
            The gradient norm before clipping, or None if fp16 overflowed: no update was made, and the loss scale is
            half of what it was, but for 1, which is the lowest.
        """
        self.optimizer.optim.may_update = update
        self.used_loss_scale = loss_scale.scale_of(self.optimizer)
        # Every plugin keeps the norm of its last step in this attribute; a skipped step leaves it as it was.
        self.optimizer._current_grad_norm = None
        self.optimizer.step()
        if self._kind.is_gemini:
            bug_fixes.forget_skipped(self.model)
        self.optimizer.zero_grad()
        norm = self.optimizer.get_grad_norm()
        if norm is None and self._kind.needs_moments:
            _begin_moments(self.optimizer.optim, without_gradient=True)
        # ColossalAI measures the norm before it divides the loss scale out.
        return None if norm is None else float(norm) / self.used_loss_scale

    @property
    def next_loss_scale(self) -> float:
        """The loss scale of the next backward pass; 1 in other precisions than fp16."""
        return loss_scale.scale_of(self.optimizer)

    def remember_loss_scale(self) -> loss_scale.ScalerState | None:
        """The state of fp16's loss scale, for `put_back_loss_scale`; None in other precisions."""
        return loss_scale.remember(self.optimizer)

    def put_back_loss_scale(self, state: loss_scale.ScalerState | None) -> None:
        """Undo what steps have done to the loss scale since it was in this state."""
        loss_scale.put_back(self.optimizer, state)

    @property
    def pins_batches(self) -> bool:
        """Whether batches should lie in page-locked memory, from which a GPU copies while it works."""
        return self.device.type == "cuda"

    def sum_over_data(self, values: Sequence[float], *, known_to_host: bool = False) -> list[float]:
        """Sum numbers over the ranks that see different data (float64); of ranks that see the same, their mean.

        All ranks take part, so that a number that is NaN, or not zero, on one of them is so in the sum that each gets.
        Numbers that are `known_to_host` are summed by the hosts alone, which wait for no work of a GPU.
        """
        import torch
        import torch.distributed as dist

        on_host = known_to_host and self._host_group is not None
        total = torch.tensor(values, dtype=torch.float64, device="cpu" if on_host else self.device)
        dist.all_reduce(total, group=self._host_group if on_host else None)
        return (total / (self.world_size // self.data_size)).tolist()

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        import torch.distributed as dist

        dist.barrier()

    @contextlib.contextmanager
    def first_rank_only(self) -> Iterator[bool]:
        """Yield True on rank 0, let no rank go on before rank 0 is done, and let all fail if it fails."""
        with collectives.all_or_none():
            yield self.rank == 0

    def save_model(self, folder: str) -> None:
        """Write the weights of the whole model as sharded safetensors. Called on all ranks."""
        from colossal_llama2.engine.patches import checkpoint_io

        ties_embeddings = self.unwrapped_model.config.tie_word_embeddings
        if self._kind.is_gemini:
            bug_fixes.refresh_offloaded(self.optimizer)
        with collectives.all_or_none(), checkpoint_io.weights_alone(ties_embeddings=ties_embeddings):
            self._booster.save_model(self.model, folder, shard=True, size_per_shard=4096, use_safetensors=True)
        with self.first_rank_only() as first:
            if first:
                checkpoint_io.rename_model_shards(folder)

    def save_optimizer(self, folder: str) -> None:
        """Write the optimizer's state as safetensors and JSON. Called on all ranks."""
        from colossal_llama2.engine.patches import checkpoint_io

        with collectives.all_or_none(), checkpoint_io.safetensors_instead_of_pickle():
            self._booster.save_optimizer(self.optimizer, folder, shard=True, size_per_shard=4096)
        with self.first_rank_only() as first:
            if first:
                checkpoint_io.rename_optimizer_shards(folder)

    def save_masters(self, folder: str) -> None:
        """Write the float32 weights behind half-precision ones, a file per rank. Called on all ranks."""
        from colossal_llama2.engine import resume_state

        with collectives.all_or_none():
            resume_state.save_masters(self, folder)

    def load_masters(self, folder: str) -> None:
        """Read what `save_masters` wrote on the same layout, after the rounded weights. Called on all ranks."""
        from colossal_llama2.engine import resume_state

        with collectives.all_or_none():
            resume_state.load_masters(self, folder)

    def load_optimizer(self, folder: str) -> None:
        """Read what `save_optimizer` wrote, by any plugin on any number of ranks. Called on all ranks.

        The settings of this run hold on, such as its weight decay; ColossalAI would take those of the file.
        """
        from colossal_llama2.engine.patches import checkpoint_io

        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        # No plugin lets ranks talk to each other while it reads.
        with collectives.all_or_none():
            checkpoint_io.read_optimizer_index(Path(folder))
            with checkpoint_io.safetensors_instead_of_pickle(step_as_tensor=self._kind.is_gemini):
                self._booster.load_optimizer(self.optimizer, folder)
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay


def _begin_moments(adam, *, without_gradient: bool = False) -> None:
    """Give Adam's moments the values that they have before the first update, without which none can be saved."""
    import torch

    for param in (param for group in adam.param_groups for param in group["params"]):
        if (param.grad is not None or without_gradient) and not adam.state[param]:
            moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[param].update(step=0, **moments)


def _order_layers_by_use(model) -> None:
    """Register the modules of each layer in the order in which they compute.

    Gemini fills its chunks in the order of registration, which has both norms of a layer behind its matrices. If a
    chunk ends between them, the next one would be gathered for a norm, let go for the matrices, and gathered again.
    Names stay, and so does the order of the matrices, and of the norms, by which the optimizer numbers them.
    """
    for layer in model.model.layers:
        for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
            module = getattr(layer, name)
            delattr(layer, name)
            setattr(layer, name, module)


def _parameter_groups(model, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, which decay, and norms, which do not."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    if not trainable:
        raise UserError("no parameter of the model is trainable")
    groups = [
        {"params": [param for param in trainable if param.dim() > 1], "weight_decay": weight_decay},
        {"params": [param for param in trainable if param.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
