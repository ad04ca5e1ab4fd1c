"""The loss of each group of tokens, such as those of one source, added up where the loss of all of them is computed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    import torch

    from colossal_llama2.dataset.read.batch import Batch


class LossTally:
    """Adds up losses of tokens by group, on the device, while the micro batches of a step go through the model.

    The host asks for the sums with the loss of the step, so it waits for nothing that it would not wait for anyway.
    Forward passes that nobody expects, such as those of an evaluation, are not counted.
    """

    def __init__(self, device: "torch.device", *, unfed: str | None = None):
        """`unfed` says why the loss of a token is not known here; None if `add` will be called."""
        self.unfed = unfed
        self._device = device
        self._size = 0
        self._sums: torch.Tensor | None = None
        self._expected: torch.Tensor | None = None

    def begin(self, size: int) -> None:
        """Tell `size` groups apart from now on, if losses of tokens are known here."""
        import torch

        if self.unfed is None:
            self._size, self._sums = size, torch.zeros(size, dtype=torch.float64, device=self._device)

    def expect(self, groups: Optional["torch.Tensor"]) -> None:
        """The next forward pass is of tokens with these (batch, length) groups."""
        if self._size and groups is not None:
            self._expected = groups.to(self._device, non_blocking=True)

    def add(self, losses: "torch.Tensor", share: tuple[int, int] = (0, 1)) -> None:
        """Count the (tokens,) losses of the expected pass, which are the `share` (rank, ranks) of each sample."""
        import torch

        if self._expected is None:
            return
        rank, ranks = share
        groups = self._expected.chunk(ranks, dim=1)[rank].flatten()
        self._expected = None
        # Gemini's tensors replace in-place operations by others, which would be lost.
        with torch._C.DisableTorchFunctionSubclass():
            # Ranks that share samples are taken for ranks that repeat them, and their mean is taken.
            self._sums.index_add_(0, groups, losses.detach().double() * ranks)

    def take(self, batches: Sequence["Batch"]) -> list[float]:
        """Sums of losses by group of these micro batches, then numbers of tokens; begins anew. Empty if not begun."""
        self._expected = None
        if not self._size:
            return []
        sums = self._sums.tolist()
        self._sums.zero_()
        counts = [0] * self._size
        for batch in batches:
            counts = [count + int(more) for count, more in zip(counts, batch.group_counts, strict=True)]
        return [*sums, *map(float, counts)]
