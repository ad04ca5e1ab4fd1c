"""The shapes of LLaMA-2, by the names of --model_size. Imports nothing.

From the config.json of its authors' models, which "Llama 2" (Touvron et al., arXiv 2307.09288) describes.
"""

# Entries of config.json; others have the defaults of a LLaMA.
MODEL_SIZES = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
}
# The original's tokenizer with Chinese, and that of LLaMA-3.
VOCABULARIES = (69_104, 128_256)
