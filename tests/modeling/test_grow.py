"""Laws of growth: what was there computes the same, what is frozen stays, and what does not fit is refused."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from xlearner_d2.checkpoint.grow import belongs_to, load_grown, part_of
from xlearner_d2.specs import ConfigError


def step(model, batches, *, lr=0.01):
    """One SGD step with momentum and weight decay on what is trained, as the optimiser of a run takes it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=0.1)
    for seed in (0, 1):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        with EventStorage():
            sum(model(batches).values()).backward()
        optimizer.step()


def images(seed=0, count=2):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def trained_without(make_model, make_batches, name, **options):
    """An expansion that lacks one source, after two steps: no reconciliation layer is at zero any more."""
    small = make_model("XLEARNER.SHARING", options.get("sharing", "detached"), without=(name,))
    step(small, {source: found for source, found in make_batches().items() if source != name})
    return small.eval()


def features(model, task, *, dtype=None):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        return model.backbone(images(), task)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("new", ["pics", "boxes", "areas"])
@pytest.mark.parametrize("sharing", ["separate", "detached", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_outputs_are_the_same_bit_for_bit(make_model, make_batches, new, sharing, dtype):
    small = trained_without(make_model, make_batches, new, sharing=sharing)
    large = make_model("XLEARNER.SHARING", sharing, seed=1)
    report = load_grown(large, small.state_dict(), path="small.pth")
    large.eval()
    for task in small.backbone.tasks:
        assert equal(features(small, task, dtype=dtype), features(large, task, dtype=dtype))
    together = large.backbone.forward_all(images())
    assert all(equal(small.backbone.forward_all(images())[task], together[task]) for task in small.backbone.tasks)
    for source in small.heads:
        assert equal(small.heads[source].state_dict(), large.heads[source].state_dict())
    assert f"head {new}" in report.new
    assert {part_of(name) for name in small.state_dict()} == set(report.loaded)


@pytest.mark.parametrize("sharing", ["detached", "bidirectional"])
def test_frozen_parts_stay_while_the_new_ones_learn(make_model, make_batches, sharing):
    """Outputs, weights, statistics; in training mode, after evaluation, with momentum and weight decay."""
    small = trained_without(make_model, make_batches, "boxes", sharing=sharing)
    large = make_model("XLEARNER.SHARING", sharing, seed=1)
    load_grown(large, small.state_dict(), path="small.pth")
    large.freeze_parts(tasks=["classification", "segmentation"], heads=["pics", "areas"])
    large.eval().train()
    before = {name: value.clone() for name, value in large.state_dict().items()}
    step(large, make_batches("boxes"))
    same = {name for name, value in large.state_dict().items() if torch.equal(value, before[name])}
    own = ("backbone.branches.detection.", "backbone.reconciliation.detection.", "heads.boxes.")
    assert {name for name in before if not name.startswith(own)} <= same
    assert not [name for name in same if name.startswith(own) and name.endswith("conv1.weight")]
    large.eval()
    for task in small.backbone.tasks:
        assert equal(features(small, task), features(large, task))


def test_every_trained_parameter_gets_a_gradient(make_model, make_batches):
    """As distributed training without a search for unused parameters needs."""
    small = trained_without(make_model, make_batches, "boxes")
    large = make_model(seed=1)
    load_grown(large, small.state_dict(), path="small.pth")
    large.freeze_parts(tasks=["classification", "segmentation"], heads=["pics", "areas"])
    with EventStorage():
        sum(large(make_batches("boxes")).values()).backward()
    assert [name for name, p in large.named_parameters() if p.requires_grad != (p.grad is not None)] == []


def test_a_new_head_on_a_frozen_branch_is_all_that_learns(make_model, make_batches):
    model = make_model()
    model.freeze_parts(tasks=["detection"], heads=[])
    with EventStorage():
        sum(model(make_batches("boxes")).values()).backward()
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None} == {"boxes"}
    assert not model.backbone.branches["detection"].training
    assert model.heads["boxes"].training


def test_what_the_config_lacks_is_named(make_model):
    small, large = make_model(without=("boxes",)), make_model()
    surplus = "has branch detection, head boxes, 24 reconciliation layers, which the config has not"
    with pytest.raises(ConfigError, match=rf"the file big\.pth has 1 problem:\n  1\. {surplus}"):
        load_grown(small, large.state_dict(), path="big.pth")
    lost = [n for n in large.state_dict() if belongs_to(n, branches=["detection"], heads=["boxes"])]
    report = load_grown(small, large.state_dict(), path="big.pth", dropped=lost)
    assert report.new == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("heads.pics.linear.weight"), r"lacks heads\.pics\.linear\.weight"),
        (lambda state: state.update({"heads.pics.x": torch.zeros(1)}), r"has heads\.pics\.x, which the config's head"),
        (
            lambda state: state.update({"heads.pics.linear.weight": torch.zeros(9, 2)}),
            r"has heads\.pics\.linear\.weight of shape \(9, 2\), but \(3, \d+\) is needed",
        ),
    ],
)
def test_a_part_that_does_not_fit_is_refused_whole(make_model, change, message):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = make_model(seed=1).state_dict()
    change(state)
    with pytest.raises(ConfigError, match=message):
        load_grown(model, state, path="small.pth")
    assert equal(before, model.state_dict())


def test_the_report_reads_as_a_sentence(make_model):
    small, large = make_model(without=("boxes",)), make_model()
    report = str(load_grown(large, small.state_dict(), path="small.pth"))
    assert report == (
        "loaded branch classification, branch segmentation, head pics, head areas, 12 reconciliation layers; "
        "new: branch detection, head boxes, 24 reconciliation layers"
    )


def test_names_of_parts():
    assert part_of("backbone.branches.my_task.res4.0.conv1.norm.weight") == "res4 of branch my_task"
    assert part_of("backbone.reconciliation.a.layers.b_c.res2_to_res4.1.weight") == (
        "layer res2_to_res4 from branch b_c to branch a"
    )
    assert part_of("heads.x.roi_heads.y") == "head x"
    assert not belongs_to("heads.xy.z", branches=["x"], heads=["x"])
    assert belongs_to("backbone.reconciliation.a.layers.b.res2_to_res4.1.weight", branches=["b"], heads=[])
