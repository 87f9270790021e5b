"""The properties of the expansion that the design rests on."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from torch import nn

from xlearner_d2.modeling.expanded import BranchView
from xlearner_d2.modeling.norm_statistics import copied_statistics, inference_mode_norm
from xlearner_d2.modeling.reconciliation import ReconciliationLayer

SHARINGS = ("separate", "shared", "detached", "bidirectional")


def total_loss(model, batches):
    with EventStorage():
        return sum(model(batches).values())


def step(model, batches):
    """One SGD step on every parameter that got a gradient."""
    total_loss(model, batches).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.zero_grad(set_to_none=True)


def images(seed=0, count=2):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("sharing", ["detached", "bidirectional"])
@pytest.mark.parametrize("training", [True, False])
def test_starts_as_independent_branches_bit_for_bit(make_model, sharing, training):
    expanded = make_model("XLEARNER.SHARING", sharing).backbone.train(training)
    separate = make_model("XLEARNER.SHARING", "separate").backbone.train(training)
    separate.branches.load_state_dict(expanded.branches.state_dict())
    for task in expanded.tasks:
        assert equal(expanded(images(), task), separate(images(), task))


@pytest.mark.parametrize("source", ["pics", "boxes", "areas"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_source_moves_its_own_branch_only(make_model, make_batches, source, amp):
    model = make_model()
    model.autocast_dtype = amp
    step(model, make_batches())  # reconciliation layers have left their zeros
    own = model.task_of[source]
    others = [task for task in model.backbone.tasks if task != own]
    before = {task: state_of(model.backbone.branches[task]) for task in others}
    total_loss(model, make_batches(source)).backward()
    for task in others:
        assert equal(before[task], state_of(model.backbone.branches[task]))  # BN statistics among them
        assert all(p.grad is None for p in model.backbone.branches[task].parameters())
        assert all(p.grad is None for p in model.backbone.reconciliation[task].parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.backbone.branches[own].parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.backbone.reconciliation[own].parameters())


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_every_parameter_gets_a_gradient_from_a_joint_step(make_model, make_batches, sharing, amp):
    """Under autocast, too: weights first used without gradient must not be served from its cache later."""
    model = make_model("XLEARNER.SHARING", sharing)
    model.autocast_dtype = amp
    step(model, make_batches())
    total_loss(model, make_batches(seed=1, count=4)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    branches = model.backbone.named_parameters()
    assert [name for name, p in branches if not p.grad.any()] == []


def test_bidirectional_loss_reaches_the_other_branches(make_model, make_batches):
    model = make_model("XLEARNER.SHARING", "bidirectional")
    step(model, make_batches())
    total_loss(model, make_batches("pics")).backward()
    reached = [p.grad is not None and p.grad.any() for p in model.backbone.branches["detection"].res2.parameters()]
    assert all(reached)


def test_bidirectional_gradients_are_those_of_the_running_statistics_that_were_used(make_model, make_batches):
    """A loss's gradient in the branch that sends is the same whether that branch then trains on images of its own."""
    model = make_model("XLEARNER.SHARING", "bidirectional")
    step(model, make_batches())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    sender, found = [*model.backbone.branches["segmentation"].res2.parameters()], []
    for sources in (["pics"], ["pics", "areas"]):
        model.load_state_dict(state)
        torch.manual_seed(0)
        with EventStorage():
            losses = model({source: of for source, of in make_batches(seed=1).items() if source in sources})
        loss = sum(value for name, value in losses.items() if name.startswith("pics/"))
        found.append([value.clone() for value in torch.autograd.grad(loss, sender)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("norm", ["BN", ""])
def test_first_step_already_reaches_the_last_scale(make_model, make_batches, norm):
    """Without a norm layer, the last convolution itself."""
    model = make_model("MODEL.RESNETS.NORM", norm)
    total_loss(model, make_batches()).backward()
    for layer in model.backbone.modules():
        if isinstance(layer, ReconciliationLayer):
            scale = (layer[-1].norm or layer[-1]).weight
            assert not scale.any()
            assert scale.grad.any()


@pytest.mark.parametrize("halvings", [0, 1, 2])
def test_layer_starts_at_zero_and_lands_on_the_target_size(halvings):
    layer = ReconciliationLayer(
        in_shape=ShapeSpec(channels=4, stride=4), out_shape=ShapeSpec(channels=6, stride=4 * 2**halvings)
    )
    out = layer(torch.randn(2, 4, 16, 16))
    assert out.shape == (2, 6, 16 // 2**halvings, 16 // 2**halvings)
    assert not out.any()
    zero_scales = [not part.norm.weight.any() for part in layer]
    assert zero_scales == [False] * (len(layer) - 1) + [True]


def test_reconciliation_is_the_documented_sum(make_model, make_batches):
    """An independent, stage-by-stage computation of what a branch outputs."""
    model = make_model()
    step(model, make_batches())
    backbone = model.backbone.eval()
    branch, layers = backbone.branches["detection"], backbone.reconciliation["detection"].layers
    aux = {name: backbone.branches[name](images()) for name in layers}
    x = branch.stem(images())
    for number, stage in enumerate(("res2", "res3", "res4", "res5")):
        x = getattr(branch, stage)(x)
        for name, found in layers.items() if stage != "res5" else ():
            for shallower in ("res2", "res3", "res4")[: number + 1]:
                x = x + found[f"{shallower}_to_{stage}"](aux[name][shallower])
        torch.testing.assert_close(backbone(images(), "detection")[stage], x)


def test_same_stage_only(make_model):
    model = make_model("XLEARNER.RECONCILIATION.CROSS_SCALE", False, "XLEARNER.RECONCILIATION.STAGES", ["res3", "res4"])
    layers = model.backbone.reconciliation["detection"].layers["segmentation"]
    assert set(layers) == {"res3_to_res3", "res4_to_res4"}


def test_removing_a_task_leaves_the_others_plain_branches(make_model):
    full = make_model().backbone.eval()
    fewer = make_model(without=("areas",)).backbone.eval()
    kept = {name: v for name, v in full.branches.state_dict().items() if not name.startswith("segmentation.")}
    fewer.branches.load_state_dict(kept)
    for task in fewer.tasks:
        assert equal(full.branches[task](images()), fewer(images(), task))
    assert set(fewer.tasks) == {"classification", "detection"}


def test_a_task_added_later_changes_no_output(make_model, make_batches):
    old = make_model(without=("areas",))
    step(old, make_batches("pics", "boxes"))
    new = make_model(seed=1)
    missing, unexpected = new.load_state_dict(old.state_dict(), strict=False)
    assert not unexpected
    assert all("segmentation" in name or "areas" in name for name in missing)
    for training in (True, False):
        for task in old.backbone.tasks:
            features = [model.backbone.train(training)(images(), task) for model in (old, new)]
            assert equal(*features)


def test_forward_all_equals_each_branch(make_model, make_batches):
    model = make_model()
    step(model, make_batches())
    backbone = model.backbone.eval()
    together = backbone.forward_all(images())
    for task in backbone.tasks:
        assert equal(together[task], backbone(images(), task))


@pytest.mark.parametrize("shallow", ["pics", "areas"])
def test_forward_all_sends_as_deep_as_any_branch_reads(tiny_cfg, make_model, shallow):
    """A branch that ends at res3 reads no deeper; others do, whatever the order of the tasks."""
    deep = "areas" if shallow == "pics" else "pics"
    records = tiny_cfg.XLEARNER.SOURCES
    ends = ["MODEL.CLASSIFIER.IN_FEATURE", "res3", "MODEL.RESNETS.OUT_FEATURES", ["res3"]]
    records.pics.OPTS = [*records.pics.get("OPTS", []), *ends]
    tiny_cfg.XLEARNER.SOURCES = CfgNode({name: records[name] for name in (deep, "boxes", shallow)}, new_allowed=True)
    backbone = make_model().backbone.eval()
    together = backbone.forward_all(images())
    assert list(together["classification"]) == ["res2", "res3"]
    for task in backbone.tasks:
        assert equal(together[task], backbone(images(), task))


def test_what_is_sent_to_several_groups_is_what_each_would_get_alone(make_model, make_batches):
    """Features and gradients, of groups of one size, for which it is computed together, and of others."""
    model = make_model()
    step(model, make_batches())  # reconciliation layers have left their zeros
    backbone, state = model.backbone.double(), state_of(model.backbone)
    sizes = [("classification", 2, 64), ("detection", 3, 64), ("segmentation", 1, 96), ("detection", 2, 64)]
    groups = [(torch.randn(count, 3, size, size).double(), task) for task, count, size in sizes]
    found = []
    for calls in ([groups], [[group] for group in groups]):
        backbone.zero_grad()
        features = []
        for call in calls:
            backbone.load_state_dict(state)  # as the running statistics are at the beginning of a step
            received = backbone.received(call)
            of_call = [backbone.forward_received(*group, sent) for group, sent in zip(call, received, strict=True)]
            sum(value.square().mean() for of in of_call for value in of.values()).backward()
            features += of_call
        grads = {f"{name}.grad": p.grad for name, p in backbone.named_parameters()}
        outputs = {f"{index}.{stage}": value for index, of in enumerate(features) for stage, value in of.items()}
        found.append({**outputs, **grads})
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sharing", ["separate", "shared", "detached"])
@pytest.mark.parametrize("deepest", ["res2", "res4", "res5"])
def test_forward_all_ends_where_it_is_told_to(make_model, sharing, deepest):
    backbone = make_model("XLEARNER.SHARING", sharing).backbone.eval()
    whole, part = backbone.forward_all(images()), backbone.forward_all(images(), deepest=deepest)
    for task, features in whole.items():
        assert equal(part[task], {stage: found for stage, found in features.items() if stage <= deepest})


def test_inference_mode_norm_restores_each_module():
    module = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)).train()
    module[1].eval()
    with inference_mode_norm(module):
        module(torch.randn(2, 2, 4, 4))
    assert (module.training, module[0].training, module[1].training) == (True, True, False)
    assert not module[0].running_mean.any()


def test_inference_mode_norm_runs_with_the_statistics_of_an_earlier_time():
    module = nn.BatchNorm2d(2).train()
    x = torch.randn(2, 2, 4, 4)
    earlier = copied_statistics(module)
    module(x)
    now = state_of(module)
    with inference_mode_norm(module, earlier):
        torch.testing.assert_close(module(x), x / (1 + module.eps) ** 0.5)
    assert now["running_mean"].any()
    assert equal(now, module.state_dict())


def test_shared_has_one_trunk_and_no_reconciliation(make_model):
    backbone = make_model("XLEARNER.SHARING", "shared").backbone
    assert (len(backbone.branches), len(backbone.reconciliation)) == (1, 0)
    assert set(backbone.tasks) == {"classification", "detection", "segmentation"}


def test_state_dict_holds_every_tensor_once(make_model):
    model = make_model()
    pointers = [value.data_ptr() for value in model.state_dict().values() if value.numel()]
    assert len(pointers) == len(set(pointers))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(model.parameters()))
    assert not [name for name in names if name.startswith("heads.") and ("bottom_up" in name or "stem" in name)]


def test_view_of_a_missing_stage_lists_what_there_is(make_model):
    with pytest.raises(ValueError, match=r"no \['res6'\]; it has \['res2', 'res3', 'res4', 'res5'\]"):
        BranchView(backbone=make_model().backbone, task="detection", out_features=["res6"])
