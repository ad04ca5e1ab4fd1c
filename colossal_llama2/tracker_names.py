"""The trackers that --report_to names, and the package of each. Imports nothing of a tracker."""

TENSORBOARD = "tensorboard"
WANDB = "wandb"
MLFLOW = "mlflow"
SWANLAB = "swanlab"

# Each is also the name of the package's module.
TRACKER_NAMES = (TENSORBOARD, WANDB, MLFLOW, SWANLAB)


def install_command(tracker: str) -> str:
    """How to install the package of a tracker; see requirements/trackers.in for the exceptions."""
    if tracker == SWANLAB:
        return "pip install --no-deps -r requirements-trackers.txt"
    return "pip install mlflow-skinny" if tracker == MLFLOW else f"pip install {tracker}"


def is_installed(tracker: str) -> bool:
    """Whether the package of a tracker is there, without importing it.

    W&B writes a folder "wandb" beside the scripts, which Python would import as a package without a file.
    """
    import importlib.util

    found = importlib.util.find_spec(tracker)
    return found is not None and found.origin is not None
