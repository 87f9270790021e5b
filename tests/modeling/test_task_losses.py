"""A student that learns from labels as well as from hints."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from xlearner_d2 import XLearner
from xlearner_d2.modeling.distill import Distiller
from xlearner_d2.modeling.expanded import STAGES, TRUNK

Batches = dict[str, list[dict[str, Any]]]
MakeDistiller = Callable[..., Distiller]
MakeBatches = Callable[..., Batches]


@pytest.fixture
def make_distiller(make_model: Callable[..., XLearner]) -> MakeDistiller:
    """A teacher of three branches, and a student with heads of its own."""

    def make(**options: Any) -> Distiller:
        learner = make_model("XLEARNER.SHARING", "shared", seed=1)
        student = learner.backbone.branch(TRUNK)
        teacher = make_model().freeze()
        options = {"stage_weights": dict.fromkeys(STAGES, 1.0), "learner": learner, **options}
        torch.manual_seed(2)
        return Distiller(student=student, teacher=teacher, **options).train()

    return make


def losses_of(distiller: nn.Module, batches: Batches) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with EventStorage():
        return distiller(batches)


def hints(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss for name, loss in losses.items() if name.startswith("loss_hint_")}


def gradient(loss: Any, distiller: Distiller) -> dict[str, Tensor]:
    """Of every parameter of the student."""
    parameters = dict(distiller.student.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {name: torch.zeros(()) if g is None else g for name, g in zip(parameters, found, strict=True)}


def test_losses_are_the_hints_and_those_of_every_head(make_distiller: MakeDistiller, make_batches: MakeBatches) -> None:
    losses = losses_of(make_distiller(), make_batches())
    assert list(losses)[:3] == ["loss_hint_classification", "loss_hint_detection", "loss_hint_segmentation"]
    sources = [name.split("/")[0] for name in list(losses)[3:]]
    assert sources == sorted(sources, key=["pics", "boxes", "areas"].index)
    assert {*sources} == {"pics", "boxes", "areas"}
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("source", ["pics", "boxes", "areas"])
def test_a_heads_losses_reach_the_whole_student(
    make_distiller: MakeDistiller, make_batches: MakeBatches, source: str
) -> None:
    distiller = make_distiller()
    losses = losses_of(distiller, make_batches())
    total = sum(loss for name, loss in losses.items() if name.startswith(f"{source}/"))
    assert all(found.any() for found in gradient(total, distiller).values())


def test_every_parameter_learns_and_the_teacher_does_not(
    make_distiller: MakeDistiller, make_batches: MakeBatches
) -> None:
    distiller = make_distiller()
    before = {name: value.clone() for name, value in distiller.teacher.state_dict().items()}
    sum(losses_of(distiller, make_batches()).values()).backward()
    assert [name for name, p in distiller.named_parameters() if p.grad is None] == []
    assert {name.split(".")[0] for name, _ in distiller.named_parameters()} == {"student", "projectors", "heads"}
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())


def test_hints_are_those_without_task_losses(make_distiller: MakeDistiller, make_batches: MakeBatches) -> None:
    batches = make_batches()
    found = losses_of(make_distiller(), batches)
    for name, loss in losses_of(make_distiller(learner=None), batches).items():
        assert torch.equal(found[name], loss)


def test_task_losses_are_those_of_the_learner(make_distiller: MakeDistiller, make_batches: MakeBatches) -> None:
    """The same model, trained as an expansion of one trunk."""
    batches = make_batches()
    found = losses_of(make_distiller(), batches)
    alone = losses_of(make_distiller().learner.train(), batches)
    assert alone.keys() == found.keys() - hints(found).keys()
    for name, loss in alone.items():
        torch.testing.assert_close(found[name], loss)


@pytest.mark.parametrize("weight", [0.25, 3.0])
def test_hint_weight_scales_hints_and_their_gradient_alone(
    make_distiller: MakeDistiller, make_batches: MakeBatches, weight: float
) -> None:
    batches = make_batches()
    plain, weighted = make_distiller(), make_distiller(hint_weight=weight)
    first, second = losses_of(plain, batches), losses_of(weighted, batches)
    for name, loss in first.items():
        torch.testing.assert_close(second[name], loss * (weight if name in hints(first) else 1))
    of_hints = [gradient(sum(hints(losses).values()), d) for losses, d in ((first, plain), (second, weighted))]
    for name, found in of_hints[0].items():
        assert (of_hints[1][name] - weight * found).norm() <= 1e-3 * weight * found.norm()


def test_without_hints_the_student_moves_as_the_learner_would(
    make_distiller: MakeDistiller, make_batches: MakeBatches
) -> None:
    batches = make_batches()
    distiller, learner = make_distiller(hint_weight=0.0), make_distiller().learner
    asked: list[str] = []
    for task in distiller.teacher.backbone.tasks:
        distiller.teacher.backbone.branch(task).register_forward_pre_hook(lambda *_, task=task: asked.append(task))
    found, alone = losses_of(distiller, batches), losses_of(learner.train(), batches)
    assert found.keys() == alone.keys()
    for name, loss in alone.items():
        torch.testing.assert_close(found[name], loss)
    assert not asked
    assert not list(distiller.projectors.parameters())


def test_state_holds_the_student_once(make_distiller: MakeDistiller) -> None:
    state = make_distiller().state_dict()
    assert {name.split(".")[0] for name in state} == {"student", "heads", "projectors", "normalisers"}
    pointers = [value.data_ptr() for value in state.values() if value.numel()]
    assert len(pointers) == len({*pointers})


def test_in_evaluation_there_are_hints_alone(make_distiller: MakeDistiller, make_batches: MakeBatches) -> None:
    """Heads predict then; their predictions are no losses."""
    losses = losses_of(make_distiller().eval(), make_batches())
    assert losses.keys() == hints(losses).keys()


def test_a_source_that_the_learner_lacks_is_an_error(make_distiller: MakeDistiller, make_batches: MakeBatches) -> None:
    distiller = make_distiller()
    del distiller.learner.heads["areas"]
    with pytest.raises(KeyError, match="areas"):
        losses_of(distiller, make_batches())


def test_a_head_that_mixes_learns_through_the_student(
    tiny_cfg: CfgNode, make_distiller: MakeDistiller, make_batches: MakeBatches
) -> None:
    tiny_cfg.XLEARNER.SOURCES.pics.OPTS = ["MODEL.CLASSIFIER.MIXUP", 1.0]
    distiller = make_distiller()
    losses = losses_of(distiller, make_batches("pics"))
    assert all(found.any() for found in gradient(losses["pics/loss_cls"], distiller).values())


def test_a_head_that_mixes_runs_the_student_again_whatever_it_draws(
    tiny_cfg: CfgNode, make_distiller: MakeDistiller, make_batches: MakeBatches
) -> None:
    """Workers draw mixtures of their own, and the student's norm layers may be synchronised."""
    tiny_cfg.XLEARNER.SOURCES.pics.OPTS = ["MODEL.CLASSIFIER.MIXUP", 1.0]
    distiller = make_distiller().train()
    calls: list[int] = []
    distiller.student.stem.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    for share in (0.3, 1.0):  # the second leaves the images as they are
        calls.clear()
        distiller.learner.heads["pics"].mixup._params_per_batch = lambda share=share: (share, False)
        losses_of(distiller, make_batches("pics"))
        assert len(calls) == 2
