"""What training costs, against what it has to cost: one function for each ratio that docs/SPEED.md reports."""

import copy
import functools
import itertools
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from models import HEADS, THREE_TASKS, Batch, make_batch, make_config, make_model
from timing import Run, in_turn, peak_bytes, ratio
from torch import Tensor
from torch.nn.functional import interpolate

from xlearner_d2 import XLearner
from xlearner_d2.engine.optimizer import AdamW, make_optimizer
from xlearner_d2.engine.steps import LossesByBranch
from xlearner_d2.engine.trainer import StepSeed, build_step_trainer
from xlearner_d2.modeling import linear_head
from xlearner_d2.modeling.distill import Distiller, matched_stages
from xlearner_d2.modeling.expanded import build_branch
from xlearner_d2.modeling.heads import head_config
from xlearner_d2.modeling.small_maps import multiply_small_maps
from xlearner_d2.modeling.xlearner import autocast_dtype, cpu_autocast_dtype
from xlearner_d2.specs import SourceSpec

Found = dict[str, dict[str, float]]


def backward(losses: Mapping[str, Tensor]) -> None:
    """The gradient of a sum of losses."""
    sum(losses.values()).backward()  # type: ignore[union-attr]


def mixed_precision(args: Namespace) -> torch.autocast:
    """What Detectron2's AMPTrainer does on a GPU; on a CPU, models choose their precision themselves."""
    return torch.autocast("cuda", enabled=args.amp and torch.cuda.is_available())


def train(args: Namespace, model: Any, batch: Any, *, at_once: bool = False) -> None:
    """Forward and backward pass as in training: gradients start from nothing.

    Args:
        at_once: one backward pass for all branches, as of any other model of several tasks.
    """
    model.zero_grad()
    by_branch = isinstance(model, XLearner) and not at_once
    with EventStorage(), mixed_precision(args):
        for losses in model.losses_by_branch(batch) if by_branch else [model(batch)]:
            with torch.autocast("cuda", enabled=False):
                backward(losses)


def precision(args: Namespace) -> tuple[str, bool]:
    """Options that choose the precision."""
    return ("SOLVER.AMP.ENABLED", args.amp)


def one_source_step(args: Namespace) -> Found:
    """A step of training with one source against stock Detectron2's, on the same model and images.

    Both whole: ours with its seed, the checks and the logging of losses and its optimiser, as a run has them.
    """
    found = {}
    for head, config in HEADS.items():
        # Stock Detectron2 has none of the three; without them only the project's own overhead is left.
        options = ("XLEARNER.CHANNELS_LAST", False, "SOLVER.AMP.ENABLED", False, "SOLVER.OPTIMIZER", "SGD")
        cfg = make_config((head,), *options)
        ours = build_model(cfg)
        source = SourceSpec(name="only", task="task", config=config, train=("benchmark",))
        alone = head_config(source, cfg).clone()
        alone.defrost()
        alone.MODEL.BACKBONE.FREEZE_AT = 0
        stock = build_model(alone)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters())
        batch = make_batch(ours, count=args.images, size=args.size)
        repeated = itertools.repeat(batch)
        trainer = build_step_trainer(cfg, LossesByBranch(ours), repeated, make_optimizer(cfg, ours))
        trainer.register_hooks([StepSeed(seed=0)])
        reference = SimpleTrainer(stock, itertools.repeat(batch["source0"]), build_optimizer(alone, stock))
        runs = {"ours": _stepper(trainer), "stock": _stepper(reference)}
        times = in_turn(runs, rounds=args.rounds, by=args.by)
        found[head] = ratio(times["ours"], times["stock"])
    return found


def _stepper(trainer: SimpleTrainer) -> Run:
    trainer.iter = 0

    def run() -> None:
        with EventStorage() as trainer.storage:
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()

    return run


def expansion_step(args: Namespace) -> Found:
    """Forward and backward pass of three tasks against the sum of its parts, timed one by one on the same modules.

    The parts: each source's head, branch and incoming layers with what the other branches send given, forward and
    backward; and the other branches' stages as deep as they are read, forward alone. The second ratio leaves the
    reconciliation layers out of the parts, so it shows what these layers add.
    """
    model = make_model(THREE_TASKS, *precision(args))
    plain = make_model(THREE_TASKS, "XLEARNER.SHARING", "separate", *precision(args))
    batch = make_batch(model, count=args.images, size=args.size)
    backbone = model.backbone
    images = {source: model.preprocess(source, records) for source, records in batch.items()}
    needed = {source: backbone._sources_of(model.task_of[source]) for source in batch}
    compute = backbone._auxiliary

    def others() -> dict[str, Any]:
        with model.autocast(), mixed_precision(args):
            return {source: compute(of, needed[source]) for source, of in images.items()}

    sent, receive = others(), backbone.received

    def own() -> None:
        backbone.received = lambda *_: list(sent.values())  # type: ignore[method-assign]
        train(args, model, batch)
        backbone.received = receive  # type: ignore[method-assign]

    def own_alone() -> None:
        train(args, plain, batch)

    runs = {
        "step": lambda: train(args, model, batch),
        "own": own,
        "others": others,
        "own alone": own_alone,
    }
    times = in_turn(runs, rounds=args.rounds, by=args.by)
    return {
        "against all its parts": ratio(times["step"], times["own"] + times["others"]),
        "against its parts without reconciliation layers": ratio(times["step"], times["own alone"] + times["others"]),
    }


def detached_step(args: Namespace) -> Found:
    """Passing features on without gradient against passing them on with it, for three tasks."""
    found = {}
    for name, heads in {"three classifiers": ("classifier",) * 3, "three kinds of heads": THREE_TASKS}.items():
        runs: dict[str, Run] = {}
        for sharing in ("detached", "bidirectional"):
            model = make_model(heads, "XLEARNER.SHARING", sharing, *precision(args))
            runs[sharing] = _pass(args, model, make_batch(model, count=args.images, size=args.size))
        times = in_turn(runs, rounds=args.rounds, by=args.by)
        found[name] = ratio(times["detached"], times["bidirectional"])
    return found


def _pass(args: Namespace, model: XLearner, batch: Batch) -> Run:
    return lambda: train(args, model, batch)


def squeeze_step(args: Namespace) -> Found:
    """A distillation of three branches against the teacher's forward pass and the student's forward and backward.

    With the student's projectors, which are trained with it, and without. The step's teacher has its weights in low
    precision, as in training; that of the parts is as it was loaded.
    """
    cfg = make_config(THREE_TASKS, *precision(args))
    plain, teacher = (make_model(THREE_TASKS, *precision(args)).freeze() for _ in range(2))
    dtype = autocast_dtype(cfg)
    if dtype is not None:
        teacher.keep_in(dtype)
    student = build_branch(cfg, out_features=("res2", "res3", "res4", "res5")).to(memory_format=torch.channels_last)
    student.to(teacher.device)
    squeeze = cfg.XLEARNER.SQUEEZE
    teacher_stages = dict(zip(squeeze.STAGES, squeeze.TEACHER_STAGES, strict=True))
    deepest = max(teacher_stages.values())
    weights = matched_stages(squeeze.STAGES, squeeze.STAGE_WEIGHTS)
    distiller = Distiller(student=student, teacher=teacher, stage_weights=weights, teacher_stages=teacher_stages)
    distiller.train()
    batch = make_batch(teacher, count=args.images, size=args.size)
    (group,) = teacher.image_groups(batch, together=True)
    images = group.images.contiguous(memory_format=torch.channels_last)

    def parts(*, project: bool) -> None:
        distiller.zero_grad()
        with plain.autocast(), mixed_precision(args):
            with torch.no_grad():
                plain.backbone.forward_all(images, deepest=deepest)
            features = student(images)
            of_task = distiller.projectors.values() if project else ()
            projected = [project_(features[stage]) for stages in of_task for stage, project_ in stages.items()]
        sum(feature.float().mean() for feature in projected or features.values()).backward()

    runs: dict[str, Run] = {
        "step": lambda: train(args, distiller, batch),
        "parts": lambda: parts(project=True),
        "without projectors": lambda: parts(project=False),
    }
    times = in_turn(runs, rounds=args.rounds, by=args.by)
    return {
        "against teacher and student with projectors": ratio(times["step"], times["parts"]),
        "against teacher and student": ratio(times["step"], times["without projectors"]),
    }


def memory(args: Namespace) -> Found:
    """Bytes that a step of three tasks needs at its peak: weights, averages of AdamW, and what PyTorch allocates.

    Against the same of separate branches with one backward pass for all, and with one for each branch, as here.
    """
    found = {}
    for name, heads in {"three classifiers": ("classifier",) * 3, "three kinds of heads": THREE_TASKS}.items():
        separate = [_peak(args, heads, "XLEARNER.SHARING", "separate", at_once=at_once) for at_once in (True, False)]
        for at_once in (False, True):
            peak = _peak(args, heads, at_once=at_once)
            found[name + (", one backward pass" if at_once else "")] = {
                "ratio": round(peak / separate[0], 4),
                "ratio_by_branch": round(peak / separate[1], 4),
                "mb": round(peak / 1e6, 1),
                "reference_mb": round(separate[0] / 1e6, 1),
            }
    return found


def _peak(args: Namespace, heads: tuple[str, ...], *opts: Any, at_once: bool = False) -> int:
    model = make_model(heads, *opts, *precision(args))
    batch = make_batch(model, count=args.images, size=args.size)
    train(args, model, batch, at_once=at_once)  # chooses algorithms
    model.zero_grad()
    peak = peak_bytes(lambda: train(args, model, batch, at_once=at_once))
    return peak + 12 * sum(p.numel() for p in model.parameters())


def branch_by_branch(args: Namespace) -> Found:
    """A backward pass for each branch when its losses are known, against one for all."""
    runs: dict[str, Run] = {}
    for at_once in (False, True):
        model = make_model(THREE_TASKS, *precision(args))
        batch = make_batch(model, count=args.images, size=args.size)
        runs[str(at_once)] = functools.partial(train, args, model, batch, at_once=at_once)
    times = in_turn(runs, rounds=args.rounds, by=args.by)
    return {"three kinds of heads": ratio(times["False"], times["True"])}


def compiled_step(args: Namespace) -> Found:
    """Stages that are compiled by inductor against the same stages as they are, in a step of three tasks."""
    runs: dict[str, Run] = {}
    for backend in ("inductor", ""):
        model = make_model(THREE_TASKS, "XLEARNER.COMPILE", backend, *precision(args))
        runs[backend] = _pass(args, model, make_batch(model, count=args.images, size=args.size))
    times = in_turn(runs, rounds=args.rounds, by=args.by, warmup=4)
    return {"three kinds of heads": ratio(times["inductor"], times[""])}


def exported_student(args: Namespace) -> Found:
    """Inference of a student that was exported and loaded into stock Detectron2, against a stock ResNet."""
    from tempfile import TemporaryDirectory

    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    from xlearner_d2.checkpoint.export import export_student

    cfg = make_config(("classifier",))
    student = build_branch(cfg, out_features=("res2", "res3", "res4", "res5")).eval().to(cfg.MODEL.DEVICE)
    plain = cfg.clone()
    plain.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    stock, other = (
        build_resnet_backbone(plain, ShapeSpec(channels=3)).eval().to(student.stem.conv1.weight.device)
        for _ in range(2)
    )
    with TemporaryDirectory() as folder:
        export_student(student, plain, f"{folder}/student_d2.pth")
        DetectionCheckpointer(torch.nn.ModuleDict({"backbone": stock})).load(f"{folder}/student_d2.pth")
    images = torch.randn(args.images, 3, args.size, args.size, device=student.stem.conv1.weight.device)
    with torch.no_grad():
        expected, given = student(images), stock(images)
        assert all(torch.equal(expected[stage], given[stage]) for stage in expected), "outputs differ"
        times = in_turn(
            {"exported": lambda: stock(images), "stock": lambda: other(images)}, rounds=2 * args.rounds, by=args.by
        )
    return {"bit-identical outputs": ratio(times["exported"], times["stock"])}


def small_maps(args: Namespace) -> Found:
    """A ResNet's step on a CPU, in bfloat16 if it has it, with and without products for its small maps."""
    found = {}
    for depth, count, size in ((18, 40, 96), (18, 24, 96), (18, 16, 128), (50, 16, 96), (50, 4, 224)):
        options = ("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64 if depth < 50 else 256)
        cfg = make_config(("classifier",), *options, "SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cpu")
        plain = build_branch(cfg, out_features=("res2", "res3", "res4", "res5"))
        plain.to(memory_format=torch.channels_last)
        changed = copy.deepcopy(plain)
        multiply_small_maps(changed)
        images = torch.randn(count, 3, size, size).to(memory_format=torch.channels_last)
        dtype = cpu_autocast_dtype(cfg)
        runs = {"ours": _cpu_step(changed, images, dtype), "stock": _cpu_step(plain, images, dtype)}
        times = in_turn(runs, rounds=args.rounds, by=args.by)
        found[f"ResNet-{depth}, {count} images of {size} pixels"] = ratio(times["ours"], times["stock"])
    return found


def upsampling(args: Namespace) -> Found:
    """Upsampling logits fourfold, with its gradient, by products of any size against ``F.interpolate``, in float32."""
    found, limit = {}, linear_head.LARGEST_PRODUCT
    linear_head.LARGEST_PRODUCT = 10**6
    device = make_config(("classifier",)).MODEL.DEVICE
    for count, classes, size in ((24, 27, 96), (16, 12, 128), (4, 21, 256), (4, 21, 512), (2, 21, 1024)):
        logits = torch.randn(count, classes, size // 4, size // 4, device=device, requires_grad=True)
        runs = {
            "ours": functools.partial(_with_gradient, functools.partial(linear_head.upsample, factor=4), logits),
            "stock": functools.partial(
                _with_gradient, functools.partial(interpolate, scale_factor=4, mode="bilinear"), logits
            ),
        }
        times = in_turn(runs, rounds=args.rounds, by=args.by)
        found[f"{count} maps of {classes} classes, to {size} pixels"] = ratio(times["ours"], times["stock"])
    linear_head.LARGEST_PRODUCT = limit
    return found


def _with_gradient(function: Callable[[Tensor], Tensor], given: Tensor) -> None:
    function(given).square_().sum().backward()
    given.grad = None


def optimiser(args: Namespace) -> Found:
    """AdamW as it is here against PyTorch's fused one, on the weights of a ResNet that are channels last in memory."""
    cfg = make_config(("classifier",), "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
    runs = {}
    for name, kind in (("ours", AdamW), ("stock", torch.optim.AdamW)):
        network = build_branch(cfg, out_features=("res5",)).to(memory_format=torch.channels_last)
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        runs[name] = kind(network.parameters(), lr=1e-3, fused=True).step
    times = in_turn(runs, rounds=2 * args.rounds, by=args.by)
    return {"AdamW": ratio(times["ours"], times["stock"])}


def _cpu_step(network: torch.nn.Module, images: Tensor, dtype: torch.dtype | None) -> Run:
    def run() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            features = network(images)
        backward({stage: feature.float().square().mean() for stage, feature in features.items()})

    return run


RATIOS: dict[str, Callable[[Namespace], Found]] = {
    "one-source step": one_source_step,
    "expansion step": expansion_step,
    "detached against bidirectional": detached_step,
    "squeeze step": squeeze_step,
    "memory": memory,
    "branch by branch": branch_by_branch,
    "compiled step": compiled_step,
    "exported student": exported_student,
    "small maps": small_maps,
    "optimiser": optimiser,
    "upsampling": upsampling,
}
