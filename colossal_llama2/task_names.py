"""The names of what `python -m colossal_llama2.evaluation` can measure, for its flags and for what implements them."""

GAOKAO, GSM8K = "gaokao", "gsm8k"
SET_NAMES = ("mmlu", "cmmlu", "ceval", "agieval", GAOKAO, GSM8K)
ICL, BITS_PER_BYTE = "icl", "bits_per_byte"
TASK_NAMES = (*SET_NAMES, ICL, BITS_PER_BYTE)
# Training measures what is scored by logits. Some of these sets have examples.
LOGIT_TASK_NAMES = (*(name for name in SET_NAMES if name != GSM8K), ICL)
WITH_EXAMPLES = tuple(name for name in LOGIT_TASK_NAMES if name not in (GAOKAO, ICL))
