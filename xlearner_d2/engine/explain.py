"""The plan in words and tables: what will be trained, on what, for how long, in how much memory."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from ..modeling import XLearner
from ..modeling.branches import branch_config, network_name
from ..modeling.xlearner import autocast_dtype
from ..specs import SourceSpec, TaskSpec
from .growth import grow
from .plan import EXPANDED_FILE, STUDENT_FILE, Drawn, Plan
from .squeeze_settings import squeeze_config
from .trial import expected_memory
from .watch import resident_gb

RESULTS = {"expand": EXPANDED_FILE, "squeeze": STUDENT_FILE}


def explain(plan: Plan) -> str:
    """Sources, branches, parameters, steps and expected memory.

    Builds the model and tries each source's head on two of its images, so that both are known to fit.

    Raises:
        ConfigError: when a head does not fit its branch or its images.
    """
    on_gpu = plan.cfg.MODEL.DEVICE.startswith("cuda")
    taken = 0.0 if on_gpu else resident_gb()
    model = build_model(plan.cfg)
    growth = []
    if plan.growth is not None and "expand" in plan.stages:
        growth = [f"It extends {plan.growth.path}: {grow(model, plan.cfg, plan.growth, plan.branches)}"]
    trunk = f"a shared trunk for {plan.trunk_steps} steps, then " if plan.trunk_steps else ""
    lines = [
        f"The plan: {trunk}{', then '.join(f'{stage} for {_steps(plan, stage)} steps' for stage in plan.stages)}, "
        f"on {_devices(plan)}, sharing {plan.cfg.XLEARNER.SHARING!r}.",
        *_scaling(plan),
        *growth,
        "",
        _sources_table(plan, model),
        "",
        _branches_table(plan, model),
        "",
        f"Parameters in training: {_trained(model)} in all, {_trained(model.backbone.reconciliation)} of them in "
        f"reconciliation layers. Expected memory of a training step: about {_memory(plan, model, taken)} a worker, "
        + ("besides what CUDA takes." if on_gpu else f"{taken:.1f} GB of it taken already; libraries may add to it."),
        f"Results: {', '.join(f'{plan.cfg.OUTPUT_DIR}/{name}' for name in results_of(plan))}.",
    ]
    return "\n".join(lines)


def results_of(plan: Plan) -> list[str]:
    """The files that a run leaves, as seen from its folder."""
    names = [RESULTS[stage] for stage in plan.stages]
    online = plan.cfg.XLEARNER.SQUEEZE.ONLINE and "expand" in plan.stages
    return [*names, *([STUDENT_FILE] if online and STUDENT_FILE not in names else [])]


def _memory(plan: Plan, model: XLearner, taken: float) -> str:
    return ", ".join(f"{taken + size:.1f} GB to {stage}" for stage, size in expected_memory(plan, model).items())


def _steps(plan: Plan, stage: str) -> int:
    alone = stage == "squeeze" and not plan.cfg.XLEARNER.SQUEEZE.ONLINE
    return int((squeeze_config(plan.cfg) if alone else plan.cfg).SOLVER.MAX_ITER)


def _scaling(plan: Plan) -> list[str]:
    if plan.written_for == plan.world_size:
        return []
    scale = plan.world_size / plan.written_for
    return [
        f"Scaled from {plan.written_for} to {plan.world_size} workers (SOLVER.REFERENCE_WORLD_SIZE): batches and "
        f"learning rate times {scale:g}, the latter now {plan.cfg.SOLVER.BASE_LR:g}; steps divided by {scale:g}."
    ]


def _devices(plan: Plan) -> str:
    workers, cfg = plan.world_size, plan.cfg
    kind = "GPU" if cfg.MODEL.DEVICE.startswith("cuda") else "CPU process"
    precision = "float32" if autocast_dtype(cfg) is None else "mixed precision"
    return f"{workers} {kind}{'' if workers == 1 else 's' if kind == 'GPU' else 'es'} in {precision}"


def _sources_table(plan: Plan, model: XLearner) -> str:
    drawn = plan.drawn[plan.stages[0]]
    rows = [_source_row(plan, model, source, drawn) for source in plan.sources]
    steps = ["steps"] if drawn.turns else []
    names = ["source", "task", "train", "test", "classes", "images a step", *steps, "epochs", "loss weight", "head"]
    return tabulate(rows, headers=names)


def _source_row(plan: Plan, model: XLearner, source: SourceSpec, drawn: Drawn) -> tuple[Any, ...]:
    data = plan.data[source.name]
    by_name = {of.name: of for of in drawn.sources}
    if source.name in by_name:
        images, part = by_name[source.name].ims_per_batch, drawn.part(source)
        epochs = (plan.trunk_steps + _steps(plan, plan.stages[0])) * part * images / len(data.train)
        seen = [images, *([f"{drawn.turns[source.name]} of {sum(drawn.turns.values())}"] if drawn.turns else [])]
        seen.append(f"{epochs:.1f}")
    else:
        seen = ["frozen", *(["-"] if drawn.turns else []), "-"]
    return (
        source.name,
        source.task,
        len(data.train),
        sum(len(records) for records in data.test.values()),
        _num_classes(plan.heads[source.name]),
        *seen,
        source.loss_weight,
        _millions(model.heads[source.name]),
    )


def _num_classes(head: CfgNode) -> str:
    kind = head.MODEL.META_ARCHITECTURE
    things, stuff = head.MODEL.ROI_HEADS.NUM_CLASSES, head.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    counts = {
        "ImageClassifier": head.MODEL.CLASSIFIER.NUM_CLASSES,
        "SemanticSegmentor": stuff,
        "PanopticFPN": f"{things} + {stuff}",
        "PanopticDeepLab": stuff,
        "DepthEstimator": "-",
    }
    return str(counts.get(kind, things))


def _branches_table(plan: Plan, model: XLearner) -> str:
    tasks = {
        name: [t for t in plan.tasks if model.backbone.branch_of[t.name] == name] for name in model.backbone.branches
    }
    rows = [_branch_row(plan, model, name, of) for name, of in tasks.items()]
    return tabulate(rows, headers=["branch", "sources", "network", "stages", "receives at", "parameters"])


def _branch_row(plan: Plan, model: XLearner, name: str, tasks: Sequence[TaskSpec]) -> tuple[str, ...]:
    branch, incoming = model.backbone.branch(name), model.backbone.incoming(name)
    return (
        name,
        ", ".join(source for task in tasks for source in task.sources),
        network_name(branch_config(plan.cfg, tasks[0].name)),
        ", ".join(branch.output_shape()),
        ", ".join(incoming.stages) if incoming is not None else "nothing",
        _millions(branch),
    )


def _trained(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6:.2f} M"


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
