"""Weights of other projects give their features; files that are damaged or run code are refused."""

import contextlib
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xlearner_d2.checkpoint.load import load_resnet, load_strictly, read_checkpoint
from xlearner_d2.checkpoint.names import resnet_state
from xlearner_d2.specs import ConfigError

STAGES = ["res2", "res3", "res4", "res5"]


def build_resnet(depth: int, *, out_features: list[str] = STAGES, norm: str = "BN", **resnets: Any) -> ResNet:
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    options = {"DEPTH": depth, "NORM": norm, "OUT_FEATURES": out_features, "STRIDE_IN_1X1": False, **resnets}
    if depth < 50:
        options["RES2_OUT_CHANNELS"] = 64
    cfg.MODEL.RESNETS.update(options)
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def small_resnet(**options: Any) -> ResNet:
    return build_resnet(50, STEM_OUT_CHANNELS=8, WIDTH_PER_GROUP=4, RES2_OUT_CHANNELS=16, **options)


def randomise_norm(model: nn.Module) -> nn.Module:
    """Statistics and scales that matter, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0, generator=generator)
            module.bias.data.uniform_(-0.1, 0.1, generator=generator)
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def images() -> Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def torchvision_features(model: nn.Module) -> dict[str, Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images()))))
    features = {}
    for number, name in enumerate(STAGES, 1):
        features[name] = x = getattr(model, f"layer{number}")(x)
    return features


def caffe2_state(resnet: nn.Module) -> dict[str, np.ndarray]:
    """A ResNet's weights under the names of Detectron's ImageNet files, with the other things those hold."""
    tail = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    branch = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
    found = {"fc1000_w": np.zeros((10, 4), "float32"), "conv1_w_momentum": np.zeros(3, "float32"), "lr": np.zeros(1)}
    for name, value in resnet.state_dict().items():
        parts = name.split(".")
        if parts[-1] == "num_batches_tracked":
            continue
        end = f"bn_{tail[parts[-1]]}" if parts[-2] == "norm" else "w"
        if parts[0] == "stem":
            start = "res_conv1" if parts[-2] == "norm" else "conv1"
        else:
            start = f"{parts[0]}_{parts[1]}_{branch[parts[2]]}"
        found[f"{start}_{end}"] = value.numpy()
    return found


def write_pickle(path: Path, data: Any, **options: Any) -> Path:
    path.write_bytes(pickle.dumps(data, **options))
    return path


def write_torch(path: Path, data: Any, **options: Any) -> Path:
    torch.save(data, path, **options)
    return path


# Names


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_torchvision_weights_give_torchvision_features(tmp_path: Path, depth: int, wrap: Callable[[Any], Any]) -> None:
    theirs = randomise_norm(getattr(torchvision.models, f"resnet{depth}")(weights=None))
    ours = build_resnet(depth).eval()
    report = load_resnet(ours, write_torch(tmp_path / "tv.pth", wrap(theirs.state_dict())))
    assert (report.missing, report.unexpected) == ((), ())
    assert str(report) == f"{len(ours.state_dict())} tensors loaded"
    with torch.no_grad():
        expected, found = torchvision_features(theirs), ours(images())
    for name in STAGES:
        assert (found[name] - expected[name]).abs().max() < 1e-5


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"blobs": state, "cfg": "text"}])
def test_caffe2_weights_give_the_same_features(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    theirs, ours = randomise_norm(small_resnet()), small_resnet().eval()
    report = load_resnet(ours, write_pickle(tmp_path / "msra.pkl", wrap(caffe2_state(theirs))))
    assert {name.split(".")[-1] for name in report.missing} == {"num_batches_tracked"}
    assert report.unexpected == ()
    with torch.no_grad():
        expected, found = theirs(images()), ours(images())
    assert all(torch.equal(found[name], expected[name]) for name in STAGES)


def test_caffe2_weights_without_statistics_are_an_affine_map(tmp_path: Path) -> None:
    """As in the MSRA files, whose statistics are folded into the scales: mean 0 and variance 1 stay."""
    theirs = randomise_norm(small_resnet())
    state = {name: v for name, v in caffe2_state(theirs).items() if not name.endswith(("_rm", "_riv"))}
    ours = small_resnet()
    report = load_resnet(ours, write_pickle(tmp_path / "msra.pkl", state))
    assert torch.equal(ours.stem.conv1.norm.bias, theirs.stem.conv1.norm.bias)
    assert not ours.stem.conv1.norm.running_mean.any()
    assert ours.stem.conv1.norm.running_var.eq(1).all()
    assert "stem.conv1.norm.running_mean" in report.missing
    assert "missing from the file" in str(report)


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.bottom_up.", "student.", "module.backbone."])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_detectron2_weights_alone_or_within_a_model(tmp_path: Path, prefix: str, suffix: str) -> None:
    theirs, ours = small_resnet(), small_resnet()
    state = {f"{prefix}{name}": value for name, value in theirs.state_dict().items()}
    if prefix:
        state |= {"roi_heads.box.weight": torch.zeros(1), "proposal_generator.stem.bias": torch.zeros(1)}
    if suffix == ".pkl":
        arrays = {name: value.numpy() for name, value in state.items()}
        path = write_pickle(tmp_path / "d2.pkl", {"model": arrays, "__author__": "somebody"})
    else:
        path = write_torch(tmp_path / "d2.pth", {"model": state, "iteration": 7})
    report = load_resnet(ours, path)
    assert (report.missing, report.unexpected) == ((), ())
    assert all(torch.equal(theirs.state_dict()[name], value) for name, value in ours.state_dict().items())


def test_stages_that_are_not_needed_are_reported(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "all.pth", small_resnet().state_dict())
    report = load_resnet(small_resnet(out_features=["res4"]), path)
    assert report.missing == ()
    assert {name.split(".")[0] for name in report.unexpected} == {"res5"}
    assert "unused (res5.0." in str(report)


def test_several_resnets_in_one_file_are_ambiguous() -> None:
    state = {f"branches.{task}.{name}": v for task in "ab" for name, v in small_resnet().state_dict().items()}
    assert resnet_state(state) == {}


# What does not fit


def test_wrong_depth_names_tensor_and_shapes(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "r50.pth", small_resnet().state_dict())
    wanted = r"r50\.pth does not fit MODEL\.RESNETS; it has .*res2\.0\.conv1\.weight has shape \(4, 8, 1, 1\), but"
    with pytest.raises(ConfigError, match=f"(?s){wanted}"):
        load_resnet(build_resnet(18), path)


def test_file_without_a_weight(tmp_path: Path) -> None:
    state = small_resnet().state_dict()
    del state["res3.0.shortcut.weight"]
    with pytest.raises(ConfigError, match=r"part\.pth does not fit .*\n.*res3\.0\.shortcut\.weight is missing"):
        load_resnet(small_resnet(), write_torch(tmp_path / "part.pth", state))


@pytest.mark.parametrize("state", [{}, {"transformer.weight": torch.zeros(2)}])
def test_file_without_a_resnet(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"other\.pth holds no ResNet under names of Detectron2, torchvision or C"):
        load_resnet(small_resnet(), write_torch(tmp_path / "other.pth", state))


def test_an_expanded_model_is_no_resnet_but_has_some(tmp_path: Path) -> None:
    names = {f"backbone.branches.{task}.{name}": v for task in "ab" for name, v in small_resnet().state_dict().items()}
    data = {"model": names, "xlearner": {"tasks": [{"name": "a"}, {"name": "b"}]}}
    with pytest.raises(
        ConfigError, match=r"expanded\.pth holds no .* an expanded model of the tasks a, b; .* FILE:TASK"
    ):
        load_resnet(small_resnet(), write_torch(tmp_path / "expanded.pth", data))


def test_strict_loading_names_every_difference() -> None:
    module = nn.Linear(2, 3)
    with pytest.raises(ConfigError, match=r"The checkpoint x\.pth does not fit the model; it has 3 problems") as caught:
        load_strictly(module, {"weight": torch.zeros(3, 4), "scale": torch.zeros(1)}, path="x.pth")
    assert caught.value.problems == [
        "bias is missing.",
        "scale is unexpected.",
        "weight has shape (3, 4), but (3, 2) is needed.",
    ]


def test_strict_loading_changes_nothing_when_it_fails() -> None:
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    with pytest.raises(ConfigError, match=r"bias is missing"):
        load_strictly(module, {"weight": torch.ones(3, 2)}, path="x.pth")
    assert torch.equal(module.weight, before)


def test_many_differences_are_shortened() -> None:
    with pytest.raises(ConfigError, match=r"11\. … and \d+ more tensors") as caught:
        load_strictly(small_resnet(), {}, path="x.pth")
    assert len(caught.value.problems) == 11


# Files that run code


class Call:
    """Pickles to a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def attacks(sentinel: Path) -> dict[str, Any]:
    """Objects that leave ``sentinel`` behind when a plain unpickler reads them."""
    text = f"open({str(sentinel)!r}, 'w').close()"
    hidden = np.empty(1, dtype=object)
    hidden[0] = Call(os.system, f"touch {sentinel}")
    return {
        "os.system": Call(os.system, f"touch {sentinel}"),
        "exec": Call(exec, text),
        "eval": Call(eval, text),
        "subprocess": Call(subprocess.check_call, ["touch", str(sentinel)]),
        "within an array": hidden,
        "nested pickle": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {sentinel}"))),
        "numpy's own": Call(np.testing.runstring, text, {}) if hasattr(np.testing, "runstring") else Call(exec, text),
    }


@pytest.mark.parametrize("name", attacks(Path("x")))
@pytest.mark.parametrize("kind", ["pkl", "pth", "old pth", "pickle called pth"])
@pytest.mark.parametrize("place", ["weight", "extra", "whole"])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path: Path, name: str, kind: str, place: str) -> None:
    sentinel = tmp_path / "ran"
    attack = attacks(sentinel)[name]
    good = {"stem.conv1.weight": np.zeros(2)}
    data = {"weight": {"model": {**good, "w": attack}}, "extra": {"model": good, "epoch": attack}, "whole": attack}
    if kind in ("pkl", "pickle called pth"):
        path = write_pickle(tmp_path / ("x.pkl" if kind == "pkl" else "x.pth"), data[place])
    else:
        path = write_torch(tmp_path / "x.pth", data[place], _use_new_zipfile_serialization=kind == "pth")
    with pytest.raises(ConfigError, match=r"x\.p\w\w cannot be read"):
        read_checkpoint(path)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_the_attacks_would_work_on_a_plain_unpickler(tmp_path: Path, name: str) -> None:
    sentinel = tmp_path / "ran"
    pickle.loads(pickle.dumps(attacks(sentinel)[name]))
    assert sentinel.exists()


@pytest.mark.parametrize("write", [write_pickle, write_torch])
def test_refusal_names_what_the_file_asks_for(tmp_path: Path, write: Callable[..., Path]) -> None:
    """In our words: torch's advise to run the file's code."""
    path = write(tmp_path / ("x.pkl" if write is write_pickle else "x.pth"), {"model": Call(os.system, "true")})
    with pytest.raises(ConfigError, match=r"cannot be read: it asks for posix\.system, which weights have no use for$"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["_reconstruct.__globals__", "multiarray.os.system", "ndarray.__class__"])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray", "numpy", "collections"])
def test_dotted_names_do_not_lead_out_of_numpy(tmp_path: Path, module: str, name: str) -> None:
    path = tmp_path / "x.pkl"
    # Protocol 4: two strings, STACK_GLOBAL, stop.
    strings = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    path.write_bytes(b"\x80\x04" + strings + b"\x93.")
    with pytest.raises(ConfigError, match=r"it asks for "):
        read_checkpoint(path)


# Files that are damaged


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"There is no checkpoint nowhere/x\.pth"):
        read_checkpoint("nowhere/x.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, suffix: str, share: float) -> None:
    state = {"w": np.zeros(5000, "float32")}
    path = tmp_path / f"x{suffix}"
    write_pickle(path, state) if suffix == ".pkl" else write_torch(path, {"w": torch.zeros(5000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ConfigError, match=rf"x\{suffix} cannot be read"):
        read_checkpoint(path)


@pytest.mark.parametrize("data", [torch.zeros(3), [torch.zeros(3)], "weights", {"model": torch.zeros(3)}])
def test_file_of_something_else(tmp_path: Path, data: Any) -> None:
    with pytest.raises(ConfigError, match=r"x\.pth holds a \w+, but a dict of weights is expected"):
        read_checkpoint(write_torch(tmp_path / "x.pth", data))


def test_array_of_objects_is_refused(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "x.pkl", {"w": np.array([{}, []], dtype=object)})
    with pytest.raises(ConfigError, match=r"x\.pkl cannot be read: .*object"):
        read_checkpoint(path)


def test_names_that_are_no_strings_are_left_out(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "x.pth", {0: torch.zeros(1), "w": torch.ones(1)})
    assert list(read_checkpoint(path)["model"]) == ["w"]


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_file_gives_a_clear_error_or_loads(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    path = tmp_path / f"x{suffix}"
    state = {"model": {"a": torch.arange(6.0), "b": torch.zeros(2, 3)}, "note": "text"}
    if suffix == ".pkl":
        write_pickle(path, {**state, "model": {name: v.numpy() for name, v in state["model"].items()}})
    else:
        write_torch(path, state, _use_new_zipfile_serialization=False)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with contextlib.suppress(ConfigError):  # the one error that is allowed
        assert isinstance(read_checkpoint(path)["model"], dict)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_arrays_of_any_protocol(tmp_path: Path, protocol: int) -> None:
    array = np.arange(6, dtype="float32").reshape(2, 3)
    path = write_pickle(tmp_path / "x.pkl", {"w": array, "scalar": np.float32(2)}, protocol=protocol)
    found = read_checkpoint(path)["model"]
    assert torch.equal(found["w"], torch.from_numpy(array))
    assert found["scalar"] == 2
