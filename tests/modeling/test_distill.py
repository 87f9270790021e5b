"""The laws of the squeeze loss, and that the teacher stays as it is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context
from torch import Tensor, nn

from xlearner_d2 import XLearner
from xlearner_d2.modeling.distill import DISTANCES, Distiller, matched_stages
from xlearner_d2.modeling.expanded import build_branch
from xlearner_d2.modeling.normalisers import NORMALISERS

STAGES = ("res2", "res3", "res4", "res5")

MakeDistiller = Callable[..., Distiller]
MakeBatches = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture
def make_distiller(tiny_cfg: CfgNode, make_model: Callable[..., XLearner]) -> MakeDistiller:
    """A narrow student of all branches: ``make_distiller(distance="mse")``."""

    def make(*opts: Any, teacher: XLearner | None = None, res5_dilation: int = 1, **options: Any) -> Distiller:
        teacher = teacher or make_model(*opts)
        torch.manual_seed(1)
        student = build_branch(tiny_cfg, out_features=STAGES, res5_dilation=res5_dilation)
        return Distiller(student=student, teacher=teacher, **{"stage_weights": dict.fromkeys(STAGES, 1.0), **options})

    return make


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def make_identical(distiller: Distiller, task: str) -> None:
    """Give the student the branch's weights, and the projectors the identity."""
    distiller.student.load_state_dict(distiller.teacher.backbone.branches[task].state_dict())
    for projector in distiller.projectors[task].values():
        nn.init.dirac_(projector.weight)
        nn.init.zeros_(projector.bias)


# Distances


@pytest.mark.parametrize("name", DISTANCES)
def test_distance_is_zero_at_the_target_alone(name: str) -> None:
    target = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    assert DISTANCES[name](target, target).abs() < 1e-6
    assert DISTANCES[name](-target, target) > 0.1


def test_mixed_distance_is_half_of_each() -> None:
    hint, target = torch.randn(2, 2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    halves = 0.5 * DISTANCES["cosine"](hint, target) + 0.5 * DISTANCES["smooth_l1"](hint, target)
    torch.testing.assert_close(DISTANCES["cosine_smooth_l1"](hint, target), halves)


@pytest.mark.parametrize("distance", DISTANCES)
def test_identical_student_has_no_hint_loss(
    make_distiller: MakeDistiller, make_batches: MakeBatches, distance: str
) -> None:
    distiller = make_distiller("XLEARNER.SHARING", "separate", distance=distance, normaliser="none").eval()
    make_identical(distiller, "detection")
    losses = distiller(make_batches())
    assert losses["loss_hint_detection"].abs() < 1e-6
    assert losses["loss_hint_segmentation"] > 1e-3


# Normalisers


@pytest.mark.parametrize("name", NORMALISERS)
def test_statistics_move_in_training_only(make_distiller: MakeDistiller, make_batches: MakeBatches, name: str) -> None:
    distiller = make_distiller(normaliser=name)
    before = state_of(distiller.normalisers)
    distiller.eval()(make_batches())
    assert equal(before, distiller.normalisers.state_dict())
    distiller.train()(make_batches())
    assert bool(before) != equal(before, distiller.normalisers.state_dict())


# Teacher


@pytest.mark.parametrize("frozen", [True, False])
def test_teacher_is_left_alone(make_distiller: MakeDistiller, make_batches: MakeBatches, frozen: bool) -> None:
    distiller = make_distiller().train()
    teacher = distiller.teacher.freeze() if frozen else distiller.teacher.train()
    before, modes = state_of(teacher), [module.training for module in teacher.modules()]
    sum(distiller(make_batches()).values()).backward()
    assert equal(before, teacher.state_dict())
    assert [p for p in teacher.parameters() if p.grad is not None] == []
    assert [module.training for module in teacher.modules()] == modes


def test_frozen_teacher_stays_frozen(make_distiller: MakeDistiller, make_batches: MakeBatches) -> None:
    distiller = make_distiller()
    teacher = distiller.teacher.freeze()
    distiller.train()
    teacher.train()
    with inference_context(teacher), torch.no_grad():
        teacher(make_batches())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_teacher_is_in_no_state_dict(make_distiller: MakeDistiller) -> None:
    distiller = make_distiller()
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "projectors", "normalisers"}
    teachers = {id(p) for p in distiller.teacher.parameters()}
    assert not teachers & {id(p) for p in distiller.parameters()}
    pointers = [value.data_ptr() for value in distiller.state_dict().values()]
    assert not set(pointers) & {value.data_ptr() for value in distiller.teacher.state_dict().values()}


def test_targets_are_those_of_inference(make_distiller: MakeDistiller, make_batches: MakeBatches) -> None:
    """A teacher in training mode gives the hints it would give in inference."""
    distiller = make_distiller().eval()
    distiller.teacher.train()
    first = distiller(make_batches())
    distiller.teacher.eval()
    assert equal(first, distiller(make_batches()))


@pytest.mark.parametrize("network", ["", "convnext_atto"])
def test_hints_are_the_same_from_weights_in_low_precision(
    make_distiller: MakeDistiller, make_batches: MakeBatches, network: str
) -> None:
    distiller = make_distiller("MODEL.BACKBONE.TIMM", network, "XLEARNER.SQUEEZE.DEPTH", 18).eval()
    teacher = distiller.teacher.freeze()
    distiller.autocast_dtype = torch.bfloat16
    expected, before = distiller(make_batches()), state_of(teacher)
    teacher.keep_in(torch.bfloat16)
    assert equal(expected, distiller(make_batches()))
    lowered = {name for name, value in teacher.state_dict().items() if value.dtype == torch.bfloat16}
    assert {name for name, value in before.items() if value.dim() == 4 and name.startswith("backbone.")} <= lowered
    assert not any("norm" in name or "heads." in name for name in lowered)


# Distiller


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_precision_is_the_squeezes_own(
    make_distiller: MakeDistiller, make_batches: MakeBatches, dtype: torch.dtype | None
) -> None:
    """Whatever that of the expansion is, whose branches may learn beside it."""
    distiller = make_distiller(autocast_dtype=dtype).eval()
    distiller.teacher.autocast_dtype = torch.bfloat16 if dtype is None else None
    found: list[torch.dtype] = []
    distiller.student.res5.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    distiller(make_batches())
    assert set(found) == {dtype or torch.float32}


@pytest.mark.parametrize("sharing", ["separate", "shared", "detached", "bidirectional"])
def test_every_parameter_gets_a_gradient(
    make_distiller: MakeDistiller, make_batches: MakeBatches, sharing: str
) -> None:
    distiller = make_distiller("XLEARNER.SHARING", sharing).train()
    sum(distiller(make_batches()).values()).backward()
    assert [name for name, p in distiller.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_each_task_gives_one_loss_whatever_the_sources_are(
    make_distiller: MakeDistiller, make_batches: MakeBatches
) -> None:
    distiller = make_distiller()
    expected = {"loss_hint_classification", "loss_hint_detection", "loss_hint_segmentation"}
    for sources in (("pics",), ("boxes", "areas"), ("pics", "boxes", "areas")):
        losses = distiller(make_batches(*sources))
        assert set(losses) == expected
        assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("training", [True, False])
def test_loss_does_not_depend_on_the_split_over_sources(
    make_distiller: MakeDistiller, make_batches: MakeBatches, training: bool
) -> None:
    images = [item for items in make_batches().values() for item in items]
    splits = [{"pics": images}, {"pics": images[:2], "boxes": images[2:]}, {"boxes": images[:1], "areas": images[1:]}]
    losses = [copy.deepcopy(make_distiller().train(training))(split) for split in splits]
    assert equal(losses[0], losses[1])
    assert equal(losses[0], losses[2])


def resized(items: list[dict[str, Any]], height: int, width: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(height)
    shape = (3, height, width)
    return [{**item, "image": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)} for item in items]


def test_images_of_one_size_go_together(make_distiller: MakeDistiller, make_batches: MakeBatches) -> None:
    batches = make_batches()
    batches["boxes"] = resized(batches["boxes"], 40, 70)  # padded to 64 x 96
    batches["areas"] = resized(batches["areas"], 60, 64)  # padded to the size of the others
    distiller = make_distiller().eval()
    groups = distiller.teacher.image_groups(batches, together=True)
    assert [tuple(group.images.shape) for group in groups] == [(4, 3, 64, 64), (2, 3, 64, 96)]
    assert not groups[1].images[:, :, 40:].any()
    assert not groups[1].images[:, :, :, 70:].any()
    alone, others = distiller({"boxes": batches.pop("boxes")}), distiller(batches)
    mixed = distiller({**batches, "boxes": resized([{}, {}], 40, 70)})
    for name, loss in mixed.items():
        torch.testing.assert_close(loss, (4 * others[name] + 2 * alone[name]) / 6)


def test_stage_weights_scale_the_stages(make_distiller: MakeDistiller, make_batches: MakeBatches) -> None:
    def loss(**weights: float) -> Tensor:
        return make_distiller(stage_weights=weights).eval()(make_batches("pics"))["loss_hint_detection"]

    # Projectors are drawn in the order of the stages, so one stage alone is drawn alike.
    torch.testing.assert_close(loss(res3=2.5), 2.5 * loss(res3=1.0))


def test_a_stage_learns_from_the_mean_of_a_shallower_one(
    make_distiller: MakeDistiller, make_batches: MakeBatches
) -> None:
    """The target of the student's res5 is the branch's res4, averaged over each 2 x 2 positions."""
    options: dict[str, Any] = {"stage_weights": {"res5": 1.0}, "normaliser": "none"}
    distiller = make_distiller("XLEARNER.SHARING", "separate", teacher_stages={"res5": "res4"}, **options).eval()
    batches = make_batches("pics")
    (group,) = distiller.teacher.image_groups(batches, together=True)
    with torch.no_grad():
        branch = distiller.teacher.backbone.forward_all(group.images)["detection"]["res4"]
        n, c, height, width = branch.shape
        expected = branch.reshape(n, c, height // 2, 2, width // 2, 2).mean(dim=(3, 5))
        projector = distiller.projectors["detection"]["res5"]
        projected = projector(distiller.student(group.images)["res5"])
        torch.testing.assert_close(
            distiller(batches)["loss_hint_detection"], (projected - expected).square().mean(), rtol=1e-5, atol=1e-7
        )
    assert projector.weight.shape == (c, distiller.student.output_shape()["res5"].channels, 1, 1)


@pytest.mark.parametrize("own_images", [False, True])
def test_the_teacher_computes_no_stage_that_gives_no_hint(
    make_distiller: MakeDistiller, make_batches: MakeBatches, own_images: bool
) -> None:
    options: dict[str, Any] = {"stage_weights": {"res4": 1.0, "res5": 1.0}, "own_images": own_images}
    distiller = make_distiller(teacher_stages={"res4": "res3", "res5": "res4"}, **options)
    run: list[str] = []
    for task, branch in distiller.teacher.backbone.branches.items():
        for stage in STAGES:
            getattr(branch, stage).register_forward_hook(lambda *_, name=f"{task} {stage}": run.append(name))
    distiller(make_batches())
    assert {name.split()[1] for name in run} == {"res2", "res3", "res4"}
    assert {name.split()[0] for name in run} == {"classification", "detection", "segmentation"}


def test_branch_without_a_stage_gives_no_hint_of_it(make_distiller: MakeDistiller, tiny_cfg: CfgNode) -> None:
    opts = [*tiny_cfg.XLEARNER.SOURCES.pics.get("OPTS", []), "MODEL.RESNETS.OUT_FEATURES", ["res4"]]
    tiny_cfg.XLEARNER.SOURCES.pics.OPTS = [*opts, "MODEL.CLASSIFIER.IN_FEATURE", "res4"]
    distiller = make_distiller()
    assert list(distiller.projectors["classification"]) == ["res2", "res3", "res4"]
    assert list(distiller.projectors["detection"]) == list(STAGES)


def test_student_of_another_stride_is_refused(make_distiller: MakeDistiller) -> None:
    with pytest.raises(ValueError, match="the student's res5 has stride 16, but a branch's res5 32"):
        make_distiller(res5_dilation=2)
    make_distiller(res5_dilation=2, teacher_stages={"res5": "res4"})


@pytest.mark.parametrize(("option", "name"), [("distance", "euclid"), ("normaliser", "l3")])
def test_unknown_choice_is_refused(make_distiller: MakeDistiller, option: str, name: str) -> None:
    with pytest.raises(KeyError, match=name):
        make_distiller(**{option: name})


def test_stages_and_weights_come_in_pairs() -> None:
    assert matched_stages(["res2", "res3", "res4"], [1.0, 0.0, 0.5]) == {"res2": 1.0, "res4": 0.5}
    with pytest.raises(ValueError, match="shorter"):
        matched_stages(["res2", "res3"], [1.0])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projectors_have_so_many_layers_and_all_learn(
    make_distiller: MakeDistiller, make_batches: MakeBatches, layers: int
) -> None:
    distiller = make_distiller(projector_layers=layers)
    projector = distiller.projectors["detection"]["res4"]
    convolutions = [module for module in projector.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in projector.modules() if isinstance(module, nn.BatchNorm2d)]
    assert (len(convolutions), len(norms)) == (layers, layers - 1)
    torch.stack(list(distiller(make_batches()).values())).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in projector.parameters())
