"""How --plugin 3d splits a LLaMA: the policy that ColossalAI's HybridParallelPlugin takes as `custom_policy`.

It is what ColossalAI's LlamaForCausalLMPolicy (shardformer/policies/llama.py) does for the plugin's settings that the
suite has, with the forward pass of llama_forward.py, so that any transformers will do.
"""

import functools
from typing import Any

from colossal_llama2.engine import llama_forward
from colossal_llama2.engine.llama_forward import SHARING_TENSOR_RANKS, Stage

# The matrices of a layer, by what tensor parallelism splits.
SPLIT_BY_OUTPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
SPLIT_BY_INPUTS = ("self_attn.o_proj", "mlp.down_proj")


def llama_policy() -> Any:
    """A policy for one LlamaForCausalLM."""
    from colossalai.shardformer.policies.base_policy import Policy

    class LlamaPolicy(_LlamaRules, Policy):
        """The rules below, in the class that ColossalAI expects."""

    return LlamaPolicy()


class _LlamaRules:
    """What the sharder asks, in the order of these methods. Modules are found by the names of their classes."""

    model: Any
    shard_config: Any
    pipeline_stage_manager: Any

    def config_sanity_check(self) -> None:
        """Nothing is left to check: settings and model were compared before."""

    def preprocess(self) -> Any:
        """Called before anything is replaced, on the whole model."""
        self._ties_embeddings = self.model.get_input_embeddings().weight is self.model.get_output_embeddings().weight
        for layer in self.model.model.layers:
            # `hidden_states_of` recomputes layers. Those of later versions of transformers would do it once more.
            layer.gradient_checkpointing = False
        return self.model

    def get_shared_params(self) -> list[dict[int, Any]]:
        """Tied embeddings, which the first and the last stage of a pipeline both hold, by stage."""
        stages = self.pipeline_stage_manager
        if stages is None or stages.num_stages == 1 or not self._ties_embeddings:
            return []
        return [{0: self.model.model.embed_tokens.weight, stages.num_stages - 1: self.model.lm_head.weight}]

    def get_held_layers(self) -> list[Any]:
        """The modules of this stage of a pipeline. The others lose their tensors."""
        stage, decoder = self._stage(), self.model.model
        held = [decoder.rotary_emb, *decoder.layers[stage.begin : stage.end]]
        if stage.is_first:
            held.append(decoder.embed_tokens)
        if stage.is_last:
            held += [decoder.norm, self.model.lm_head]
        return held

    def module_policy(self) -> dict[str, Any]:
        """What replaces which modules and methods, by the class of the module that has them."""
        from colossalai.shardformer.policies.base_policy import ModulePolicyDescription

        stage, shard = self._stage(), self.shard_config
        forward = functools.partial(llama_forward.causal_lm_forward, stage=stage, shard=shard)
        attention = functools.partial(llama_forward.attention_forward, shard=shard)
        return {
            "LlamaAttention": ModulePolicyDescription(method_replacement={"forward": attention}),
            "LlamaModel": ModulePolicyDescription(sub_module_replacement=[*self._embedding(), *self._norms("norm")]),
            "LlamaDecoderLayer": ModulePolicyDescription(
                method_replacement={"forward": llama_forward.layer_forward},
                sub_module_replacement=[
                    *self._projections(),
                    *self._norms("input_layernorm", "post_attention_layernorm"),
                ],
            ),
            "LlamaForCausalLM": ModulePolicyDescription(
                method_replacement={"forward": forward}, sub_module_replacement=self._head()
            ),
        }

    def postprocess(self) -> Any:
        """Called when all is replaced."""
        return self.model

    def _stage(self) -> Stage:
        stages, layers = self.pipeline_stage_manager, len(self.model.model.layers)
        if stages is None:
            return Stage(0, layers)
        begin, end = stages.get_stage_index(stages.distribute_layers(layers))
        return Stage(begin, end, is_first=stages.is_first_stage(), is_last=stages.is_last_stage())

    @property
    def _of_vocabulary(self) -> dict[str, Any]:
        return {"make_vocab_size_divisible_by": self.shard_config.make_vocab_size_divisible_by}

    def _embedding(self) -> list[Any]:
        from colossalai.shardformer import layer

        if self.shard_config.enable_tensor_parallelism:
            return [_replacement("embed_tokens", layer.VocabParallelEmbedding1D, **self._of_vocabulary)]
        if self._ties_embeddings:
            # Padded as the head is.
            return [_replacement("embed_tokens", layer.PaddingEmbedding, **self._of_vocabulary)]
        return []

    def _head(self) -> list[Any]:
        from colossalai.shardformer import layer

        if not self.shard_config.enable_tensor_parallelism:
            return [_replacement("lm_head", layer.PaddingLMHead, **self._of_vocabulary)]
        gathers = not self.shard_config.parallel_output
        return [_replacement("lm_head", layer.VocabParallelLMHead1D, gather_output=gathers, **self._of_vocabulary)]

    def _norms(self, *names: str) -> list[Any]:
        from colossalai.shardformer import layer

        kind = layer.FusedRMSNorm if self.shard_config.enable_fused_normalization else layer.RMSNorm
        # Each rank then sees a part of the sample, and the gradients of all are summed.
        sees_part = self.shard_config.sequence_parallelism_mode in SHARING_TENSOR_RANKS
        return [_replacement(name, kind, sp_partial_derived=sees_part) for name in names]

    def _projections(self) -> list[Any]:
        from colossalai.shardformer import layer

        if not self.shard_config.enable_tensor_parallelism:
            return []
        mode = self.shard_config.sequence_parallelism_mode
        kinds = dict.fromkeys(SPLIT_BY_OUTPUTS, layer.Linear1D_Col) | dict.fromkeys(SPLIT_BY_INPUTS, layer.Linear1D_Row)
        return [_replacement(name, kind, seq_parallel_mode=mode) for name, kind in kinds.items()]


def _replacement(name: str, kind: type, **arguments: Any) -> Any:
    from colossalai.shardformer.policies.base_policy import SubModuleReplacementDescription

    return SubModuleReplacementDescription(suffix=name, target_module=kind, kwargs=arguments)
