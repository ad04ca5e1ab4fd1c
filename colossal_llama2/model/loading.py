"""Load a LLaMA model for training from safetensors, after checking that every weight is there."""

import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.layer_matrices import ATTENTION_MATRICES, MLP_MATRICES
from colossal_llama2.model.config_fields import (
    CONFIG_FILE,
    TOKEN_ID_FIELDS,
    check_ids,
    known_ids,
    llama_config,
    log_unknown_ids,
    opened,
    read_fields,
)
from colossal_llama2.model.model_folder import (
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    StrPath,
    check_model_files,
    has_weights,
    shard_names,
    weight_map,
)
from colossal_llama2.model.positions import positions_of, scaling_type
from colossal_llama2.model.tied_weights import OUTPUT_EMBEDDING, check_is_one_matrix
from colossal_llama2.plurals import counted
from colossal_llama2.storage.given_paths import no_folder, what_it_holds
from colossal_llama2.storage.input_files import ANY_SIZE, check_regular, is_regular, read_settings
from colossal_llama2.storage.json_input import shown
from colossal_llama2.storage.unpickling_guard import unpickling_refused

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

# Old checkpoints store this constant, which the model computes itself.
COMPUTED_SUFFIX = ".rotary_emb.inv_freq"
# In config.json: the rows that init_model.py added to the embeddings, as [begin, end) ranges of token ids.
NEW_ROWS_KEY = "initialized_rows"
# The same for rows without a token, which --pad_vocab_to_multiple_of adds after the last token.
PADDING_ROWS_KEY = "padding_rows"


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model, in elements and rows, which config.json gives before the weights are read.

    `embedding_parameters` are the part of `parameters` that --freeze_non_embeds_params trains. `positions` is
    `max_position_embeddings` scaled by rope_scaling, which is of the type `scaling`. `layer_matrices` are the
    (outputs, inputs) of each matrix of a decoder layer, such as q_proj.
    """

    parameters: int
    embedding_parameters: int
    vocab_size: int
    max_position_embeddings: int
    positions: int
    scaling: str | None
    attention_heads: int
    key_value_heads: int
    layers: int
    ties_embeddings: bool
    layer_matrices: dict[str, tuple[int, int]] = field(default_factory=dict)


def check_model_folder(path: StrPath, flag: str, *, needs_weights: bool = True) -> None:
    """Raise a UserError unless the folder holds a LLaMA config and safetensors, and nothing that makes it unusable.

    Reads only JSON, and imports neither torch nor transformers.

    Args:
        needs_weights: whether weights will be read. Without, a folder may have none, or pickled ones.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: {no_folder(str(path))}; give a local Hugging Face LLaMA folder")
    check_model_files(folder)
    if not is_regular(folder / CONFIG_FILE):
        raise UserError(
            f"{flag} {path}: has no config.json{what_it_holds(str(path))}; give a Hugging Face LLaMA folder, as "
            f"init_model.py writes"
        )
    generation_ids(folder, read_fields(path))
    if needs_weights and not has_weights(folder):
        cure = (
            "pickled weights can run code and are not read here; load it once with transformers where you trust it "
            "and save_pretrained() it"
            if has_pickled_weights(folder)
            else f"a LLaMA folder holds {WEIGHTS_FILE}, or {INDEX_FILE} and its shards"
        )
        raise UserError(f"{flag} {path}: has no safetensors weights; {cure}")


def has_pickled_weights(folder: Path) -> bool:
    """Whether the folder has files in which weights are pickled."""
    return any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))


def generation_ids(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The ids of <s>, </s> and padding in generation_config.json, or of config.json where it has none.

    Ids outside the vocabulary are logged and ignored.

    Args:
        fields: what `read_fields` returned for the folder.

    Raises:
        UserError: an id is not a whole number.
    """
    path = folder / GENERATION_CONFIG_FILE
    generation = read_settings(path, allows_mark=True) if is_regular(path) else {}
    check_ids(generation, path)
    log_unknown_ids(generation, fields["vocab_size"], path)
    found = {name: known_ids(generation.get(name), fields["vocab_size"]) for name in TOKEN_ID_FIELDS}
    return {name: fields[name] if value is None else value for name, value in found.items()}


def check_model(path: StrPath, flag: str, *, needs_weights: bool = True) -> None:
    """`check_model_folder` and `check_weights`: all checks of a model that need no torch."""
    path = opened(path)
    check_model_folder(path, flag, needs_weights=needs_weights)
    if needs_weights or has_weights(Path(path)):
        check_weights(path)


class StoredWeight(NamedTuple):
    """One tensor of a safetensors file: the format's name of its dtype, such as BF16, and its shape."""

    dtype: str
    shape: tuple[int, ...]


# Dtypes that can be trained. Quantized models have integers and 8-bit floats.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
LAYER_NAME = re.compile(r"model\.layers\.(\d{1,9})\..*", re.ASCII)
# A LLaMA has at most 13 a layer.
MOST_WEIGHTS = 20_000


def check_weights(path: StrPath) -> None:
    """Compare names, shapes and dtypes of the stored weights with the config.

    Reads only the headers of the files, and imports no torch. Its time depends on what is stored, not on the config.

    Raises:
        UserError: a weight is missing, unknown, of another shape, or not of a dtype that can be trained.
    """
    fields = read_fields(path)
    stored = stored_weights(path)
    found = [int(match[1]) for match in map(LAYER_NAME.fullmatch, stored) if match]
    if found and max(found) + 1 != fields["num_hidden_layers"]:
        raise UserError(
            f"{path}: has weights of {counted(max(found) + 1, 'layer')}, num_hidden_layers of its config.json is "
            f"{fields['num_hidden_layers']:,}; weights and config.json must be of the same model"
        )
    expected = dict(expected_shapes(fields))
    if fields["tie_word_embeddings"]:
        stored.pop(OUTPUT_EMBEDDING, None)
    check_shapes(
        stored,
        expected,
        f"{path}",
        needed="its config.json requires",
        cure="weights and config.json must be of the same model",
    )
    packed = sorted(name for name in expected if stored[name].dtype not in FLOAT_DTYPES)
    if packed:
        raise UserError(
            f"{path}: {packed[0]} is stored as {stored[packed[0]].dtype}, which is how quantized models are stored; "
            f"give the original model, in one of {', '.join(FLOAT_DTYPES)}"
        )


def check_shapes(
    stored: Mapping[str, StoredWeight], expected: Mapping[str, tuple[int, ...]], where: str, *, needed: str, cure: str
) -> None:
    """Raise UserError if a tensor is missing, unknown, or of another shape.

    Args:
        where: what stores them, for the message.
        needed: the words before the right shape.
        cure: the end of the message.
    """
    problems = [f"lacks {name}" for name in expected.keys() - stored.keys()]
    problems += [f"has the unknown weight {shown(name)[1:-1]}" for name in stored.keys() - expected.keys()]
    problems += [
        f"has {name} of shape {stored[name].shape}, {needed} {expected[name]}"
        for name in expected.keys() & stored.keys()
        if stored[name].shape != expected[name]
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{where}: {sorted(problems)[0]}{more}; {cure}")


def layer_matrices(fields: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each matrix of a decoder layer. `fields` is what `read_fields` returns."""
    width, inner = fields["hidden_size"], fields["intermediate_size"]
    query = fields["num_attention_heads"] * fields["head_dim"]
    key = fields["num_key_value_heads"] * fields["head_dim"]
    attention = {"q_proj": (query, width), "k_proj": (key, width), "v_proj": (key, width), "o_proj": (width, query)}
    return {**attention, "gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}


def expected_shapes(fields: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each weight of a LLaMA, as transformers' LlamaForCausalLM has them.

    Args:
        fields: what `read_fields` returns.
    """
    width, rows = fields["hidden_size"], fields["vocab_size"]
    matrices = layer_matrices(fields)
    attention, mlp = ({name: matrices[name] for name in names} for names in (ATTENTION_MATRICES, MLP_MATRICES))
    yield "model.embed_tokens.weight", (rows, width)
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for part, shapes, has_bias in (("self_attn", attention, "attention_bias"), ("mlp", mlp, "mlp_bias")):
            for name, shape in shapes.items():
                yield f"{prefix}.{part}.{name}.weight", shape
                if fields[has_bias]:
                    yield f"{prefix}.{part}.{name}.bias", shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (width,)
    yield "model.norm.weight", (width,)
    if not fields["tie_word_embeddings"]:
        yield "lm_head.weight", (rows, width)


def inspect_weights(path: StrPath) -> ModelFacts:
    """Check a checkpoint's weights against its config, and return its sizes.

    The only weights read are embeddings that are tied and stored twice.

    Raises:
        UserError: as `check_weights`, or transformers cannot make a model from the config.
    """
    path = opened(path)
    check_model_files(Path(path))
    check_weights(path)
    facts = facts_of_config(path)
    problem = check_is_one_matrix(Path(path), shard_names(path)) if facts.ties_embeddings else None
    if problem:
        raise UserError(problem)
    return facts


def facts_of_config(path: StrPath) -> ModelFacts:
    """The sizes of a folder's model, from config.json only. Raises UserError if no LLaMA can be made from it."""
    model_without_weights(path)
    return facts_of_fields(read_fields(path))


def facts_of_fields(fields: dict[str, Any]) -> ModelFacts:
    """The sizes of a model from the fields of a config.json. Imports no torch.

    Args:
        fields: what `read_fields` returns.
    """
    shapes = dict(expected_shapes(fields))
    embeddings = [shapes[name] for name in ("model.embed_tokens.weight", OUTPUT_EMBEDDING) if name in shapes]
    config = SimpleNamespace(**fields)
    return ModelFacts(
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        embedding_parameters=sum(math.prod(shape) for shape in embeddings),
        vocab_size=fields["vocab_size"],
        max_position_embeddings=fields["max_position_embeddings"],
        positions=positions_of(config),
        scaling=scaling_type(config),
        attention_heads=fields["num_attention_heads"],
        key_value_heads=fields["num_key_value_heads"],
        layers=fields["num_hidden_layers"],
        ties_embeddings=fields["tie_word_embeddings"],
        layer_matrices=layer_matrices(fields),
    )


def model_without_weights(path: StrPath) -> "LlamaForCausalLM":
    """The LlamaForCausalLM of a folder's config.json, on the meta device. Raises UserError if it cannot be made."""
    import torch
    from transformers import LlamaForCausalLM

    config = llama_config(path)
    try:
        with torch.device("meta"):
            return LlamaForCausalLM(config)
    except Exception as error:  # transformers does not document what it raises for an entry that it cannot use
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"{Path(path, CONFIG_FILE)}: no LLaMA can be made from it ({reason}); correct the file")


def stored_weights(path: StrPath) -> dict[str, StoredWeight]:
    """The tensors of a checkpoint, by the headers of its safetensors, without constants that old checkpoints store.

    Raises:
        UserError: a file is missing or damaged, or does not hold exactly the tensors that the index lists.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, StoredWeight] = {}
    places: dict[str, str] = {}
    for file_name in shard_names(path):
        shard = Path(path, file_name)
        # Any size is allowed: the header, which is read first, lists the content.
        check_regular(shard, max_bytes=ANY_SIZE)
        try:
            with safe_open(str(shard), framework="np") as file:
                names = [name for name in file.keys() if not name.endswith(COMPUTED_SUFFIX)]
                if len(names) > MOST_WEIGHTS:
                    raise UserError(f"{shard}: holds {len(names):,} tensors, which no LLaMA has")
                slices = {name: file.get_slice(name) for name in names}
                held = {n: StoredWeight(one.get_dtype(), tuple(one.get_shape())) for n, one in slices.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard}: cannot be read ({error}); copy it again from its source")
        for name in held.keys() & found.keys():
            raise UserError(f"{path}: {shard.name} and {places[name]} both hold {name}; copy the model again")
        found.update(held)
        places.update(dict.fromkeys(held, shard.name))
    if not is_regular(Path(path, WEIGHTS_FILE)):
        listed = {name: file for name, file in weight_map(Path(path)).items() if not name.endswith(COMPUTED_SUFFIX)}
        # transformers fills weights that the index does not list with random numbers.
        for name in sorted(listed.keys() | places.keys()):
            if listed.get(name) != places.get(name):
                raise UserError(
                    f"{path}: {shown(name)[1:-1]} is in {places.get(name, 'no file')}, but {INDEX_FILE} names "
                    f"{listed.get(name, 'nothing')}; copy the model again from its source"
                )
    return found


def load_llama(path: StrPath, *, precision: str, attention: str) -> "LlamaForCausalLM":
    """Load a LlamaForCausalLM for training.

    Args:
        path: folder that `inspect_weights` accepted.
        precision: fp16, bf16 or fp32, the dtype of the loaded weights.
        attention: eager, sdpa or flash_attention_2, as transformers names them.
    """
    from transformers import LlamaForCausalLM

    check_model_files(Path(path))
    # In the config and not as an argument, since ColossalAI's lazy from_pretrained has no attn_implementation.
    config = llama_config(path, attn_implementation=attention)
    with unpickling_refused():
        return LlamaForCausalLM.from_pretrained(
            str(path), config=config, torch_dtype=dtype_of(precision), use_safetensors=True, local_files_only=True
        )


def recompute_activations(model: Any) -> None:
    """Make a model's layers keep only their input, and compute the rest again in the backward pass."""
    options = {"use_reentrant": False}
    # Renamed in transformers 5, where the old name warns.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def dtype_of(precision: str) -> "torch.dtype":
    """The torch.dtype of a model's weights under --mixed_precision fp16, bf16 or fp32."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
