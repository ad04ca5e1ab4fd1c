"""Load a LLaMA model for training, from safetensors, with every weight accounted for."""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional, Tuple

from colossal_llama2.errors import UserError
from colossal_llama2.model.exported_configs import CONFIG_FILE, ModelConfigs, generation_config_unread
from colossal_llama2.model.positions import positions_of, scaling_type
from colossal_llama2.model.tied_weights import OUTPUT_EMBEDDING, check_is_one_matrix

# Old checkpoints store this constant, which the model computes by itself.
COMPUTED_SUFFIX = ".rotary_emb.inv_freq"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
# In config.json: the rows that init_model.py added to the embeddings, as [begin, end) ranges of token ids.
NEW_ROWS_KEY = "initialized_rows"


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a checkpoint before its weights are read: sizes in elements and rows.

    `embedding_parameters` are those of `parameters` that --freeze_non_embeds_params trains. `positions` are what
    rope_scaling, of the type `scaling`, makes of `max_position_embeddings`.
    """

    parameters: int
    embedding_parameters: int
    vocab_size: int
    max_position_embeddings: int
    positions: int
    scaling: Optional[str]
    attention_heads: int
    key_value_heads: int
    layers: int
    ties_embeddings: bool


def check_model_folder(path: str, flag: str, *, needs_weights: bool = True) -> None:
    """Raise a UserError unless the folder holds a LLaMA config and safetensors. Reads only names; imports nothing."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: no such folder; give a local Hugging Face LLaMA folder")
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        raise UserError(f"{flag} {path}: has no config.json; give a Hugging Face LLaMA folder, as init_model.py writes")
    try:
        model_type = json.loads(config_path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config_path}: not a JSON object ({error})")
    if model_type != "llama":
        raise UserError(f"{flag} {config_path}: model_type is {model_type!r}, only 'llama' can be trained here")
    if needs_weights and not (folder / INDEX_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        cure = (
            "its pickled weights are not read here, load it once with transformers and save_pretrained() it"
            if pickled
            else f"a LLaMA folder holds {WEIGHTS_FILE}, or {INDEX_FILE} and its shards"
        )
        raise UserError(f"{flag} {path}: has no safetensors weights; {cure}")


def inspect_weights(path: str) -> ModelFacts:
    """Compare names and shapes of the stored weights with what the config asks for, without reading the weights.

    Only embeddings that are tied and stored twice are read.

    Raises:
        UserError: a weight is missing, unknown, or of another shape; tied embeddings differ.
    """
    model = model_without_weights(path)
    config = model.config
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: shape for name, shape in _stored_shapes(path).items() if not name.endswith(COMPUTED_SUFFIX)}
    if config.tie_word_embeddings:
        for shapes in (expected, stored):
            shapes.pop(OUTPUT_EMBEDDING, None)
    problems = [f"lacks {name}" for name in expected.keys() - stored.keys()]
    problems += [f"has the unknown weight {name}" for name in stored.keys() - expected.keys()]
    problems += [
        f"has {name} of shape {stored[name]}, its config.json asks for {expected[name]}"
        for name in expected.keys() & stored.keys()
        if stored[name] != expected[name]
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{path}: {sorted(problems)[0]}{more}; weights and config.json must be of the same model")
    problem = check_is_one_matrix(Path(path), shard_names(path)) if config.tie_word_embeddings else None
    if problem:
        raise UserError(problem)
    return facts_of_config(path)


def facts_of_config(path: str) -> ModelFacts:
    """What a folder's config.json alone says of its model. Raises UserError if no LLaMA can be made of it."""
    model = model_without_weights(path)
    config = model.config
    # One weight, if they are tied.
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    return ModelFacts(
        parameters=sum(param.numel() for param in model.parameters()),
        embedding_parameters=sum(weight.numel() for weight in embeddings),
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        positions=positions_of(config),
        scaling=scaling_type(config),
        attention_heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        layers=config.num_hidden_layers,
        ties_embeddings=config.tie_word_embeddings,
    )


def model_without_weights(path: str):
    """The LlamaForCausalLM of a folder's config.json, on the meta device. Raises UserError if there can be none."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    content = ModelConfigs(Path(path)).config
    try:
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig.from_dict(content))
    except Exception as error:  # what transformers raises for an entry that it cannot use is not told anywhere
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"{Path(path, CONFIG_FILE)}: no LLaMA can be made of it ({reason}); mend the file")


def _stored_shapes(path: str) -> Dict[str, Tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    shapes: Dict[str, Tuple[int, ...]] = {}
    for name in shard_names(path):
        shard = Path(path, name)
        try:
            with safe_open(str(shard), framework="pt") as file:
                shapes.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard}: cannot be read ({error}); copy it again from its source")
    return shapes


def shard_names(path: str) -> Tuple[str, ...]:
    """File names of a checkpoint's safetensors, in order.

    Raises:
        UserError: the index is damaged, or names a file outside the folder.
    """
    index_path = Path(path, INDEX_FILE)
    # Where both are there, transformers and ColossalAI load the single file.
    if Path(path, WEIGHTS_FILE).is_file():
        return (WEIGHTS_FILE,)
    try:
        names = sorted(set(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values()), key=str)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index_path}: not an index of weights ({error!r})")
    for name in names:
        # A path could lead out of the folder: out of the source when reading, out of the target when copying.
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{index_path} names {name!r}; only plain *.safetensors file names are allowed")
    return tuple(names)


def load_llama(path: str, *, precision: str, attention: str):
    """Load a LlamaForCausalLM, ready to be trained.

    Args:
        path: folder that `inspect_weights` accepted.
        precision: fp16, bf16 or fp32; what the weights are held in.
        attention: eager, sdpa or flash_attention_2, as transformers names them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    # In the config and not as an argument, since ColossalAI's lazy from_pretrained takes no attn_implementation.
    config = LlamaConfig.from_dict(ModelConfigs(Path(path)).config, attn_implementation=attention)
    with generation_config_unread():
        return LlamaForCausalLM.from_pretrained(
            path, config=config, torch_dtype=dtype_of(precision), use_safetensors=True
        )


def dtype_of(precision: str):
    """The torch.dtype that a model is held in under --mixed_precision fp16, bf16 or fp32."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
