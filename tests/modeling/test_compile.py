"""Compiled branches are the same branches."""

import copy
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor

from xlearner_d2 import XLearner
from xlearner_d2.modeling.branches import build_branch, compile_stages
from xlearner_d2.modeling.norm_statistics import inference_mode_norm


def narrow_branch(cfg: CfgNode) -> ResNet:
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    return build_branch(cfg, out_features=("res2", "res3"))


def run(branch: ResNet, images: Tensor) -> dict[str, Tensor]:
    """As an expanded model runs it: for others' images, then for its own."""
    with torch.no_grad(), inference_mode_norm(branch):
        sent = branch.res2(branch.stem(images))
    received = branch(images + sent.mean())
    sum((feature**2).mean() for feature in received.values()).backward()
    return {"sent": sent, **received}


def test_a_step_is_the_same(tiny_cfg: CfgNode) -> None:
    """Features, gradients and running statistics, for images of two sizes."""
    plain = narrow_branch(tiny_cfg)
    compiled = copy.deepcopy(plain)
    torch.compiler.reset()
    compile_stages(compiled, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for height in (32, 48):
        images = torch.randn(2, 3, height, 32, generator=torch.Generator().manual_seed(height))
        found = run(compiled, images)
        for name, feature in run(plain, images).items():
            torch.testing.assert_close(found[name], feature, rtol=1e-4, atol=1e-5, msg=name)
    assert graphs["unique_graphs"] >= before + 5  # three parts with gradient, two without
    for mine, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)
    for mine, other in zip(compiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_weights_keep_their_names(make_model: Callable[..., XLearner]) -> None:
    """So that checkpoints, exports and plain models fit, whichever was compiled."""
    compiled, plain = (
        make_model("XLEARNER.COMPILE", backend, seed=number) for number, backend in enumerate(("eager", ""))
    )
    stages = [part for branch in compiled.backbone.branches.values() for part in (branch.stem, *branch.stages)]
    assert all(part._compiled_call_impl is not None for part in stages)
    plain.load_state_dict(compiled.state_dict())
    assert copy.deepcopy(compiled).state_dict().keys() == plain.state_dict().keys()
