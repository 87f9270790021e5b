"""What each worker gathers from its own images: running statistics of norm layers, and of the numbers of objects."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
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

    Averaging those of norm layers before each save would be simpler, but a run that is stopped and resumed would then
    differ from one that was left alone.

    Args:
        models: alike on all workers.
    """

    def __init__(self, models: Sequence[nn.Module]):
        self.models = models

    def state_dict(self) -> dict[str, Any]:
        """To be called by all workers; complete on the main one."""
        norms = [{name: value.cpu() for name, value in norm_statistics(model).items()} for model in self.models]
        objects = [
            {name: getattr(head, _OBJECTS) for name, head in _dense_heads(model).items() if hasattr(head, _OBJECTS)}
            for model in self.models
        ]
        several = comm.get_world_size() > 1  # else those of norm layers are in the models' own state
        return {"workers": comm.gather(norms) if several else [], "objects": comm.gather(objects)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore this worker's statistics; with another number of workers than before, the mean of all."""
        norms = _own(state.get("workers", []))
        objects = _own(state.get("objects", []))
        for number, model in enumerate(self.models):
            for name, buffer in norm_statistics(model).items() if norms else ():
                buffer.copy_(torch.stack([worker[number][name] for worker in norms]).mean(0))
            for name, head in _dense_heads(model).items():
                found = [worker[number][name] for worker in objects if name in worker[number]]
                if found:
                    setattr(head, _OBJECTS, sum(found) / len(found))


#: Where RetinaNet and FCOS keep the running number of objects, which divides their losses; in no state dict.
_OBJECTS = "loss_normalizer"


def _dense_heads(model: nn.Module) -> dict[str, DenseDetector]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DenseDetector)}


def _own(saved: Sequence[Any]) -> Sequence[Any]:
    """Of what was saved by worker: this one's, or all when there were more or fewer of them."""
    return [saved[comm.get_rank()]] if len(saved) == comm.get_world_size() else saved
