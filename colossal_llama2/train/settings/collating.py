"""How the samples of a run become batches."""

from colossal_llama2.dataset.read.batch import Collator
from colossal_llama2.dataset.read.loss_groups import Groups
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.train.settings.config import TrainConfig


def make_collator(config: TrainConfig, groups: Groups | None = None, *, keeps_apart: bool = True) -> Collator:
    """Pads with <unk> in pre-training and with </s> in fine-tuning, as the original does.

    Args:
        groups: the groups of tokens whose losses are reported apart.
        keeps_apart: False lets the documents of a sample attend to each other.
    """
    tokenizer = load_tokenizer(config.source.tokenizer, pad_token=config.data.pad_token)
    return Collator(
        pad_token_id=tokenizer.pad_token_id,
        max_length=config.data.max_length,
        length_divisor=config.engine.sequence_shards,
        groups=groups,
        keeps_apart=keeps_apart,
    )
