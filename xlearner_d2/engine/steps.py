"""Detectron2's trainers, with losses that are checked and logged without making the device wait."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..modeling.weighting import current_weights


@dataclass(frozen=True, kw_only=True)
class NonFiniteLoss:
    """A step that went wrong, as it was before the optimiser could spoil the weights.

    Attributes:
        step: its number, from 0.
        losses: by name, those that were computed.
        reason: in words.
        batch: what the model was given.
        model: in training, not wrapped; its weights are those of the step.
        statistics: its running statistics (of norm layers and normalisers) before the step, by name.
    """

    step: int
    losses: Mapping[str, float]
    reason: str
    batch: Any
    model: nn.Module
    statistics: Mapping[str, Tensor]


def _raise(found: NonFiniteLoss) -> None:
    raise FloatingPointError(found.reason)


class LossesByBranch(nn.Module):
    """A model in training, which computes the losses of each branch when a trainer asks for them.

    A module, so that it can be wrapped for gradient averaging: each parameter learns from one branch's losses, once.

    Args:
        model: an :class:`XLearner`, or one whose losses are weighted.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batches: Any) -> Iterator[dict[str, Tensor]]:
        """The losses of one branch after another."""
        return cast(Any, self.model).losses_by_branch(batches)


class _EarlyCopy:
    """Numbers on their way from the device, asked for before the backward pass is queued.

    Waiting for them afterwards waits for the forward pass alone, while the device has the backward pass to do, that of
    the last branch where these learn one after another.
    """

    def __init__(self, losses: Mapping[str, Tensor]):
        self.names = list(losses)
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._event: Any = None
        if values.is_cuda:
            host = torch.empty(values.shape, pin_memory=True)
            host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))  # which need not be the current device
            values = host
        self._values = values

    def wait(self) -> dict[str, float]:
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self.names, self._values.tolist(), strict=True))


class _Exchange:
    """One row of numbers from every worker, gathered while training goes on."""

    def __init__(self, row: list[float], group: Any):
        own = torch.tensor(row, dtype=torch.float64)
        self._rows = [own]
        self._work: Any = None
        if group is not None:
            self._rows = [torch.empty_like(own) for _ in range(comm.get_world_size())]
            self._work = torch.distributed.all_gather(self._rows, own, group=group, async_op=True)

    def wait(self) -> np.ndarray:
        """(workers, numbers) float64."""
        if self._work is not None:
            self._work.wait()
        return torch.stack(self._rows).numpy()


class StepTrainer(SimpleTrainer):
    """Detectron2's trainer, which stops at a loss that is not finite, before the optimiser takes the step.

    Losses are logged as Detectron2 does, averaged over the workers: those of a step in that step when there is one
    worker, and one step later when there are several.

    Attributes:
        scope: prefix of what is logged.
        on_non_finite: called with a step whose loss is not finite; it has to raise.
    """

    def __init__(self, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer, *, scope: str = ""):
        super().__init__(model, data_loader, optimizer, zero_grad_before_forward=True)
        self.scope = scope
        self.on_non_finite: Callable[[NonFiniteLoss], None] = _raise
        self._group = torch.distributed.new_group(backend="gloo") if comm.get_world_size() > 1 else None
        self._batch: Any = None
        self._losses: list[_EarlyCopy] = []
        self._logged: tuple[int, list[str], _Exchange] | None = None
        self._statistics = running_statistics(self.module)
        self._statistics_before = {name: value.clone() for name, value in self._statistics.items()}
        self._handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward),
        ]

    @property
    def module(self) -> Any:
        """The model, not wrapped."""
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        return model.model if isinstance(model, LossesByBranch) else model

    def run_step(self) -> None:
        """Detectron2's step.

        Raises:
            FloatingPointError: or what ``on_non_finite`` raises.
        """
        self._losses = []
        try:
            with self._named():
                super().run_step()
        except FloatingPointError as error:  # ours, or Detectron2's at proposals that are not finite
            found = NonFiniteLoss(
                step=self.iter,
                losses=self._waited(),
                reason=str(error),
                batch=self._batch,
                model=self.module,
                statistics=self._statistics_before,
            )
            with self._precision():
                self.on_non_finite(found)

    def _precision(self) -> AbstractContextManager[Any]:
        """That of the step, for who runs it again."""
        return nullcontext()

    def _named(self) -> AbstractContextManager[None]:
        """Everything logged within has the scope as its prefix."""
        return get_event_storage().name_scope(self.scope) if self.scope else nullcontext()

    def _before_forward(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._batch = args[0]
        copy_statistics(self._statistics, self._statistics_before)

    def _after_forward(self, module: nn.Module, _args: tuple[Any, ...], losses: Any) -> Tensor | None:
        if not module.training:
            return None
        if isinstance(losses, Iterator):
            return self._learn_one_by_one(losses)
        self._losses.append(_EarlyCopy(losses if isinstance(losses, dict) else {"total_loss": losses}))
        return None

    def _learn_one_by_one(self, parts: Iterator[dict[str, Tensor]]) -> Tensor:
        """Learn from each part of the losses before the next one is computed; return what is left to learn from."""
        total = torch.zeros(())
        for losses in parts:
            self._losses.append(_EarlyCopy(losses))
            total = functools.reduce(torch.add, losses.values())
            if total.requires_grad:
                self._backward(total)
        return total.detach().requires_grad_()  # a leaf: Detectron2's own backward pass ends there

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _waited(self) -> dict[str, float]:
        """The losses of this step, by name."""
        return {name: value for copy in self._losses for name, value in copy.wait().items()}

    def _write_metrics(
        self, loss_dict: Mapping[str, Tensor], data_time: float, prefix: str = "", iter: int | None = None
    ) -> None:
        """Check the losses of this step and hand them over to be logged; called after the backward pass was queued."""
        losses = self._waited()
        wrong = {name: value for name, value in losses.items() if not np.isfinite(value)}
        if wrong:
            listed = ", ".join(f"{name} is {value}" for name, value in wrong.items())
            raise FloatingPointError(f"The loss of step {self.iter} is not finite: {listed}.")
        self.flush()
        row = [*losses.values(), data_time, float(_num_images(self._batch))]
        self._logged = (self.iter, list(losses), _Exchange(row, self._group))
        if self._group is None:
            self.flush()

    def flush(self) -> None:
        """Log what is on its way. Every worker calls this in the same steps."""
        if self._logged is None:
            return
        (step, names, exchange), self._logged = self._logged, None
        rows = exchange.wait()
        losses = dict(zip(names, rows[:, :-2].mean(0).tolist(), strict=True))
        found = {
            "rank_data_time": rows[comm.get_rank(), -2],
            **losses,
            **{f"{source}/total_loss": value for source, value in by_source(losses).items()},
            "total_loss": sum(losses.values()),
            "data_time": rows[:, -2].max(),  # the slowest worker's is what all wait for
            "images": rows[:, -1].sum(),
        }
        with self._named():
            for name, value in found.items():
                get_event_storage().put_scalar(name, value, cur_iter=step)

    def release(self) -> None:
        """Leave the model, and no gradients with it: it may be kept longer than what trained it."""
        for handle in self._handles:
            handle.remove()
        self.optimizer.zero_grad(set_to_none=True)

    def log_weights(self) -> None:
        """Log the weights of the sources' losses, where training finds them; this waits for the device."""
        with self._named():
            for source, weight in current_weights(self.module).items():
                get_event_storage().put_scalar(f"{source}/weight", weight, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's; what is on its way is logged first, so that hooks can save it."""
        self.flush()
        return super().state_dict()


class AMPStepTrainer(StepTrainer, AMPTrainer):
    """The same with mixed precision and loss scaling on a GPU."""

    def __init__(self, *args: Any, precision: torch.dtype = torch.float16, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.precision = precision
        if precision != torch.float16:
            # Detectron2 scales losses in any precision. In one that does not overflow the scale would double for ever,
            # until the norms by which gradients are clipped do.
            self.grad_scaler = torch.amp.GradScaler("cuda", enabled=False)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", self.precision)

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):  # Detectron2 calls the model, but not this, with it
            self.grad_scaler.scale(loss).backward()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Detectron2's; a run that was without float16 so far, as on a CPU, has no scaler to go on with."""
        saved = state_dict.get("grad_scaler") or self.grad_scaler.state_dict()
        super().load_state_dict({**state_dict, "grad_scaler": saved})


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of one number, or of one per channel, by name: what a training step changes besides parameters."""
    return {name: buffer for name, buffer in model.named_buffers() if buffer.dim() < 2}


@torch.no_grad()
def copy_statistics(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy tensors of equal names, those of one type in one go."""
    for dtype in {value.dtype for value in source.values()}:
        names = [name for name, value in source.items() if value.dtype == dtype]
        torch._foreach_copy_([target[name] for name in names], [source[name] for name in names])


def by_source(losses: Mapping[str, float]) -> dict[str, float]:
    """Sum of each source's losses, which are named ``source/loss``; others are left out."""
    sums: dict[str, float] = {}
    for name, value in losses.items():
        source, slash, _ = name.rpartition("/")
        if slash:
            sums[source] = sums.get(source, 0.0) + value
    return sums


def _num_images(batch: Any) -> int:
    return sum(len(records) for records in batch.values()) if isinstance(batch, Mapping) else len(batch)
