"""What a step computes and keeps, counted: nothing twice, nothing deeper than it is read, nothing kept in vain."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from kept_bytes import peak_bytes
from torch import Tensor, nn

from xlearner_d2 import XLearner
from xlearner_d2.modeling.distill import Distiller
from xlearner_d2.modeling.expanded import STAGES, ExpandedBackbone
from xlearner_d2.modeling.weighting import weigh_losses

MakeModel = Callable[..., XLearner]
MakeBatches = Callable[..., dict[str, list[dict[str, Any]]]]
#: (branch, part) -> number of images that went through it, with gradient and without
Calls = dict[tuple[str, str], list[tuple[int, bool]]]


@contextmanager
def calls_of(backbone: ExpandedBackbone) -> Iterator[Calls]:
    """Note every call of the branches' stems and stages."""
    calls: Calls = {}
    handles = []
    for name, branch in backbone.branches.items():
        for part in ("stem", *branch.stage_names):

            def note(_: nn.Module, args: tuple[Tensor, ...], key: tuple[str, str] = (name, part)) -> None:
                calls.setdefault(key, []).append((len(args[0]), torch.is_grad_enabled()))

            handles.append(getattr(branch, part).register_forward_pre_hook(note))
    yield calls
    for handle in handles:
        handle.remove()


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass, parameters aside."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    assert result
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def step(model: nn.Module, batches: dict[str, list[dict[str, Any]]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with EventStorage():
        return model(batches)


def features_of(model: XLearner) -> list[dict[str, Tensor]]:
    """What each branch makes of a source's two images."""
    images = torch.randn(2, 3, 64, 64)
    return [model.backbone(images, task) for task in model.backbone.tasks]


TASKS = ("classification", "detection", "segmentation")


@pytest.mark.parametrize("deepest", ["res3", "res4"])
def test_a_step_of_three_tasks_has_no_call_too_many(
    make_model: MakeModel, make_batches: MakeBatches, deepest: str
) -> None:
    model = make_model("XLEARNER.RECONCILIATION.STAGES", [s for s in STAGES if s <= deepest])
    with calls_of(model.backbone) as calls:
        step(model, make_batches())
    for task in TASKS:
        for part in ("stem", *STAGES):
            # Once for its own images, with gradient; once for the two others' without, as deep as it is read.
            others = [(4, False)] if part == "stem" or part <= deepest else []
            assert sorted(calls[task, part]) == [(2, True), *others], (task, part)


def test_without_gradient_the_others_keep_nothing(make_model: MakeModel, make_batches: MakeBatches) -> None:
    """What a step keeps beyond its own branches: what reconciliation layers learn from."""

    def make(sharing: str) -> XLearner:
        return make_model("XLEARNER.SHARING", sharing, without=("boxes",))  # whose number of proposals varies

    expanded, separate, both_ways = (make(sharing) for sharing in ("detached", "separate", "bidirectional"))
    batches = make_batches("pics", "areas")
    alone = saved_bytes(lambda: step(separate, batches), separate)
    with_layers = saved_bytes(lambda: step(expanded, batches), expanded)
    expanded.backbone.reconciliation.requires_grad_(False)
    without_learning = saved_bytes(lambda: step(expanded, batches), expanded)
    both_ways = make_model("XLEARNER.SHARING", "bidirectional")
    # A stage's output is kept for its ReLU, and once more with what was received for the next stage's convolution.
    received = sum(features[s].nbytes for features in features_of(separate) for s in ("res2", "res3", "res4"))
    assert without_learning == alone + received
    assert alone < with_layers < saved_bytes(lambda: step(both_ways, batches), both_ways)


def learn(model: XLearner, batches: dict[str, list[dict[str, Any]]], *, at_once: bool) -> None:
    """The gradients of a step, of all branches at once or of one after another."""
    torch.manual_seed(0)
    model.zero_grad()
    with EventStorage():
        for losses in [model(batches)] if at_once else model.losses_by_branch(batches):
            sum(losses.values(), torch.zeros(())).backward()


@pytest.mark.parametrize("sharing", ["separate", "detached", "bidirectional", "shared"])
def test_branch_by_branch_keeps_one_branch_and_changes_nothing(
    make_model: MakeModel, make_batches: MakeBatches, sharing: str
) -> None:
    """What autograd keeps at its peak: of the branches that no other's loss reaches, the one that needs most."""
    model, batches = make_model("XLEARNER.SHARING", sharing), make_batches()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found, peaks = {}, {}
    for at_once in (True, False):
        model.load_state_dict(state)
        peaks[at_once] = peak_bytes(lambda at_once=at_once: learn(model, batches, at_once=at_once), model)
        gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[at_once] = {name: value.clone() for name, value in {**model.state_dict(), **gradients}.items()}
    assert found[True].keys() == found[False].keys()
    assert all(torch.equal(found[True][name], found[False][name]) for name in found[True])
    alone = [peak_bytes(lambda s=s: learn(model, {s: batches[s]}, at_once=True), model) for s in batches]
    groups = [(torch.randn(2, 3, 64, 64), task) for task in model.backbone.tasks]
    sent = [
        of for received in model.backbone.received(groups) for stages in received.values() for of in stages.values()
    ]
    if sharing in ("separate", "detached"):  # what all others receive is computed at once, before
        assert 0.98 * max(alone) <= peaks[False] <= 1.02 * max(alone) + sum(feature.nbytes for feature in sent)
        assert peaks[False] < 0.6 * peaks[True]
    else:
        assert peaks[False] == peaks[True]


def test_a_lone_source_costs_what_its_head_costs_alone(make_model: MakeModel, make_batches: MakeBatches) -> None:
    """One source: the very calls of torch that the head makes by itself, and nothing kept beyond."""
    model = make_model(without=("pics", "areas"))
    batches = make_batches("boxes")

    def alone() -> dict[str, Tensor]:
        torch.manual_seed(0)
        with EventStorage():
            return model.heads["boxes"](batches["boxes"])

    def operations(run: Callable[[], Any]) -> Counter[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            run()
        return Counter({event.key: event.count for event in found.key_averages() if event.key.startswith("aten::")})

    extra = operations(lambda: step(model, batches)) - operations(alone)
    assert set(extra.values()) <= {len(alone())}  # each loss times its weight
    assert extra["aten::mul"] == len(alone())
    assert not [name for name in extra if "conv" in name or "norm" in name or "equal" in name]
    assert saved_bytes(lambda: step(model, batches), model) <= saved_bytes(alone, model) * 1.001


def test_joint_sources_keep_their_features_once(make_model: MakeModel, make_batches: MakeBatches) -> None:
    """Each source's share of a joint batch is a view, and its gradient is joined with the others', not padded."""
    model = make_model("XLEARNER.SHARING", "shared")
    losses = step(model, make_batches())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        sum(losses.values()).backward()
    names = {event.key for event in found.key_averages()}
    assert "autograd::engine::evaluate_function: SplitWithSizesBackward0" in names
    assert "SliceBackward0" not in names


def test_a_squeeze_step_runs_each_part_of_the_teacher_once(make_model: MakeModel, make_batches: MakeBatches) -> None:
    """Un-reconciled stages as deep as they are read, and each branch's own; the first stage serves as both."""
    teacher = make_model().freeze()
    branch = teacher.backbone.branches["classification"]
    student = make_model("XLEARNER.SHARING", "shared").backbone.branch("trunk")
    assert type(branch) is type(student)
    distiller = Distiller(student=student, teacher=teacher, stage_weights={"res4": 1.0, "res5": 1.0}).train()
    with calls_of(teacher.backbone) as calls:
        losses = distiller(make_batches())
    assert losses
    expected = {"stem": 1, "res2": 1, "res3": 2, "res4": 2, "res5": 1}
    for task in TASKS:
        assert {part: calls[task, part] for part in expected} == {p: [(6, False)] * n for p, n in expected.items()}


def test_a_squeeze_keeps_what_the_student_keeps(make_model: MakeModel, make_batches: MakeBatches) -> None:
    teacher = make_model().freeze()
    student = make_model("XLEARNER.SHARING", "shared").backbone.branch("trunk").train()
    distiller = Distiller(student=student, teacher=teacher, stage_weights={"res5": 1.0}, normaliser="none").train()
    images = torch.randn(6, 3, 64, 64)
    alone = saved_bytes(lambda: student(images), student)
    whole = saved_bytes(lambda: distiller(make_batches()), distiller)
    assert whole < 1.1 * alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which alone can be waited for")
@pytest.mark.parametrize(
    ("sharing", "method"), [("detached", "fixed"), ("shared", "fixed"), ("shared", "dwa"), ("shared", "uncertainty")]
)
def test_the_processor_does_not_wait_for_a_gpu(
    make_model: MakeModel, make_batches: MakeBatches, sharing: str, method: str
) -> None:
    """Classification and segmentation heads never wait, so nothing of the project's own may."""
    own = make_model("XLEARNER.SHARING", sharing, "MODEL.DEVICE", "cuda", without=("boxes",))
    model = weigh_losses(own, method, {"pics": 1.0, "areas": 1.0}, temperature=2.0, window=1)
    batches = make_batches("pics", "areas")
    for record in (record for records in batches.values() for record in records):  # Detectron2 waits for its copies
        record |= {key: value.cuda() for key, value in record.items() if isinstance(value, Tensor)}
    for mode in ("default", "error"):  # the first step chooses algorithms
        torch.cuda.set_sync_debug_mode(mode)
        try:
            sum(step(model, batches).values()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
