"""Steps that are checked and logged: losses by source, non-finite losses, statistics of workers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from xlearner_d2.config import default_config
from xlearner_d2.engine.norm_statistics import WorkerStatistics
from xlearner_d2.engine.steps import AMPStepTrainer, LossesByBranch, NonFiniteLoss, StepTrainer, by_source
from xlearner_d2.engine.trainer import build_step_trainer
from xlearner_d2.modeling.xlearner import autocast_dtype


class Losses(nn.Module):
    """Its losses are its weight times what the batch says, by source."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm1d(1, momentum=1.0)

    def forward(self, batch: dict[str, list[float]]) -> dict[str, Tensor]:
        if "raise" in batch:
            raise FloatingPointError("Predicted boxes contain Inf/NaN.")
        self.norm(torch.tensor([[value] for values in batch.values() for value in values] * 2))
        return {f"{source}/loss_{n}": self.weight * value for source, of in batch.items() for n, value in enumerate(of)}


class ApartLosses(nn.Module):
    """Its sources learn apart: each has a weight of its own, and a part of the losses."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {source: nn.Parameter(torch.ones(())) for source in ("birds", "cells", "fixed")}
        )
        self.weights["fixed"].requires_grad_(False)
        self.asked: list[tuple[str, bool]] = []

    def losses_by_branch(self, batch: dict[str, list[float]]) -> Iterator[dict[str, Tensor]]:
        for source, values in batch.items():
            self.asked.append((source, self.weights["birds"].grad is not None))
            yield {f"{source}/loss_{n}": self.weights[source] * value for n, value in enumerate(values)}

    def forward(self, batch: dict[str, list[float]]) -> dict[str, Tensor]:
        return {name: loss for part in self.losses_by_branch(batch) for name, loss in part.items()}


def trainer(batches: list[Any], **options: Any) -> StepTrainer:
    model = Losses()
    made = StepTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    made.max_iter = 1
    return made


def steps(made: StepTrainer, count: int) -> Iterator[EventStorage]:
    with EventStorage() as storage:
        for made.iter in range(count):
            storage.iter = made.iter
            made.run_step()
            yield storage


def test_losses_are_logged_by_name_by_source_and_in_all() -> None:
    (storage,) = steps(trainer([{"birds": [1.0, 2.0], "cells": [4.0]}]), 1)
    found = {name: value for name, (value, _) in storage.latest().items() if not name.endswith("data_time")}
    assert found == {
        "birds/loss_0": 1,
        "birds/loss_1": 2,
        "cells/loss_0": 4,
        "birds/total_loss": 3,
        "cells/total_loss": 4,
        "total_loss": 7,
        "images": 3,
    }


def test_a_scope_goes_before_every_name() -> None:
    (storage,) = steps(trainer([{"birds": [1.0]}], scope="squeeze"), 1)
    assert all(name.startswith("squeeze/") for name in storage.latest())


def test_only_losses_of_a_source_are_summed_by_source() -> None:
    assert by_source({"loss_hint": 1.0, "a/x": 2.0, "a/y": 3.0, "b/x": 4.0}) == {"a": 5.0, "b": 4.0}


def test_branches_learn_one_by_one_what_they_learn_at_once() -> None:
    """One that is frozen gives its losses as well, and the next part is computed after the one before was learned."""
    batches = [{"birds": [1.0, 2.0], "cells": [4.0], "fixed": [3.0]}, {"fixed": [2.0], "cells": [5.0], "birds": [1.0]}]
    found = []
    for by_branch in (False, True):
        model = ApartLosses()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        made = StepTrainer(LossesByBranch(model) if by_branch else model, batches, optimizer)
        assert made.module is model
        logs = [
            {name: value for name, (value, _) in storage.latest().items() if not name.endswith("data_time")}
            for storage in steps(made, 2)
        ]
        found.append((logs, {name: float(of.detach()) for name, of in model.weights.items()}))
        assert model.asked[:3] == [("birds", False), ("cells", by_branch), ("fixed", by_branch)]
    assert found[0] == found[1]
    assert found[0][1] == pytest.approx({"birds": 0.6, "cells": 0.1, "fixed": 1.0})


@pytest.mark.filterwarnings("ignore:.*GradScaler")  # of Detectron2's, which is replaced here
def test_each_branch_learns_from_its_scaled_loss_outside_of_mixed_precision() -> None:
    model = ApartLosses()
    made = AMPStepTrainer(LossesByBranch(model), [], torch.optim.SGD(model.parameters(), lr=0.1))
    made.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen: list[bool] = []
    model.weights["cells"].register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):  # as Detectron2 calls the model
        made.model({"birds": [1.0, 2.0], "cells": [4.0]})
    assert (model.weights["birds"].grad, model.weights["cells"].grad) == (24.0, 32.0)
    assert seen == [False]


@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_a_run_without_mixed_precision_goes_on_with_it() -> None:
    model = ApartLosses()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {"iteration": 3, **StepTrainer(LossesByBranch(model), [], optimizer).state_dict()}
    made = AMPStepTrainer(LossesByBranch(model), [], optimizer)
    made.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    made.load_state_dict(before)
    assert made.grad_scaler.get_scale() == 8.0
    made.load_state_dict({**before, "grad_scaler": {**made.grad_scaler.state_dict(), "scale": 4.0}})
    assert made.grad_scaler.get_scale() == 4.0
    made.load_state_dict({**before, "grad_scaler": {}})  # as of a run in bfloat16
    assert made.grad_scaler.get_scale() == 4.0


@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_losses_are_not_scaled_in_a_precision_that_does_not_overflow() -> None:
    model = ApartLosses()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = AMPStepTrainer(LossesByBranch(model), [], optimizer, precision=torch.bfloat16)
    made.model({"birds": [1.0, 2.0], "cells": [4.0]})
    assert (model.weights["birds"].grad, model.weights["cells"].grad) == (3.0, 4.0)
    made.load_state_dict({**made.state_dict(), "grad_scaler": {"scale": 2.0**40, "growth_factor": 2.0}})
    assert made.grad_scaler.get_scale() == 1.0


@pytest.mark.filterwarnings("ignore:.*GradScaler")
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_gpu_computes_in_the_precision_that_is_set(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """One that is not there: as a step of it, Detectron2 calls autocast, and nothing else."""
    cfg = default_config()
    cfg.merge_from_list(["MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True, "XLEARNER.AMP_PRECISION", precision])
    model = ApartLosses()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    made = build_step_trainer(cfg, model, [], torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(made, AMPStepTrainer)
    assert made.precision is autocast_dtype(cfg) is getattr(torch, precision)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_of_one_branch_that_is_not_finite_stops_before_the_optimiser(value: float) -> None:
    model = ApartLosses()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = StepTrainer(LossesByBranch(model), [{"birds": [value], "cells": [2.0]}], optimizer)
    seen: list[NonFiniteLoss] = []
    made.on_non_finite = seen.append
    list(steps(made, 1))
    assert seen[0].reason == f"The loss of step 0 is not finite: birds/loss_0 is {value}."
    assert (seen[0].losses["cells/loss_0"], seen[0].model) == (2.0, model)
    assert all(of.item() == 1 for of in model.weights.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimiser(value: float) -> None:
    """The weights and what is reported are those before the step; other losses are reported as well."""
    made = trainer([{"birds": [1.0], "cells": [2.0]}, {"birds": [1.0], "cells": [3.0, value]}])
    seen: list[NonFiniteLoss] = []
    made.on_non_finite = seen.append
    weights, means = [], []
    for _ in steps(made, 2):
        weights.append(made.module.weight.item())
        means.append(made.module.norm.running_mean.clone())
    (found,) = seen
    assert weights[0] == weights[1]
    assert (found.step, found.batch["cells"][0], found.losses["cells/loss_0"]) == (
        1,
        3.0,
        pytest.approx(3 * weights[0]),
    )
    assert found.reason == f"The loss of step 1 is not finite: cells/loss_1 is {value}."
    assert torch.equal(found.statistics["norm.running_mean"], means[0])
    assert not means[1].isfinite().all()


def test_a_loss_that_is_not_finite_raises_where_nobody_minds_it() -> None:
    with pytest.raises(FloatingPointError, match=r"The loss of step 0 is not finite: birds/loss_0 is nan\."):
        list(steps(trainer([{"birds": [float("nan")]}]), 1))


def test_detectron2_s_own_check_is_reported_with_its_batch() -> None:
    made = trainer([{"raise": []}])
    seen: list[NonFiniteLoss] = []
    made.on_non_finite = seen.append
    list(steps(made, 1))
    assert (seen[0].reason, seen[0].batch, seen[0].losses) == ("Predicted boxes contain Inf/NaN.", {"raise": []}, {})


def test_statistics_of_another_number_of_workers_are_averaged() -> None:
    models = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
    workers = [[{"running_mean": torch.full((2,), float(n)), "running_var": torch.ones(2)}] for n in (1, 2, 6)]
    WorkerStatistics(models[:1]).load_state_dict({"workers": workers})
    assert models[0].running_mean.tolist() == [3, 3]
    WorkerStatistics(models[1:]).load_state_dict(WorkerStatistics(models[:1]).state_dict())
    assert models[1].running_mean.tolist() == [0, 0]  # one worker's are in the model's own state
