"""Two workers learn what one learns from their joint batch; in forked processes with gloo."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from processes import LONG, Processes
from torch import nn

from xlearner_d2 import XLearner
from xlearner_d2.engine.norm_statistics import share_norm_statistics
from xlearner_d2.engine.plan import make_plan
from xlearner_d2.engine.steps import LossesByBranch
from xlearner_d2.engine.trainer import build_loader, distributed
from xlearner_d2.modeling.distill import Distiller
from xlearner_d2.modeling.expanded import TRUNK
from xlearner_d2.modeling.normalisers import NORMALISERS
from xlearner_d2.settings import SHARING

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forked processes cannot use autograd beside GPUs")

#: A detector whose loss is a mean over images, once it samples all anchors; without proposals, as torchvision's NMS
#: does not take double precision.
RPN = {
    "TASK": "detection",
    "CONFIG": "COCO-Detection/rpn_R_50_FPN_1x.yaml",
    "TRAIN": ["tiny_det"],
    "OPTS": [
        "MODEL.FPN.OUT_CHANNELS",
        16,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
        100_000,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
        0,
    ],
}
RETINANET = {
    "TASK": "detection",
    "CONFIG": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "TRAIN": ["tiny_det"],
    "OPTS": ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RETINANET.NUM_CONVS", 1],
}


@pytest.fixture
def build(tiny_cfg):
    """A model in double precision, with group norm or another, whose reconciliation layers do something."""

    def build(*opts, boxes=None, norm="GN"):
        cfg = tiny_cfg.clone()
        for source in ("boxes", "areas"):  # those of their necks, which have fewer channels than groups
            cfg.XLEARNER.SOURCES[source].OPTS += ["MODEL.FPN.NORM", "" if norm == "GN" else norm]
        widths = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 32]
        cfg.merge_from_list([*widths, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.NORM", norm, *opts])
        cfg.XLEARNER.SOURCES.boxes = CfgNode(boxes) if boxes else cfg.XLEARNER.SOURCES.boxes
        torch.manual_seed(0)
        model = build_model(cfg)
        for parameter in model.backbone.reconciliation.parameters():
            nn.init.normal_(parameter, std=0.1)
        return model.double()

    return build


@pytest.fixture
def in_two(tmp_path):
    """What ``work(rank)`` returns in each of two workers."""

    def in_two(work):
        def start(rank):
            init = f"file://{tmp_path}/meeting"
            dist.init_process_group("gloo", init, timedelta(seconds=LONG), world_size=2, rank=rank)
            comm.create_local_process_group(2)
            torch.save(work(rank), tmp_path / f"{rank}.pt")

        processes = Processes(start, 2, tmp_path)
        assert processes.wait() == [0, 0], processes.errors()
        (tmp_path / "meeting").unlink(missing_ok=True)
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    return in_two


def share(batches, rank):
    """One worker's half of each source's images."""
    return {source: records[rank * len(records) // 2 :][: len(records) // 2] for source, records in batches.items()}


def gradients(model, batches):
    """Of each parameter that has one, without prefixes of wrappers; those of an earlier call are forgotten."""
    model.train()
    model.zero_grad()
    with EventStorage():
        losses = model(batches)
        for part in [losses] if isinstance(losses, dict) else losses:
            sum(part.values()).backward()
    return {
        name.removeprefix("module.").removeprefix("model."): value.grad.clone()
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def norm_statistics(model):
    return {name: value for name, value in model.named_buffers() if name.endswith(("running_mean", "running_var"))}


def assert_close(found, wanted, *, tolerance=1e-6, least=0.0):
    """Each tensor is as wanted, but for an error relative to its norm, or to ``least`` where that is larger."""
    assert found.keys() == wanted.keys()
    errors = {name: float((found[name] - value).norm()) for name, value in wanted.items()}
    allowed = {name: tolerance * max(float(value.norm()), least) for name, value in wanted.items()}
    assert {name: error for name, error in errors.items() if error > allowed[name]} == {}


def test_gradients_are_those_of_the_joint_batch(build, make_batches, in_two):
    """In all four kinds of sharing, of networks of timm, branch by branch, and for hints and labels in the squeeze."""
    batches = make_batches(count=2)
    models = {sharing: build("XLEARNER.SHARING", sharing, boxes=RPN) for sharing in SHARING}
    models["timm"] = build("MODEL.BACKBONE.TIMM", "test_convnext2", boxes=RPN)
    learner = build("XLEARNER.SHARING", "shared", boxes=RPN)
    models["squeeze"] = Distiller(
        student=learner.backbone.branch(TRUNK),
        teacher=build(boxes=RPN).freeze(),
        stage_weights={"res4": 1.0, "res5": 1.0},
        learner=learner,
    ).double()

    def work(rank):
        mine = share(batches, rank)
        learners = {name: LossesByBranch(m) if isinstance(m, XLearner) else m for name, m in models.items()}
        return {name: gradients(distributed(model, alternating=False), mine) for name, model in learners.items()}

    first, second = in_two(work)
    for name in models:
        wanted = gradients(models[name], batches)
        assert sum(value.norm() > 0 for value in wanted.values()) > 0.9 * len(wanted)
        assert_close(first[name], wanted)
        assert_close(second[name], wanted)


def keep_plain_variance(module, args, _):
    """Take Bessel's correction out of the running variance, as Detectron2's synchronised layer does not have it."""
    if module.training:
        variance = args[0].var(dim=(0, 2, 3)).detach()
        module.running_var.data -= module.momentum * variance / (args[0].numel() / args[0].shape[1])


def test_synchronised_norm_layers_see_the_joint_batch(build, make_batches, in_two):
    batches = make_batches(count=4)
    model = build(boxes=RPN, norm="naiveSyncBN")
    alone = copy.deepcopy(model)
    learner = LossesByBranch(model)  # a branch's reductions come between the exchanges of two others
    first, second = in_two(
        lambda rank: (gradients(distributed(learner, alternating=False), share(batches, rank)), norm_statistics(model))
    )
    for module in alone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(keep_plain_variance)
    wanted = gradients(alone, batches)
    # The layer that follows takes a shift out again: its gradient is next to nothing, the rest of large numbers.
    least = max(float(value.norm()) for value in wanted.values()) / 1000
    for found in (first, second):
        assert_close(found[0], wanted, least=least)
        assert_close(found[1], norm_statistics(alone))


def test_workers_with_images_of_other_sizes_exchange_the_same_statistics(build, make_batches, in_two):
    """The sources of one size on one worker are of two on the other: each worker alone would form other groups."""
    batches = make_batches(count=4)
    for record in batches["areas"][2:]:
        record["image"] = record["image"].repeat(1, 1, 2)
        record["sem_seg"] = record["sem_seg"].repeat(1, 2)
        record["width"] *= 2
    learner = build("XLEARNER.SHARING", "shared", norm="naiveSyncBN")
    distiller = Distiller(
        student=learner.backbone.branch(TRUNK),
        teacher=build().freeze(),
        stage_weights={"res5": 1.0},
        normaliser="phi_s",
        learner=learner,
    ).float()
    distiller.teacher.float()
    learner.float()

    def work(rank):
        sizes = [len(group.rows) for group in distiller.teacher.image_groups(share(batches, rank), together=True)]
        gradients(distributed(distiller, alternating=False), share(batches, rank))
        return sizes, dict(distiller.named_buffers())

    (sizes, first), (other_sizes, second) = in_two(work)
    assert sizes == other_sizes == [2, 1]
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("boxes", [None, RETINANET], ids=["mask_rcnn", "retinanet"])
def test_heads_that_count_on_their_own_average_over_the_workers(build, make_batches, in_two, boxes):
    """As in Detectron2. A source without weight, a frozen branch or images without an object are no hindrance."""
    batches = make_batches(count=4)
    model = build(boxes=boxes).float()
    model.loss_weights["pics"] = 0.0
    model.backbone.branch("segmentation").requires_grad_(False)
    for record in batches["boxes"][2:]:
        record["instances"] = record["instances"][:0]

    def work(rank):
        alone = copy.deepcopy(model)
        torch.manual_seed(rank)
        wanted = gradients(alone, share(batches, rank))
        for value in wanted.values():
            dist.all_reduce(value)
            value /= 2
        together = distributed(copy.deepcopy(model), alternating=False)
        torch.manual_seed(rank)
        found = gradients(together, share(batches, rank))
        gradients(together, share(batches, rank))  # where DDP would say that a gradient was missing
        return found, wanted

    for found, wanted in in_two(work):
        assert_close(found, wanted, tolerance=1e-5)
        assert not any(value.any() for name, value in found.items() if name.startswith("heads.pics"))


def test_running_statistics_become_their_mean(in_two):
    def work(rank):
        norm = nn.BatchNorm2d(2)
        norm.running_mean += torch.tensor([2.0, 4.0]) * rank
        norm.running_var += rank
        share_norm_statistics(norm)
        return norm.running_mean, norm.running_var

    for mean, var in in_two(work):
        assert (mean.tolist(), var.tolist()) == ([1.0, 2.0], [1.5, 1.5])


@pytest.mark.parametrize("kind", sorted(NORMALISERS))
def test_normalisers_know_the_joint_batch(in_two, kind):
    """Whose halves differ in their means, so that what is between them counts as well."""
    torch.manual_seed(0)
    batches = [torch.cat([torch.randn(2, 4, 3, 3), 5 + 2 * torch.randn(2, 4, 3, 3)]) for _ in range(3)]

    def known(rank=None):
        normaliser = NORMALISERS[kind](4)
        for batch in batches:
            normaliser.update(batch if rank is None else batch[2 * rank :][:2])
        return normaliser(batches[0])

    alone = known()
    for found in in_two(known):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_the_images_of_a_step_are_the_same_for_any_number_of_workers(project, in_two, monkeypatch):
    """Those of two workers together, each once; on one machine as on two."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    plans = [make_plan(project.load(), world_size=count) for count in (1, 2)]

    def steps(plan):
        return [
            {source: [record["file_name"] for record in records] for source, records in batches.items()}
            for batches, _ in zip(build_loader(plan, "expand"), range(4), strict=False)
        ]

    alone = steps(plans[0])
    for first, second, together in zip(*in_two(lambda rank: steps(plans[1])), alone, strict=True):
        for source, files in together.items():
            assert sorted(first[source] + second[source]) == sorted(files)
            assert len(first[source]) == len(second[source])
