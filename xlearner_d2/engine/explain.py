"""The plan in words and tables: what will be trained, on what, for how long, in how much memory."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from fvcore.nn import ActivationCountAnalysis
from tabulate import tabulate
from torch import nn

from ..modeling import XLearner
from .plan import EXPANDED_FILE, STUDENT_FILE, Plan, squeeze_config

#: Each convolution's output is kept for the backward pass, and so are its norm's and its activation's.
_KEPT_PER_OUTPUT = 3
#: Bytes per parameter in training: weight, gradient and momentum in float32.
_BYTES_PER_PARAMETER = 12


def explain(plan: Plan) -> str:
    """Sources, branches, parameters, steps and expected memory. Builds the model, so that it is known to fit together.

    Raises:
        ConfigError: when a head does not fit its branch.
    """
    model = build_model(plan.cfg)
    squeeze_steps = squeeze_config(plan.cfg).SOLVER.MAX_ITER
    steps = {"expand": plan.cfg.SOLVER.MAX_ITER, "squeeze": squeeze_steps}
    lines = [
        f"The plan: {', then '.join(f'{stage} for {steps[stage]} steps' for stage in plan.stages)}, "
        f"on {_devices(plan)}, sharing {plan.cfg.XLEARNER.SHARING!r}.",
        "",
        _sources_table(plan, model),
        "",
        _branches_table(plan, model),
        "",
        f"Parameters in training: {_millions(model)} in all, {_millions(model.backbone.reconciliation)} of them in "
        f"reconciliation layers. Expected memory of a training step: about {_memory(plan, model):.1f} GB a worker.",
        f"Results: {plan.cfg.OUTPUT_DIR}/{EXPANDED_FILE}, {plan.cfg.OUTPUT_DIR}/{STUDENT_FILE}.",
    ]
    return "\n".join(lines)


def _devices(plan: Plan) -> str:
    workers, cfg = plan.world_size, plan.cfg
    kind = "GPU" if cfg.MODEL.DEVICE.startswith("cuda") else "CPU process"
    precision = "mixed precision" if cfg.SOLVER.AMP.ENABLED else "float32"
    return f"{workers} {kind}{'' if workers == 1 else 's' if kind == 'GPU' else 'es'} in {precision}"


def _sources_table(plan: Plan, model: XLearner) -> str:
    rows = []
    for source in plan.sources:
        data = plan.data[source.name]
        epochs = plan.cfg.SOLVER.MAX_ITER * source.ims_per_batch / len(data.train)
        rows.append(
            (
                source.name,
                source.task,
                len(data.train),
                sum(len(records) for records in data.test.values()),
                _num_classes(plan.heads[source.name]),
                source.ims_per_batch,
                f"{epochs:.1f}",
                source.loss_weight,
                _millions(model.heads[source.name]),
            )
        )
    names = ["source", "task", "train", "test", "classes", "images a step", "epochs", "loss weight", "head"]
    return tabulate(rows, headers=names)


def _num_classes(head: CfgNode) -> str:
    kind = head.MODEL.META_ARCHITECTURE
    things, stuff = head.MODEL.ROI_HEADS.NUM_CLASSES, head.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if kind == "PanopticFPN":
        return f"{things} + {stuff}"
    counts = {"ImageClassifier": head.MODEL.CLASSIFIER.NUM_CLASSES, "SemanticSegmentor": stuff}
    return str(counts.get(kind, things))


def _branches_table(plan: Plan, model: XLearner) -> str:
    rows = []
    for task in plan.tasks:
        name = model.backbone.branch_of[task.name]
        branch, incoming = model.backbone.branch(name), model.backbone.incoming(name)
        receives = ", ".join(incoming.stages) if incoming is not None else "nothing"
        stages = ", ".join(branch.output_shape())
        rows.append((task.name, ", ".join(task.sources), _depth(plan.cfg), stages, receives, _millions(branch)))
    return tabulate(rows, headers=["branch", "sources", "network", "stages", "receives at", "parameters"])


def _depth(cfg: CfgNode) -> str:
    return f"ResNet-{cfg.MODEL.RESNETS.DEPTH}"


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


def _image_size(head: CfgNode) -> tuple[int, int]:
    if head.MODEL.META_ARCHITECTURE == "ImageClassifier":
        return head.INPUT.CLASSIFICATION.SIZE, head.INPUT.CLASSIFICATION.SIZE
    short = max(head.INPUT.MIN_SIZE_TRAIN)
    return short, min(round(short * 4 / 3), head.INPUT.MAX_SIZE_TRAIN)


def _memory(plan: Plan, model: XLearner) -> float:
    """GB of one worker's step: parameters with gradients and momentum, and the branches' kept activations."""
    width = 2 if plan.cfg.SOLVER.AMP.ENABLED else 4
    total = sum(p.numel() for p in model.parameters()) * _BYTES_PER_PARAMETER
    for source in plan.sources:
        height, length = _image_size(plan.heads[source.name])
        images = source.ims_per_batch // plan.world_size
        branch = model.backbone.branch(model.backbone.branch_of[source.task])
        total += _activations(branch, (height, length)) * images * width * _KEPT_PER_OUTPUT
    return total / 1e9


def _activations(branch: nn.Module, size: Sequence[int]) -> float:
    """Elements that the convolutions of a branch put out for one image of ``size`` (height, width)."""
    side = next(branch.parameters())
    image = torch.zeros(1, 3, size[0] // 32 * 32, size[1] // 32 * 32, device=side.device)
    analysis = ActivationCountAnalysis(branch.eval(), image)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
