"""The names of what `python -m colossal_llama2.evaluation` can measure, for its flags and for what implements them."""

SET_NAMES = ("mmlu", "cmmlu", "ceval", "agieval", "gaokao", "gsm8k")
ICL, BITS_PER_BYTE = "icl", "bits_per_byte"
TASK_NAMES = (*SET_NAMES, ICL, BITS_PER_BYTE)
