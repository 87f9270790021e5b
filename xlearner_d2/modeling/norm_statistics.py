"""Passes of a branch that is in training with its running statistics, those of now or of an earlier time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

#: module, name of a buffer, and its value
Statistics: TypeAlias = Sequence[tuple[nn.Module, str, Tensor]]


def copied_statistics(module: nn.Module) -> Statistics:
    """Copies of the running statistics that a pass in training changes in place."""
    return [
        (child, name, value.clone())
        for child in module.modules()
        if child.training
        for name, value in child.named_buffers(recurse=False)
    ]


@contextmanager
def inference_mode_norm(module: nn.Module, statistics: Statistics | None = None) -> Iterator[None]:
    """Run ``module`` with its running statistics, and leave them as they are.

    Args:
        statistics: :func:`copied_statistics` of an earlier time, to run with instead; None takes those of now. A pass
            with gradient then uses copies: its backward pass needs these numbers, and a pass in training that comes
            before it changes the module's own.
    """
    if statistics is None:
        statistics = copied_statistics(module) if torch.is_grad_enabled() else []
    training = [child for child in module.modules() if child.training]
    own = [(child, name, getattr(child, name)) for child, name, _ in statistics]
    for child, name, value in statistics:
        setattr(child, name, value)
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child, name, value in own:
            setattr(child, name, value)
        for child in training:
            child.training = True
