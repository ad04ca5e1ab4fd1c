"""A module whose __setstate__, compiled by TorchScript, writes a file when torch.jit.load reads it. Imports torch."""

import torch


class Evil(torch.nn.Module):
    """Holds the path to write to."""

    def __init__(self, path: str):
        super().__init__()
        self.path, self.training = path, False

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), state[0])

    def forward(self, x):
        """Not used."""
        return x
