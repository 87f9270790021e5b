"""What autograd keeps for the backward pass, over time."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Kept:
    """A tensor that autograd keeps, counted as long as it does."""

    def __init__(self, tensor: Tensor, kept: Counter[tuple[int, int]]):
        storage = tensor.untyped_storage()
        self.tensor, self.kept, self.key = tensor, kept, (storage.data_ptr(), storage.nbytes())
        kept[self.key] += 1

    def __del__(self) -> None:
        self.kept[self.key] -= 1


def peak_bytes(learn: Callable[[], Any], model: nn.Module) -> int:
    """The most that autograd keeps at any time, parameters aside."""
    kept: Counter[tuple[int, int]] = Counter()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    peak = 0

    def note(tensor: Tensor) -> _Kept:
        nonlocal peak
        found = _Kept(tensor, kept)
        peak = max(peak, sum(size for (address, size), count in kept.items() if count and address not in weights))
        return found

    with torch.autograd.graph.saved_tensors_hooks(note, lambda found: found.tensor):
        learn()
    return peak
