"""The columns of prepared data, and how jsonl records become samples of token ids.

Pre-training, input of prepare_pretrain_dataset.py, one document per line. `source` is context that is not trained on,
and may be empty or missing; `category` defaults to "unknown", and a number is read as its text. "text" is read if
`target` is absent. A loss mark (`loss_marks`) of 0 or false drops the document. Other fields are ignored:

    {"source": "猜谜语:一身卷卷细毛,吃的青青野草,过了数九寒冬,无私献出白毛。(打一动物)",
     "target": "白羊", "category": "riddle"}

Pre-training, output: several documents spliced into one sample. Here only the one above, with <s> = 1 and </s> = 2;
-100 marks the tokens that carry no loss:

    {"input_ids": [1, 41287, 50162, ..., 33718, 53429, 2], "labels": [-100, -100, -100, ..., 33718, 53429, 2],
     "sequence_lengths": [47], "document_categories": ["riddle"], "document_sources": ["zh"],
     "document_target_bytes": [6]}

Fine-tuning, input of prepare_sft_dataset.py, one conversation per line. Roles are human (or user), assistant (or gpt)
and system, in any case, and those of --assistant_roles; `category` defaults to "None". `message_formats` lists the
other formats that are read, such as ShareGPT's and alpaca's, and `loss_marks` shows how to mask an answer:

    {"messages": [{"from": "human", "content": "What are the three primary colors?"},
                  {"from": "assistant", "content": "The three primary colors are red, blue, and yellow."}]}

Fine-tuning, output: one conversation per sample, with the same columns, and with its text beside the ids:

    {"input_ids": [1, 319, 13563, ..., 13328, 29889, 2], "labels": [-100, -100, -100, ..., 13328, 29889, 2],
     ..., "inputs_decode": "<s>A chat between a curious human ...", "labels_decode": ["The three primary colors ..."],
     "seq_length": 62, "seq_category": "None"}
"""

# Every column of prepared data is named here and nowhere else.
INPUT_IDS = "input_ids"
LABELS = "labels"
DOCUMENT_LENGTHS = "sequence_lengths"
DOCUMENT_CATEGORIES = "document_categories"
DOCUMENT_SOURCES = "document_sources"
DOCUMENT_BYTES = "document_target_bytes"
DOCUMENT_NAMES = [DOCUMENT_SOURCES, DOCUMENT_CATEGORIES]
# Fine-tuning data has these too, for reading a sample by eye.
INPUTS_TEXT = "inputs_decode"
LABELS_TEXT = "labels_decode"
SAMPLE_LENGTH = "seq_length"
SAMPLE_CATEGORY = "seq_category"

# Written into each part as its description. Parts of earlier versions share the bytes of a cut document out over its
# pieces by tokens.
PREDICTED_BYTES = "document_target_bytes: of the tokens that are predicted"

# The label of a token that carries no loss.
IGNORE_INDEX = -100
# Rows that are read at a time where a column is scanned from end to end.
SCAN_ROWS = 10_000
