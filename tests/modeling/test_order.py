"""What branches send does not depend on the order of the sources, whoever asks for it and when."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from xlearner_d2 import XLearner

Batches = dict[str, list[dict[str, Any]]]
MakeModel = Callable[..., XLearner]
MakeBatches = Callable[..., Batches]


def mix(cfg: CfgNode, source: str) -> None:
    """Have a source's head mix its images."""
    record = cfg.XLEARNER.SOURCES[source]
    record.OPTS = [*record.get("OPTS", []), "MODEL.CLASSIFIER.MIXUP", 0.2]


def learn(model: XLearner, batches: Batches, *, by_branch: bool = False) -> dict[str, Tensor]:
    """Losses and gradients of a step, and the running means that it leaves."""
    losses: dict[str, Tensor] = {}
    with EventStorage():
        for part in model.losses_by_branch(batches) if by_branch else [model(batches)]:
            sum(part.values(), torch.zeros(())).backward()
            losses |= part
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    means = {name: value.clone() for name, value in model.state_dict().items() if "running_mean" in name}
    return {**losses, **gradients, **means}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def stirred(model: XLearner) -> XLearner:
    """In training, with reconciliation layers that have left their zeros, so that what is sent has an effect."""
    for name, parameter in model.backbone.reconciliation.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.constant_(parameter, 0.5)
    return model.train()


@pytest.mark.parametrize("sharing", ["detached", "bidirectional"])
@pytest.mark.parametrize("mixing", [("pics",), ("pics", "more"), ()], ids=str)
@pytest.mark.parametrize("by_branch", [False, True])
def test_the_order_of_sources_does_not_change_what_is_sent(
    tiny_cfg: CfgNode,
    make_model: MakeModel,
    make_batches: MakeBatches,
    sharing: str,
    mixing: tuple[str, ...],
    by_branch: bool,
) -> None:
    """Losses and gradients, also of heads that ask for features themselves, as those that mix their images do."""
    tiny_cfg.XLEARNER.SOURCES.more = CfgNode({**tiny_cfg.XLEARNER.SOURCES.pics, "TASK": "more"})
    del tiny_cfg.XLEARNER.SOURCES["boxes"]  # which draws proposals
    for source in mixing:
        mix(tiny_cfg, source)
    batches = make_batches("pics", "areas")
    batches["more"] = make_batches("pics", seed=1)["pics"]
    found = []
    for order in (["areas", "pics", "more"], ["more", "pics", "areas"]):
        model = stirred(make_model("XLEARNER.SHARING", sharing))
        for source in mixing:  # as each pair of images is mixed should not depend on the order either
            model.heads[source].mixup._params_per_batch = lambda: (0.3, False)
        found.append(learn(model, {source: batches[source] for source in order}, by_branch=by_branch))
    assert_close(found[1], found[0])


def test_the_order_does_not_matter_to_a_head_that_changes_its_images(
    make_model: MakeModel, make_batches: MakeBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third party's, which is not known to do so before it asks."""
    batches = make_batches("pics", "areas")
    found = []
    for order in (["areas", "pics"], ["pics", "areas"]):
        model = stirred(make_model(without=("boxes",)))
        monkeypatch.setattr(model, "_passes_images_on", lambda source: source != "pics")
        head = model.heads["pics"]
        monkeypatch.setattr(head.backbone, "forward", lambda x, own=head.backbone.forward: own(x.flip(3)))
        found.append(learn(model, {source: batches[source] for source in order}))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("mixing", [False, True])
def test_statistics_are_copied_only_where_a_head_asks_late(
    tiny_cfg: CfgNode, make_model: MakeModel, make_batches: MakeBatches, mixing: bool
) -> None:
    if mixing:
        mix(tiny_cfg, "pics")
    backbone, seen = (model := make_model().train()).backbone, []
    backbone.branch("detection").stem.register_forward_hook(lambda *_: seen.append(bool(backbone._statistics)))
    learn(model, make_batches())
    assert any(seen) == mixing
    assert not backbone._statistics
