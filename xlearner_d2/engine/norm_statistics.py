"""Running statistics of norm layers, which each worker gathers from its own images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")


def norm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances, by name."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(_STATISTICS)}


@torch.no_grad()
def share_norm_statistics(model: nn.Module) -> None:
    """Average the running statistics of norm layers over all workers, each of which has seen its own images.

    What is saved, by the main worker, is then what all workers evaluate.
    """
    if comm.get_world_size() == 1:
        return
    for buffer in norm_statistics(model).values():
        first = buffer.clone()
        torch.distributed.broadcast(first, src=0)
        buffer -= first  # so that what is alike everywhere, as where it is frozen, stays so bit for bit
        torch.distributed.all_reduce(buffer)
        buffer.div_(comm.get_world_size()).add_(first)


class WorkerStatistics:
    """The running statistics of every worker, for a checkpoint that the main worker writes.

    Averaging them before each save would be simpler, but a run that is stopped and resumed would then differ from one
    that was left alone.

    Args:
        models: alike on all workers.
    """

    def __init__(self, models: Sequence[nn.Module]):
        self.models = models

    def state_dict(self) -> dict[str, Any]:
        """To be called by all workers; complete on the main one."""
        own = [{name: value.cpu() for name, value in norm_statistics(model).items()} for model in self.models]
        return {"workers": comm.gather(own)} if comm.get_world_size() > 1 else {}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore this worker's statistics; with another number of workers than before, the mean of all."""
        saved = state.get("workers", [])
        if not saved:
            return
        same = len(saved) == comm.get_world_size()
        chosen = [saved[comm.get_rank()]] if same else saved
        for number, model in enumerate(self.models):
            for name, buffer in norm_statistics(model).items():
                buffer.copy_(torch.stack([worker[number][name] for worker in chosen]).mean(0))
