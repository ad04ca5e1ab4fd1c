"""The names of the files in a tokenizer's folder."""

MODEL_FILE = "tokenizer.model"
FAST_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
# Empty, it is a template that adds nothing.
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
TEMPLATES_FOLDER = "additional_chat_templates"
# The model's, which transformers reads for a tokenizer too.
MODEL_CONFIG_FILE = "config.json"
# What init_tokenizer.py reports beside the tokenizer that it writes.
REPORT_FILE = "vocabulary_report.json"
# They hold no token id, so they are copied unchanged.
COPIED_FILES = (SPECIAL_TOKENS_FILE, TEMPLATE_FILE, TEMPLATE_JSON_FILE, TEMPLATES_FOLDER)
# What is copied with a model.
TOKENIZER_FILES = (MODEL_FILE, FAST_FILE, CONFIG_FILE, ADDED_TOKENS_FILE, *COPIED_FILES)
