"""Per-group losses: sums over the tokens of a group, such as one source, collected where the loss is computed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    import torch

    from colossal_llama2.dataset.read.batch import Batch


class LossTally:
    """Sums token losses by group, on the device, while the micro batches of a step pass through the model.

    The host reads the sums together with the loss of the step, so it does not wait any longer. Forward passes that were
    not announced by `expect`, such as those of an evaluation, are not counted.
    """

    def __init__(self, device: "torch.device", *, unfed: str | None = None):
        """`unfed` is the reason why single tokens' losses are not available; None if `add` will be called."""
        import torch

        self.unfed = unfed
        self._device = device
        self._size = 0
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)
        self._expected: torch.Tensor | None = None

    def begin(self, size: int) -> None:
        """Count `size` groups separately from now on, if token losses are available."""
        import torch

        if self.unfed is None:
            self._size, self._sums = size, torch.zeros(size, dtype=torch.float64, device=self._device)

    def expect(self, groups: Optional["torch.Tensor"]) -> None:
        """Announce the next forward pass, whose tokens are of these (batch, length) groups."""
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
            # Ranks that share samples are treated as ranks that repeat them: their mean is used.
            self._sums.index_add_(0, groups, losses.detach().double() * ranks)

    def take(self, batches: Sequence["Batch"]) -> list[float]:
        """Return the sums of losses by group of these micro batches, then the numbers of tokens, and reset.

        Empty without `begin`.
        """
        self._expected = None
        if not self._size:
            return []
        sums = self._sums.tolist()
        self._sums.zero_()
        counts = [0] * self._size
        for batch in batches:
            assert batch.group_counts is not None, "a batch without groups, after `begin`"
            counts = [count + int(more) for count, more in zip(counts, batch.group_counts, strict=True)]
        return [*sums, *map(float, counts)]
