"""One run of a few minutes that checks and measures training on one GPU: `python -m tests.gpu`."""
