"""A model split over ranks by ColossalAI's Booster and one of its plugins, behind the few calls that a loop needs."""

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2.engine import adam, loss_scale, resume_state
from colossal_llama2.engine.chunked_loss import HeadPart, use_chunked_loss, uses_liger
from colossal_llama2.engine.loss_tally import LossTally
from colossal_llama2.engine.next_tokens import choosing_head, scoring_head
from colossal_llama2.engine.patches import bug_fixes, lazy_loading
from colossal_llama2.engine.plugins import plugin_of
from colossal_llama2.engine.process_group import current_device
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.model.documents import MaskForm, attention_inputs
from colossal_llama2.model.loading import dtype_of
from colossal_llama2.storage.unpickling_guard import unpickling_refused

if TYPE_CHECKING:
    from colossal_llama2.dataset.read.batch import Batch


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
        self.plugin = plugin_of(settings)
        self.plugin.install_fixes()
        self._built = self.plugin.build(parameters=parameters, on_cpu=not torch.cuda.is_available())
        self._booster = Booster(plugin=self._built)
        self._groups = self.plugin.groups(self._built)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # If the ranks communicate through GPUs, another group for their hosts.
        self._host_group = dist.new_group(backend="gloo") if self.pins_batches else None
        data_group = self._groups.data
        self.data_rank, self.data_size = dist.get_rank(data_group), dist.get_world_size(data_group)
        self.model: Any = None
        self.optimizer: Any = None
        # The loss scale of the last `step`.
        self.used_loss_scale = 1.0
        self.loss_tally = LossTally(self.device, unfed=self._reason_without_token_losses_on_any_rank())

    def initializing(self, *, ties_embeddings: bool) -> contextlib.AbstractContextManager:
        """A context for loading the model: lazy if the plugin can shard it before a rank has all of it."""
        # The last stage of a pipeline would drop the embeddings before it has read the head tied to them. An adapter
        # has weights that are in no file.
        is_adapter = self.settings.trainable.adapter is not None
        if not self.plugin.is_lazy or is_adapter or (ties_embeddings and self.is_pipelined):
            return contextlib.nullcontext()
        from colossalai.lazy import LazyInitContext

        lazy_loading.install()
        return LazyInitContext(default_device=self.device)

    def boost(self, model) -> None:
        """Split a loaded transformers model over the ranks and make its optimizer. Called once, on all ranks."""
        trainable = self.settings.trainable
        weight_decay = self.settings.weight_decay if trainable.decays else 0.0
        optimizer = adam.make_adam(model, learning_rate=self.settings.learning_rate, weight_decay=weight_decay)
        self.plugin.before_boost(model, optimizer)
        optimizer = self.plugin.optimizer_to_boost(model, optimizer)
        # A model that was initialized lazily is read from its files now.
        with unpickling_refused(), bug_fixes.unrounded_buffers(model):
            self.model, self.optimizer, *_ = self._booster.boost(model, optimizer)
        self.plugin.after_boost(self.model, self.optimizer)
        adam.guard_updates(self.optimizer)
        if self._groups.is_first_stage:
            embedding = self.unwrapped_model.get_input_embeddings()
            trainable.prepare_embedding(embedding, vocab_size=model.config.vocab_size)
        if self.settings.chunked_loss != "off" and self._groups.is_last_stage:
            use_chunked_loss(
                self.unwrapped_model,
                self._head_part(model.config.vocab_size),
                sample_group=self._groups.sequence,
                record=self.loss_tally.add,
            )
        # Lazy loading leaves reference cycles that hold whole weights until a garbage collection (64 MB of 85 M
        # parameters, measured).
        gc.collect()

    def _reason_without_token_losses_on_any_rank(self) -> str | None:
        """The reason of this rank or of another one: either all ranks sum by group or none. Called on all ranks."""
        reason = self._reason_without_token_losses()
        if collectives.any_rank(reason is not None) and reason is None:
            return "Liger's kernel, installed on other hosts, returns only the sum over all tokens"
        return reason

    def _reason_without_token_losses(self) -> str | None:
        if self.is_pipelined:
            return "pipeline stages exchange only the loss of whole samples"
        if self.settings.chunked_loss == "off":
            return "--chunked_loss off returns only the mean over all tokens"
        # As in the chunked loss: Liger's kernel needs the whole head, all of it trained.
        is_whole = self._groups.tensor is None and self.settings.trainable.rows is None
        if is_whole and uses_liger(self.device, dtype_of(self.settings.precision)):
            return "Liger's kernel returns only the sum over all tokens"
        return None

    @property
    def unwrapped_model(self):
        """The transformers model inside the plugin's wrapper; under 3d its layers hold this rank's shards."""
        return self.model.unwrap()

    def _head_part(self, vocab_size: int) -> HeadPart:
        if self._groups.tensor is None:
            return HeadPart(first_token=0, rows=vocab_size, trained=self.settings.trainable.rows)
        import torch.distributed as dist

        # The ranks hold the same number of rows; the last ones pad the vocabulary.
        rows = len(self.unwrapped_model.lm_head.weight)
        first = dist.get_rank(self._groups.tensor) * rows
        return HeadPart(
            first_token=first,
            rows=min(max(vocab_size - first, 0), rows),
            group=self._groups.tensor,
            trained=self.settings.trainable.rows,
        )

    def attention_inputs(self, batch: "Batch") -> dict[str, Any]:
        """The model's keyword arguments for attention: which tokens of a batch see which."""
        form = MaskForm.BLOCKS
        if self.plugin.replaces_attention:
            form = MaskForm.NUMBERS
        elif self.unwrapped_model.config._attn_implementation == "flash_attention_2":
            form = MaskForm.BORDERS
        dtype = dtype_of(self.settings.precision)
        shape = tuple(batch.input_ids.shape)
        return attention_inputs(
            batch.attention_mask, batch.documents, form=form, dtype=dtype, device=self.device, shape=shape
        )

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context for forward passes without gradients, which have no effect on training."""
        import torch

        self.model.eval()
        try:
            with torch.no_grad(), self.plugin.evaluating(self.model):
                yield
        finally:
            self.model.train()

    def choosing_next(self, places: Callable[[], Any]) -> contextlib.AbstractContextManager:
        """A context in which the model, without labels, returns the most likely next tokens, see `choosing_head`."""
        return self._asking_head(choosing_head, places)

    def scoring_next(self, asked: Callable[[], Any]) -> contextlib.AbstractContextManager:
        """A context in which the model, without labels, returns the logits of some next tokens, see `scoring_head`."""
        return self._asking_head(scoring_head, asked)

    def _asking_head(self, head: Callable[..., Any], asked: Callable[[], Any]) -> contextlib.AbstractContextManager:
        if not self._groups.is_last_stage:
            return contextlib.nullcontext()
        model = self.unwrapped_model
        return head(model, self._head_part(model.config.vocab_size), asked, sample_group=self._groups.sequence)

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

        Only forward if gradients are switched off.

        Args:
            inputs: the model's keyword arguments, tensors of (samples, ...).
            more_inputs: called on every stage, before it computes, with the number of the microbatch, from 0; returns
                more keyword arguments.
            criterion: called on the last stage with the model's outputs and that number; returns the loss to add.

        Returns:
            The sum of the losses, on every stage.
        """
        import torch
        import torch.distributed as dist

        scheduler = self._built.scheduler
        # The scheduler keeps the size of the first step, and the last step of an epoch may be smaller.
        scheduler.num_microbatches = scheduler.last_batch_size = None
        forwards, losses = itertools.count(), itertools.count()

        def add_inputs(_, args, inputs):
            return args, {**inputs, **more_inputs(next(forwards))}

        def loss_to_add(outputs, _):
            # ColossalAI averages the microbatches' losses.
            return criterion(outputs, next(losses)) * scheduler.num_microbatches

        # ColossalAI would exchange gradients even if there are none.
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
        dist.all_reduce(loss, group=self._groups.pipeline)
        return float(loss)

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager:
        """A context for forward and `backward`, in which gradients are not exchanged before the `last` of a step."""
        # From ZeRO stage 2 on, gradients are split as they arrive.
        waits = not last and self.plugin.zero_stage < 2
        return self._booster.no_sync(self.model, self.optimizer) if waits else contextlib.nullcontext()

    def backward(self, loss) -> None:
        """Accumulate the gradients of a loss."""
        self._booster.backward(loss, self.optimizer)

    def step(self, *, update: bool = True) -> float | None:
        """Clip, update the parameters, clear the gradients.

        Without `update`, and where the norm is NaN or Inf, parameters and moments stay as they are.

        Returns:
            The gradient norm before clipping. None if fp16 overflowed: no update was made, and the loss scale was
            halved, to no less than 1.
        """
        self.optimizer.optim.may_update = update
        self.used_loss_scale = loss_scale.scale_of(self.optimizer)
        # Every plugin keeps the norm of its last step in this attribute; a skipped step leaves it as it was.
        self.optimizer._current_grad_norm = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        norm = self.optimizer.get_grad_norm()
        self.plugin.after_step(self.model, self.optimizer, norm=norm)
        # ColossalAI's norm still includes the loss scale.
        return None if norm is None else float(norm) / self.used_loss_scale

    @property
    def next_loss_scale(self) -> float:
        """The loss scale of the next backward pass; 1 in other precisions than fp16."""
        return loss_scale.scale_of(self.optimizer)

    def remember_loss_scale(self) -> loss_scale.ScalerState | None:
        """The state of fp16's loss scale, for `put_back_loss_scale`; None in other precisions."""
        return loss_scale.remember(self.optimizer)

    def put_back_loss_scale(self, state: loss_scale.ScalerState | None) -> None:
        """Restore a state that `remember_loss_scale` returned."""
        loss_scale.put_back(self.optimizer, state)

    @property
    def pins_batches(self) -> bool:
        """Whether batches should be in page-locked memory, from which a GPU copies while it computes."""
        return self.device.type == "cuda"

    def max_over_stages(self, values: Any) -> Any:
        """The elementwise maximum of a tensor over the stages of the pipeline; itself without one."""
        import torch.distributed as dist

        if self._groups.pipeline is not None:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._groups.pipeline)
        return values

    def sum_over_data(self, values: Sequence[float], *, known_to_host: bool = False) -> list[float]:
        """Sum numbers over the data-parallel ranks, in float64; ranks that see the same data are averaged.

        All ranks take part, so a NaN or a nonzero number of one rank is in every rank's sum. Numbers that are
        `known_to_host` are summed by the hosts, which do not wait for the GPUs.
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
        """Yield True on rank 0. No rank continues before rank 0 is done, and all fail if it fails."""
        with collectives.all_or_none():
            yield self.rank == 0

    def save_model(self, folder: str) -> None:
        """Write the weights of the whole model as sharded safetensors, or its adapter as one file.

        Called on all ranks.
        """
        from colossal_llama2.engine.patches import checkpoint_io

        trainable, ties_embeddings = self.settings.trainable, self.unwrapped_model.config.tie_word_embeddings
        is_adapter = trainable.adapter is not None
        shard_mib = checkpoint_io.ONE_SHARD if is_adapter else checkpoint_io.SHARD_MIB
        self.plugin.before_saving_model(self.optimizer)
        with collectives.all_or_none():
            with checkpoint_io.weights_alone(ties_embeddings=ties_embeddings, saved_name=trainable.saved_name):
                self._booster.save_model(self.model, folder, shard=True, size_per_shard=shard_mib, use_safetensors=True)
        with self.first_rank_only() as first:
            if first:
                rename = checkpoint_io.rename_adapter if is_adapter else checkpoint_io.rename_model_shards
                rename(folder)

    def save_optimizer(self, folder: str) -> None:
        """Write the optimizer's state as safetensors and JSON. Called on all ranks."""
        from colossal_llama2.engine.patches import checkpoint_io

        with collectives.all_or_none(), checkpoint_io.safetensors_instead_of_pickle():
            self._booster.save_optimizer(self.optimizer, folder, shard=True, size_per_shard=checkpoint_io.SHARD_MIB)
        with self.first_rank_only() as first:
            if first:
                checkpoint_io.rename_optimizer_shards(folder)

    def save_masters(self, folder: str) -> None:
        """Write the float32 copies of half-precision weights, a file per rank. Called on all ranks."""
        with collectives.all_or_none():
            resume_state.save_masters(self, folder)

    def load_masters(self, folder: str) -> None:
        """Restore what `save_masters` wrote on the same layout, over the rounded weights. Called on all ranks."""
        with collectives.all_or_none():
            resume_state.load_masters(self, folder)

    def load_optimizer(self, folder: str) -> None:
        """Read what `save_optimizer` wrote, by any plugin on any number of ranks. Called on all ranks.

        This run's settings, such as its weight decay, stay; ColossalAI would use those of the file.
        """
        from colossal_llama2.engine.patches import checkpoint_io

        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        # No plugin communicates while it reads.
        with collectives.all_or_none():
            checkpoint_io.read_optimizer_index(Path(folder))
            with checkpoint_io.safetensors_instead_of_pickle(step_as_tensor=self.plugin.saves_step_as_tensor):
                self._booster.load_optimizer(self.optimizer, folder)
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
