"""The names of the files and folders that a run writes."""

import re

# In --save_dir.
CHECKPOINT_NAME = re.compile(r"epoch-(\d+)_step-(\d+)")
LATEST_NAME = "latest"
MODEL_NAME = "modeling"
LOG_NAME, PLAN_NAME = "train_log.jsonl", "plan.json"
LOCK_NAME = ".lock"
# Written when a run ends.
REPORT_NAMES = ("settings.json", "environment.json", "loss.png")
SETTINGS_NAME, ENVIRONMENT_NAME, PLOT_NAME = REPORT_NAMES
# Written when --report_to names other trackers than TensorBoard.
TRACKERS_NAME = "trackers.json"
FILE_NAMES = (LATEST_NAME, LOG_NAME, PLAN_NAME, *REPORT_NAMES, TRACKERS_NAME)

# In a checkpoint, beside MODEL_NAME; the engine names the rest.
MANIFEST_NAME = "manifest.json"
STATES_NAME = "running_states.json"
SCHEDULE_NAME = "lr_scheduler"
OPTIMIZER_NAME = "optimizer"
# In the final model.
CARD_NAME = "README.md"

# What is being written, and what is being replaced.
PARTIAL_SUFFIX = ".tmp"
OLD_SUFFIX = ".old"
_FILES = "|".join(map(re.escape, FILE_NAMES))
# What a run that died may leave; the next run in the folder removes it.
LEFTOVER_NAME = re.compile(
    rf"(epoch-\d+_step-\d+(\.[0-9a-f]{{8}})?|{MODEL_NAME}|{_FILES})\.(tmp|old)|"
    rf"\.({_FILES})\.[0-9a-f]{{8}}\.tmp|\.token-[0-9a-f]{{8}}"
)
