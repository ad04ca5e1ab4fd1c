"""ColossalAI's plugins, one class each: how to build it, what it refuses, and what it needs around boosting and steps.

To add a plugin, name it in plugin_names.py and write a subclass of Plugin here, and in train/forecast/memory.py, if no
ZeRO stage describes how it keeps weights, a class that forecasts its memory.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from colossal_llama2 import logs, plugin_names
from colossal_llama2.engine import adam, loss_scale
from colossal_llama2.engine.llama_policy import llama_policy
from colossal_llama2.engine.patches import batched_operations, bug_fixes, chunk_loading, gathered_states
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.engine.settings import EngineSettings


@dataclass(frozen=True)
class Groups:
    """The process groups of a plugin's mesh, and this rank's place in a pipeline.

    Attributes:
        data: ranks that see different samples; None: all ranks.
        tensor, sequence, pipeline: ranks that share layers, samples, the stack of layers; None where nothing is shared.
    """

    data: Any = None
    tensor: Any = None
    sequence: Any = None
    pipeline: Any = None
    is_first_stage: bool = True
    is_last_stage: bool = True


class Plugin:
    """A plugin with the settings of a run. The base class has the answers of a plugin that needs nothing special.

    Attributes:
        name: the plugin's name in --plugin.
        is_lazy: the model may be initialized without weights, which are read once it is split over the ranks.
        offloaded: parts of the memory forecast that are in the host's memory.
        saves_step_as_tensor: its checkpoint code expects each parameter's Adam step as a tensor, not a number.
        is_replicated: every rank holds the whole model and optimizer, the same on all of them.
    """

    name: str
    is_lazy = False
    offloaded: tuple[str, ...] = ()
    saves_step_as_tensor = False
    is_replicated = False

    def __init__(self, settings: EngineSettings):
        self.settings = settings

    @property
    def zero_stage(self) -> int:
        """What data-parallel ranks split: 0 nothing, 1 the optimizer, 2 gradients too, 3 weights too."""
        raise NotImplementedError

    @property
    def replaces_attention(self) -> bool:
        """True if ColossalAI's fused attention replaces that of transformers, which cannot split a sample."""
        return False

    def problems(self) -> list[str]:
        """The settings that this plugin does not support: one sentence each for users, so it names their flags."""
        settings, problems = self.settings, []
        hybrid = plugin_names.HYBRID_3D
        if settings.tp_size > 1:
            problems.append(f"--tp {settings.tp_size} needs --plugin {hybrid}, {self.name} has no tensor parallelism")
        if settings.pp_size > 1:
            problems.append(f"--pp {settings.pp_size} needs --plugin {hybrid}, {self.name} has no pipeline")
        if settings.sp_mode is not None:
            problems.append(
                f"--enable_sequence_parallelism needs --plugin {hybrid}, {self.name} does not split samples"
            )
        return problems

    def arguments(self, *, parameters: int, on_cpu: bool) -> dict[str, Any]:
        """Keyword arguments of ColossalAI's plugin class for a model of that many parameters."""
        return self.precision_arguments()

    def precision_arguments(self) -> dict[str, Any]:
        """Keyword arguments for precision, clipping and the loss scale, which all of ColossalAI's optimizers share."""
        # An infinite bound clips nothing, and unlike 0 still makes the plugin compute the norm, which is logged. Gemini
        # on a GPU needs it: it frees an accumulating chunk while another stream copies from it (chunk.py:556), and only
        # the host's wait for the norm prevents that this memory is reused too early.
        max_norm = self.settings.max_norm or math.inf
        return {
            "precision": self.settings.precision,
            "max_norm": max_norm,
            "initial_scale": loss_scale.INITIAL_SCALE,
            "hysteresis": loss_scale.HYSTERESIS,
        }

    def install_fixes(self) -> None:
        """Apply the fixes of attributes of ColossalAI that this plugin needs. Called before `build`."""

    def build(self, *, parameters: int, on_cpu: bool) -> Any:
        """ColossalAI's plugin object. Called on all ranks."""
        raise NotImplementedError

    def groups(self, built: Any) -> Groups:
        """The process groups of what `build` returned."""
        return Groups()

    def before_boost(self, model, optimizer) -> None:
        """Prepare a loaded model and its HybridAdam."""

    def optimizer_to_boost(self, model, optimizer) -> Any:
        """The HybridAdam itself, or a wrapper of it where boosting adds none that clips and has master weights."""
        return optimizer

    def after_boost(self, model, optimizer) -> None:
        """Finish the boosted model and optimizer. Called on all ranks."""

    def after_step(self, model, optimizer, *, norm: Any) -> None:
        """Called after each step and `zero_grad`; `norm` is None if the step was skipped since fp16 overflowed."""

    def evaluating(self, model) -> contextlib.AbstractContextManager:
        """A context for forward passes without gradients, which have no effect on training."""
        return contextlib.nullcontext()

    def before_saving_model(self, optimizer) -> None:
        """Called on all ranks before the boosted model is saved."""

    def master_weights(self, optimizer) -> list[Any]:
        """This rank's float32 weights, flat or shaped, in the optimizer's order. They can be changed in place."""
        return [param.data for group in optimizer.optim.param_groups for param in group["params"]]

    def layout(self) -> dict[str, Any]:
        """What decides which part of the master weights a rank holds, besides the settings."""
        return {}


class Gemini(Plugin):
    """GeminiPlugin: parameters in chunks, gathered around an operation. Half precision only; clips inside Adam."""

    name = plugin_names.GEMINI
    is_lazy = True
    saves_step_as_tensor = True
    zero_stage = 3
    policy = "static"
    # Chunks gathered while the one before is in use.
    prefetched = 1
    # Chunks have at least this many million elements, and Gemini never shards a model that is smaller.
    min_chunk_m = 32.0
    # Even a small model has this many chunks.
    least_chunks = 8

    def problems(self) -> list[str]:
        problems = []
        if self.settings.precision == "fp32":
            problems.append(
                f"--plugin {self.name} trains in fp16 or bf16, --mixed_precision fp32 needs ddp, zero2 or 3d"
            )
        return problems + super().problems()

    def arguments(self, *, parameters: int, on_cpu: bool) -> dict[str, Any]:
        chunk_m = min(self.min_chunk_m, parameters / 2**20 / self.least_chunks)
        return {
            **super().arguments(parameters=parameters, on_cpu=on_cpu),
            "placement_policy": self.policy,
            "enable_gradient_accumulation": self.settings.accumulation_steps > 1,
            "min_chunk_size_m": chunk_m,
            "search_range_m": chunk_m,
            "max_prefetch": self.prefetched,
            # Asynchronous reduction pins host memory, which needs a GPU, and frees tensors that are being sent.
            "enable_async_reduce": not on_cpu,
        }

    def install_fixes(self) -> None:
        bug_fixes.install_for_gemini()
        gathered_states.install_for_gemini()
        chunk_loading.install()

    def build(self, *, parameters: int, on_cpu: bool) -> Any:
        from colossalai.booster.plugin import GeminiPlugin

        return GeminiPlugin(**self.arguments(parameters=parameters, on_cpu=on_cpu))

    def before_boost(self, model, optimizer) -> None:
        bug_fixes.clip_in_bf16(optimizer)
        _order_layers_by_use(model)

    def after_boost(self, model, optimizer) -> None:
        bug_fixes.agree_on_memory(model)

    def after_step(self, model, optimizer, *, norm: Any) -> None:
        bug_fixes.forget_skipped(model)

    @contextlib.contextmanager
    def evaluating(self, model) -> Iterator[None]:
        """Gather weights for a forward pass without backward, and restore what Gemini has recorded of a step."""
        manager = model.gemini_manager
        # Gemini records the operations of its first step. It would prefetch for backward at the end of forward.
        policy = manager.placement_policy
        before, policy.max_prefetch = policy.max_prefetch, 0
        # Automatic placement also records and counts the memory of each operation of a step.
        collector = manager._mem_stats_collector
        operation = None if collector is None else collector._step_idx
        # Before that step, automatic placement refuses a pass without gradients.
        needs_step = manager.need_warmup and manager.is_warmup()
        try:
            with bug_fixes.gathered_weights(model) if needs_step else contextlib.nullcontext():
                yield
        finally:
            policy.max_prefetch = before
            if collector is not None:
                collector._step_idx = operation

    def before_saving_model(self, optimizer) -> None:
        bug_fixes.refresh_offloaded(optimizer)

    def master_weights(self, optimizer) -> list[Any]:
        # The float32 chunk beside the half-precision one; Adam's parameters are ranges of it, empty between steps.
        ranges = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                begin, end = optimizer.param_to_range[param]
                ranges.append(optimizer.param_to_chunk16[param].paired_chunk.payload[begin:end])
        return ranges

    def layout(self) -> dict[str, Any]:
        # Which weights are in a chunk, and so what part of them a rank holds (_order_layers_by_use).
        return {"chunks": "layers by use"}


class GeminiAuto(Gemini):
    """Gemini with automatic placement: chunks move to the host when the device runs out of memory."""

    name = plugin_names.GEMINI_AUTO
    policy = "auto"
    # The chunk gathered last is not counted in what is free (placement_policy.py:210), so a prefetching step could run
    # out of memory.
    prefetched = 0
    offloaded = ("master weights", "optimizer")


class Zero2(Plugin):
    """LowLevelZeroPlugin at stage 2: optimizer and gradients are split over the ranks."""

    name = plugin_names.ZERO2
    zero_stage = 2
    cpu_offload = False

    def arguments(self, *, parameters: int, on_cpu: bool) -> dict[str, Any]:
        return {
            **super().arguments(parameters=parameters, on_cpu=on_cpu),
            "stage": self.zero_stage,
            # Overlapping records tensors on a CUDA stream.
            "overlap_communication": not on_cpu,
            "cpu_offload": self.cpu_offload,
        }

    def install_fixes(self) -> None:
        batched_operations.install()
        gathered_states.install_for_zero2()

    def build(self, *, parameters: int, on_cpu: bool) -> Any:
        from colossalai.booster.plugin import LowLevelZeroPlugin

        return LowLevelZeroPlugin(**self.arguments(parameters=parameters, on_cpu=on_cpu))

    def after_boost(self, model, optimizer) -> None:
        bug_fixes.fill_buckets(optimizer)

    def after_step(self, model, optimizer, *, norm: Any) -> None:
        # ColossalAI cannot save an optimizer that has made no update, as where fp16 overflows from the first step on.
        if norm is None:
            adam.begin_moments(optimizer.optim, without_gradient=True)


class Zero2Cpu(Zero2):
    """ZeRO stage 2 with the optimizer in the host's memory."""

    name = plugin_names.ZERO2_CPU
    cpu_offload = True
    offloaded = ("master weights", "optimizer")


class Hybrid3D(Plugin):
    """HybridParallelPlugin: ranks in a mesh, whose axes share layers, samples or the stack of layers.

    ZeRO, at a stage of the user's choice, is along the data axis.
    """

    name = plugin_names.HYBRID_3D
    is_lazy = True

    @property
    def zero_stage(self) -> int:
        return self.settings.zero_stage

    @property
    def replaces_attention(self) -> bool:
        return self.settings.use_flash_attn or self.settings.sp_mode is not None

    def problems(self) -> list[str]:
        if self.settings.precision != "fp32" or self.settings.zero_stage == 0:
            return []
        return [
            f"--plugin {self.name} with --mixed_precision fp32 needs --zero 0, since its ZeRO trains in fp16 or bf16"
        ]

    def arguments(self, *, parameters: int, on_cpu: bool, fused_norm: bool = False) -> dict[str, Any]:
        settings = self.settings
        arguments = super().arguments(parameters=parameters, on_cpu=on_cpu)
        arguments.update(
            tp_size=settings.tp_size,
            pp_size=settings.pp_size,
            zero_stage=settings.zero_stage,
            # Its other attention keeps a matrix of length x length for each head.
            enable_flash_attention=self.replaces_attention,
            enable_fused_normalization=fused_norm,
            overlap_communication=not on_cpu,
            # Buffers are those of rotary positions, which each rank computes for itself.
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

    def install_fixes(self) -> None:
        bug_fixes.install_for_3d()
        batched_operations.install()
        gathered_states.install_for_3d()

    def build(self, *, parameters: int, on_cpu: bool) -> Any:
        from colossalai.booster.plugin import HybridParallelPlugin

        # On all ranks or on none: copies of a norm that are computed by two implementations would diverge.
        fused_norm = not on_cpu and not collectives.any_rank(not has_apex_norm())
        if fused_norm:
            logs.get_logger().info("Norms: fused, by apex")
        arguments = self.arguments(parameters=parameters, on_cpu=on_cpu, fused_norm=fused_norm)
        return HybridParallelPlugin(custom_policy=llama_policy(), **arguments)

    def groups(self, built: Any) -> Groups:
        settings = self.settings
        pipelined = settings.pp_size > 1
        return Groups(
            data=built.dp_group,
            tensor=built.tp_group if settings.tp_size > 1 else None,
            sequence=built.sp_group if settings.sp_mode == "all_to_all" else None,
            pipeline=built.pp_group if pipelined else None,
            is_first_stage=not pipelined or built.stage_manager.is_first_stage(),
            is_last_stage=not pipelined or built.stage_manager.is_last_stage(),
        )

    def before_boost(self, model, optimizer) -> None:
        if self.replaces_attention:
            from colossal_llama2.engine.patches import document_attention

            document_attention.install(use_flash_attn=self.settings.use_flash_attn)

    def after_boost(self, model, optimizer) -> None:
        if self.zero_stage > 0:
            bug_fixes.fill_buckets(optimizer)


class Ddp(Plugin):
    """TorchDDPPlugin: every rank has the whole model, and DistributedDataParallel averages the gradients.

    It is ColossalAI's one plugin that leaves the optimizer as it is: without clipping and, in half precision, without
    master weights. MixedPrecisionOptimizer has both; 3d uses it where it has no ZeRO.
    """

    name = plugin_names.DDP
    zero_stage = 0
    is_replicated = True

    def install_fixes(self) -> None:
        batched_operations.install()

    def build(self, *, parameters: int, on_cpu: bool) -> Any:
        from colossalai.booster.plugin import TorchDDPPlugin

        # Buffers are those of rotary positions, which each rank computes for itself. Gradients are views of the buckets
        # in which they are averaged; otherwise each rank would hold all of them twice.
        return TorchDDPPlugin(broadcast_buffers=False, gradient_as_bucket_view=True)

    def optimizer_to_boost(self, model, optimizer) -> Any:
        from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
        from colossalai.utils import get_current_device

        # Boosting moves the model as well, but master weights are made now, beside the weights.
        model.to(get_current_device())
        arguments = self.precision_arguments()
        if self.settings.precision == "fp32":
            # Float32 weights are their own masters, and the gradients of bf16 are those that it does not scale.
            arguments["precision"] = "bf16"
        return MixedPrecisionOptimizer(optimizer, **arguments)

    def after_step(self, model, optimizer, *, norm: Any) -> None:
        # As for ZeRO: an optimizer that has made no update has no state to save.
        if norm is None:
            adam.begin_moments(optimizer.optim, without_gradient=True)


PLUGINS: dict[str, type[Plugin]] = {
    plugin.name: plugin for plugin in (Gemini, GeminiAuto, Zero2, Zero2Cpu, Hybrid3D, Ddp)
}


def plugin_of(settings: EngineSettings) -> Plugin:
    """The plugin that these settings name."""
    return PLUGINS[settings.plugin](settings)


def has_apex_norm() -> bool:
    """True if there is a GPU, and apex with its compiled RMSNorm, which ColossalAI can use instead of the model's."""
    import importlib

    import torch

    if not torch.cuda.is_available():
        return False
    try:
        norms = importlib.import_module("apex.normalization")
        importlib.import_module("fused_layer_norm_cuda")
    except Exception:
        # A package compiled for another PyTorch fails in many ways.
        return False
    return hasattr(norms, "FusedRMSNorm")


def _order_layers_by_use(model) -> None:
    """Register the modules of each layer in the order in which they compute.

    Gemini fills its chunks in the order of registration, in which both norms of a layer follow its matrices. If a chunk
    ended between them, the next one would be gathered for a norm, released for the matrices, and gathered again.
    Names stay the same, and so does the order among matrices and among norms, by which the optimizer numbers them.
    """
    for layer in model.model.layers:
        for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
            module = getattr(layer, name)
            delattr(layer, name)
            setattr(layer, name, module)
