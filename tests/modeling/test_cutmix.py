"""Hints for images that are cut and pasted from two of a step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from xlearner_d2 import XLearner
from xlearner_d2.modeling import distill
from xlearner_d2.modeling.distill import Distiller, cutmix
from xlearner_d2.modeling.expanded import STAGES, TRUNK

Batches = dict[str, list[dict[str, Any]]]
MakeDistiller = Callable[..., Distiller]
MakeBatches = Callable[..., Batches]


@pytest.fixture
def make_distiller(make_model: Callable[..., XLearner]) -> MakeDistiller:
    """A frozen teacher of three branches, and a student with or without heads of its own."""

    def make(*, labels: bool = True, **options: Any) -> Distiller:
        learner = make_model("XLEARNER.SHARING", "shared", seed=1)
        options = {"stage_weights": dict.fromkeys(STAGES, 1.0), "learner": learner if labels else None, **options}
        student, teacher = learner.backbone.branch(TRUNK), make_model().freeze()
        torch.manual_seed(2)
        return Distiller(student=student, teacher=teacher, **options).train()

    return make


def losses_of(distiller: Distiller, batches: Batches) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with EventStorage():
        return distiller(batches)


@pytest.mark.parametrize("seed", range(10))
def test_a_rectangle_of_one_other_image_is_pasted_in_place(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 24, 32).clone()  # each has a value of its own
    mixed = cutmix(images, 1.0)
    assert torch.equal(images[:, 0, 0, 0], torch.arange(5.0))  # they stay as they were
    givers = []
    for own, image in enumerate(mixed):
        assert torch.equal(image, image[:1].expand(3, 24, 32))  # all channels alike
        foreign = image[0] != own
        rows, columns = foreign.any(dim=1), foreign.any(dim=0)
        assert torch.equal(foreign, rows[:, None] & columns)
        for line in (rows, columns):
            assert line.int().diff().abs().sum() <= 2  # without a gap
        givers += image[0][foreign].unique().tolist()
    assert len(givers) == len(set(givers))  # each is pasted into one image at most


def test_shares_are_uniform_and_every_image_may_be_pasted() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    images = torch.arange(400.0).view(400, 1, 1, 1).expand(400, 3, 32, 32)
    shares = (cutmix(images, 1.0) != images)[:, 0].float().mean(dim=(1, 2))
    # Uniform on [0, 1] but for what reaches over the edge: from a rectangle's centre anywhere in the image.
    assert shares.max() > 0.9
    assert 0.2 < shares.mean() < 0.5


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("own_images", [True, False])
def test_an_image_mixed_with_itself_changes_nothing(
    make_distiller: MakeDistiller,
    make_batches: MakeBatches,
    monkeypatch: pytest.MonkeyPatch,
    labels: bool,
    own_images: bool,
) -> None:
    """Hints, labels and gradients are those without the option: twice the same images have the same statistics."""
    monkeypatch.setattr(distill, "cutmix", lambda images, strength: images.clone())
    found = []
    for mixes in (False, True):
        distiller = make_distiller(labels=labels, own_images=own_images, cutmix=float(mixes))
        losses = losses_of(distiller, make_batches())
        gradients = torch.autograd.grad(sum(losses.values()), list(distiller.student.parameters()))
        found.append((losses, torch.cat([gradient.flatten() for gradient in gradients])))
    (losses, gradient), (expected, expected_gradient) = found
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()


def test_branches_are_asked_about_the_mixed_images_and_heads_about_the_steps_own(
    make_distiller: MakeDistiller, make_batches: MakeBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, mixing = make_distiller(), make_distiller(cutmix=1.0)
    asked: list[Tensor] = []
    shown: list[Tensor] = []
    for branch in mixing.teacher.backbone.branches.values():
        branch.stem.register_forward_hook(lambda _module, inputs, _output: asked.append(inputs[0]))
    mixing.student.stem.register_forward_hook(lambda _module, inputs, _output: shown.append(inputs[0]))
    monkeypatch.setattr(distill, "cutmix", lambda images, strength: images.flip(0))
    batches = make_batches()
    losses = losses_of(mixing, batches)
    expected = losses_of(plain, batches)  # the same images in another order: means and statistics are the same
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    (both,) = shown
    own, mixed = both.chunk(2)
    assert torch.equal(mixed, own.flip(0))
    assert not torch.equal(mixed, own)
    assert len(asked) == 3
    assert all(torch.equal(images, mixed) for images in asked)


@pytest.mark.parametrize(("training", "weight"), [(False, 1.0), (True, 0.0)])
def test_nothing_is_mixed_in_validation_or_without_hints(
    make_distiller: MakeDistiller,
    make_batches: MakeBatches,
    monkeypatch: pytest.MonkeyPatch,
    training: bool,
    weight: float,
) -> None:
    monkeypatch.setattr(distill, "cutmix", None)  # calling it would fail
    distiller = make_distiller(cutmix=1.0, hint_weight=weight).train(training)
    losses = losses_of(distiller, make_batches())
    assert losses
    assert all(loss.isfinite() for loss in losses.values())
