"""Training: a run from its flags to the final model; benchmark, self-test, dry run, verify."""
