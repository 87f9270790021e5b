"""Files of torchvision, timm and Caffe2 give the features of their own models, whatever the pixels are here."""

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from detectron2.config import get_cfg
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_load import STAGES, build_resnet, caffe2_state, randomise_norm, small_resnet
from torch import Tensor, nn

from xlearner_d2.checkpoint.load import check_resnet, load_resnet, read_checkpoint
from xlearner_d2.checkpoint.pixels import CAFFE2, IMAGENET, PixelConvention, stem_conversion
from xlearner_d2.modeling.timm_backbone import TimmBackbone
from xlearner_d2.specs import ConfigError

#: Detectron2's default.
DETECTRON2 = PixelConvention.of(get_cfg())
RGB_OF_1 = PixelConvention("RGB", (123.675, 116.28, 103.53), (1.0, 1.0, 1.0))
BGR_IMAGENET = IMAGENET.flipped


def normalised(convention: PixelConvention, side: int = 64) -> Tensor:
    """One picture as a model with that convention is given it: (1, 3, H, W)."""
    rgb = 255 * torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    pixels = rgb if convention.format == "RGB" else rgb.flip(1)
    mean, std = (torch.tensor(of).view(1, 3, 1, 1) for of in (convention.mean, convention.std))
    return (pixels - mean) / std


def features_of_torchvision(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    found = {}
    for number, name in enumerate(STAGES, 1):
        found[name] = x = getattr(model, f"layer{number}")(x)
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all((found[name] - expected[name]).abs().max() < 1e-4 * expected[name].abs().max() for name in expected)


def save(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({name: np.asarray(value) for name, value in state.items()}))
    else:
        torch.save(state, path)
    return path


# Networks


@pytest.mark.parametrize("convention", [IMAGENET, DETECTRON2, RGB_OF_1, BGR_IMAGENET], ids=str)
def test_torchvision_features_with_any_pixels(tmp_path: Path, convention: PixelConvention) -> None:
    theirs = randomise_norm(torchvision.models.resnet18(weights=None))
    ours = build_resnet(18).eval()
    report = load_resnet(ours, save(tmp_path / "tv.pth", theirs.state_dict()), pixels=convention)
    same = convention == IMAGENET
    assert report.converted == (() if same else ("stem.conv1.weight",))
    assert torch.equal(ours.stem.conv1.weight, theirs.conv1.weight) == same
    with torch.no_grad():
        expected = features_of_torchvision(theirs, normalised(IMAGENET))
        assert close(ours(normalised(convention)), expected)
        assert not same or all(torch.equal(ours(normalised(convention))[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnext50_32x4d", {"NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}),
        ("wide_resnet50_2", {"WIDTH_PER_GROUP": 128}),
        ("resnet101", {"DEPTH": 101}),
    ],
)
def test_variants_of_torchvision(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    theirs = randomise_norm(getattr(torchvision.models, name)(weights=None))
    ours = build_resnet(50, **options).eval()
    report = load_resnet(ours, save(tmp_path / "tv.pth", theirs.state_dict()))
    assert (report.missing, report.unexpected) == ((), ())
    with torch.no_grad():
        assert close(ours(normalised(IMAGENET)), features_of_torchvision(theirs, normalised(IMAGENET)))


@pytest.mark.parametrize(("name", "norm"), [("resnet34", "BN"), ("resnet50_gn", "GN")])
def test_a_timm_resnet_in_detectron2s(tmp_path: Path, name: str, norm: str) -> None:
    """As a file from the Hugging Face hub: safetensors."""
    theirs = randomise_norm(timm.create_model(name))
    ours = build_resnet(34 if norm == "BN" else 50, norm=norm).eval()
    report = load_resnet(ours, save(tmp_path / "model.safetensors", theirs.state_dict()), pixels=DETECTRON2)
    assert (report.missing, report.unexpected) == ((), ())
    with torch.no_grad():
        expected = theirs.forward_intermediates(normalised(IMAGENET), intermediates_only=True)[-4:]
        assert close(ours(normalised(DETECTRON2)), dict(zip(STAGES, expected, strict=True)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "regnetx_002", "repvgg_a0"])
def test_timm_features_with_detectron2s_pixels(tmp_path: Path, name: str, suffix: str) -> None:
    theirs = randomise_norm(timm.create_model(name))
    ours = TimmBackbone(name=name, out_features=STAGES).eval()
    expects = PixelConvention("RGB", ours.pixel_mean, ours.pixel_std)
    here = PixelConvention("BGR", tuple(reversed(ours.pixel_mean)), (1.0, 1.0, 1.0))
    report = load_resnet(ours, save(tmp_path / f"model{suffix}", theirs.state_dict()), pixels=here)
    assert report.missing == ()
    heads = ("head.", "classifier.", "conv_head.", "bn2.")
    assert report.unexpected
    assert all(name.startswith(heads) for name in report.unexpected)
    assert "channels reversed and scaled to MODEL.PIXEL_STD (stem." in str(report)
    with torch.no_grad():
        expected = theirs.forward_intermediates(normalised(expects), intermediates_only=True)[-4:]
        assert close(ours(normalised(here)), dict(zip(STAGES, expected, strict=True)))


@pytest.mark.parametrize("convention", [DETECTRON2, RGB_OF_1], ids=str)
def test_caffe2_features_with_either_order(tmp_path: Path, convention: PixelConvention) -> None:
    theirs = randomise_norm(small_resnet(STRIDE_IN_1X1=True))
    ours = small_resnet(STRIDE_IN_1X1=True).eval()
    report = load_resnet(ours, save(tmp_path / "R-50.pkl", caffe2_state(theirs)), pixels=convention)
    assert report.converted == (() if convention == DETECTRON2 else ("stem.conv1.weight",))
    with torch.no_grad():
        assert close(ours(normalised(convention)), theirs(normalised(DETECTRON2)))


def test_a_pkl_that_detectron2_converted_from_torchvision(tmp_path: Path) -> None:
    theirs = randomise_norm(small_resnet())
    path = tmp_path / "R-50.pkl"
    weights = {name: value.numpy() for name, value in theirs.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "torchvision", "matching_heuristics": True}))
    ours = small_resnet().eval()
    assert load_resnet(ours, path, pixels=DETECTRON2).converted == ("stem.conv1.weight",)
    with torch.no_grad():
        assert close(ours(normalised(DETECTRON2)), theirs(normalised(IMAGENET)))


def test_a_student_that_was_made_for_other_pixels(tmp_path: Path) -> None:
    theirs = randomise_norm(small_resnet())
    made_for = {"format": "RGB", "pixel_mean": list(IMAGENET.mean or ()), "pixel_std": list(IMAGENET.std or ())}
    content = {"model": theirs.state_dict(), "xlearner": {"input": made_for, "resnets": {"STRIDE_IN_1X1": False}}}
    torch.save(content, tmp_path / "student.pth")
    ours = small_resnet().eval()
    load_resnet(ours, tmp_path / "student.pth", pixels=DETECTRON2)
    with torch.no_grad():
        assert close(ours(normalised(DETECTRON2)), theirs(normalised(IMAGENET)))


@pytest.mark.parametrize("in_1x1", [False, True])
def test_strides_move_to_where_the_file_has_them(
    tmp_path: Path, in_1x1: bool, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = randomise_norm(small_resnet(STRIDE_IN_1X1=in_1x1))
    made_for = {"format": "BGR", "pixel_mean": list(DETECTRON2.mean or ()), "pixel_std": list(DETECTRON2.std or ())}
    content = {"model": theirs.state_dict(), "xlearner": {"input": made_for, "resnets": {"STRIDE_IN_1X1": in_1x1}}}
    torch.save(content, tmp_path / "student.pth")
    ours = small_resnet(STRIDE_IN_1X1=not in_1x1).eval()
    load_resnet(ours, tmp_path / "student.pth", move_strides=True)
    assert not caplog.records
    with torch.no_grad():
        assert close(ours(normalised(DETECTRON2)), theirs(normalised(DETECTRON2)))


def test_weights_of_unknown_origin_stay_as_they_are(tmp_path: Path) -> None:
    theirs, ours = small_resnet(), small_resnet()
    report = load_resnet(ours, save(tmp_path / "x.pth", theirs.state_dict()), pixels=RGB_OF_1)
    assert report.converted == ()
    assert torch.equal(ours.stem.conv1.weight, theirs.stem.conv1.weight)


# What cannot be converted is said


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.WARNING, "xlearner_d2")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def test_another_mean(tmp_path: Path, warned: Callable[[], str]) -> None:
    here = PixelConvention("RGB", (127.5, 127.5, 127.5), IMAGENET.std)
    path = save(tmp_path / "tv.pth", torchvision.models.resnet18(weights=None).state_dict())
    load_resnet(build_resnet(18), path, pixels=here)
    wanted = "tv.pth: MODEL.PIXEL_MEAN is [127.5, 127.5, 127.5], but the file is for [123.675, 116.28, 103.53]"
    assert wanted in warned()


def test_another_order_than_rgb_or_bgr(tmp_path: Path, warned: Callable[[], str]) -> None:
    path = save(tmp_path / "tv.pth", torchvision.models.resnet18(weights=None).state_dict())
    ours = build_resnet(18)
    report = load_resnet(ours, path, pixels=PixelConvention("YUV-BT.601", (0.0,) * 3, (1.0,) * 3))
    assert report.converted == ()
    assert "INPUT.FORMAT is 'YUV-BT.601'" in warned()


@pytest.mark.parametrize("in_1x1", [True, False])
@pytest.mark.parametrize("kind", ["caffe2", "torchvision"])
def test_another_stride_placement(tmp_path: Path, warned: Callable[[], str], in_1x1: bool, kind: str) -> None:
    ours = build_resnet(50, STRIDE_IN_1X1=in_1x1)
    if kind == "caffe2":
        path = save(tmp_path / "R-50.pkl", caffe2_state(build_resnet(50)))
    else:
        path = save(tmp_path / "tv.pth", torchvision.models.resnet50(weights=None).state_dict())
    load_resnet(ours, path)
    trained = kind == "caffe2"
    said = f"trained with MODEL.RESNETS.STRIDE_IN_1X1 {trained}, but that is {in_1x1}" in warned()
    assert said == (trained != in_1x1)


def test_basic_blocks_have_their_stride_in_one_place(tmp_path: Path, warned: Callable[[], str]) -> None:
    load_resnet(build_resnet(18), save(tmp_path / "R-18.pkl", caffe2_state(build_resnet(18))))
    assert warned() == ""


def test_stem_that_normalises_its_weights(tmp_path: Path, warned: Callable[[], str]) -> None:
    theirs = timm.create_model("test_nfnet")
    ours = TimmBackbone(name="test_nfnet", out_features=["res3"])
    report = load_resnet(ours, save(tmp_path / "nf.pth", theirs.state_dict()), pixels=DETECTRON2)
    assert report.converted == ()
    assert "normalises its own weights" in warned()


# The report


def test_shapes_with_sides_of_one_are_re_shaped(tmp_path: Path) -> None:
    theirs, ours = small_resnet(), small_resnet()
    state = theirs.state_dict()
    state["res2.0.conv1.weight"] = state["res2.0.conv1.weight"][..., 0, 0]  # as of a linear layer
    report = load_resnet(ours, save(tmp_path / "x.pth", state))
    assert report.reshaped == ("res2.0.conv1.weight",)
    assert str(report).endswith("1 re-shaped (res2.0.conv1.weight)")
    assert torch.equal(ours.res2[0].conv1.weight, theirs.res2[0].conv1.weight)


def test_shapes_of_other_numbers_are_refused(tmp_path: Path) -> None:
    state = small_resnet().state_dict()
    state["res2.0.conv1.weight"] = state["res2.0.conv1.weight"].mT.permute(1, 0, 2, 3)
    with pytest.raises(ConfigError, match=r"res2\.0\.conv1\.weight has shape \(8, 4, 1, 1\), but \(4, 8, 1, 1\)"):
        load_resnet(small_resnet(), save(tmp_path / "x.pth", state))


def test_a_file_of_another_network(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", timm.create_model("test_efficientnet").state_dict())
    with pytest.raises(ConfigError, match=r"x\.safetensors holds no test_convnext under names of timm"):
        load_resnet(TimmBackbone(name="test_convnext", out_features=STAGES), path)


def test_a_file_of_another_size(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", timm.create_model("test_convnext2").state_dict())
    with pytest.raises(ConfigError, match=r"does not fit MODEL\.BACKBONE\.TIMM; it has 10 .*\n.*gamma is missing"):
        load_resnet(TimmBackbone(name="test_convnext", out_features=STAGES), path)


def test_a_fit_is_checked_without_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", small_resnet().state_dict())
    with torch.device("meta"):
        small, large = small_resnet(), build_resnet(50)
    check_resnet(small, path)
    with pytest.raises(ConfigError, match=r"does not fit MODEL\.RESNETS"):
        check_resnet(large, path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_safetensors(tmp_path: Path, share: float) -> None:
    path = save(tmp_path / "x.safetensors", {"w": torch.zeros(5000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ConfigError, match=r"x\.safetensors cannot be read"):
        read_checkpoint(path)


# The laws of conversion


CHANNELS = st.tuples(*[st.floats(0.5, 200)] * 3)


@given(st.sampled_from(["RGB", "BGR"]), st.sampled_from(["RGB", "BGR"]), CHANNELS, CHANNELS, CHANNELS)
def test_conversion_is_exact_for_any_std(
    made_for: str, used_with: str, mean: tuple[float, ...], std: tuple[float, ...], other: tuple[float, ...]
) -> None:
    first = PixelConvention(made_for, mean, std)
    second = PixelConvention(used_with, mean if made_for == used_with else tuple(reversed(mean)), other)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = (
        nn.functional.conv2d(normalised(of, 9).double(), kernel, padding=1)
        for of, kernel in ((second, stem_conversion(first, second)(weight)), (first, weight))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_what_is_not_known_is_not_converted() -> None:
    assert str(stem_conversion(CAFFE2, DETECTRON2)) == ""
    assert str(stem_conversion(CAFFE2, RGB_OF_1)) == "channels reversed"
    assert str(stem_conversion(IMAGENET, BGR_IMAGENET)) == "channels reversed"
    assert str(stem_conversion(IMAGENET, IMAGENET)) == ""
