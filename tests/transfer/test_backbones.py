"""The backbones that are compared: how they are named, checked and loaded."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import Backbone
from detectron2.utils.file_io import PathManager
from tiny_suite import TinySuite
from torch import Tensor

from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.modeling.expanded import STAGES, build_branch
from xlearner_d2.modeling.plug_in import load_expanded_backbone
from xlearner_d2.specs import ConfigError
from xlearner_d2.transfer.backbones import (
    BackboneSpec,
    check_backbones,
    fingerprint,
    load_backbone,
    parse_backbone,
    parse_backbones,
)

WIDER = ["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinySuite:
    """A suite with ``student.pth`` and ``expanded.pth``."""
    suite = TinySuite(tmp_path_factory.mktemp("backbones"))
    suite.student()
    suite.expanded()
    return suite


def spec(path: Any, task: str = "", name: str = "mine") -> BackboneSpec:
    return BackboneSpec(name=name, path=str(path), task=task)


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def features(backbone: Backbone) -> dict[str, Tensor]:
    with torch.no_grad():
        return backbone.eval()(images())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def checked(tiny: TinySuite, *backbones: BackboneSpec, seeds: tuple[int, ...] = (0,)) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_backbones(backbones, seeds, tiny.load())
    return caught.value.problems


# Names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("random=random", BackboneSpec(name="random", path="random")),
        ("single/icons=a/b.pth", BackboneSpec(name="single/icons", path="a/b.pth")),
        ("mine=a=b.pth", BackboneSpec(name="mine", path="a=b.pth")),
        ("mine=https://a/b.pth", BackboneSpec(name="mine", path="https://a/b.pth")),
        ("mine=http://a:80/b.pth", BackboneSpec(name="mine", path="http://a:80/b.pth")),
        ("mine=https://a/b.pth:boxes", BackboneSpec(name="mine", path="https://a/b.pth", task="boxes")),
        ("expanded=out/x.pth:boxes", BackboneSpec(name="expanded", path="out/x.pth", task="boxes")),
        ("mine=seed{seed}/x.pth:boxes", BackboneSpec(name="mine", path="seed{seed}/x.pth", task="boxes")),
    ],
)
def test_name_path_and_task(text: str, expected: BackboneSpec) -> None:
    assert parse_backbone(text) == expected


def test_a_colon_may_be_part_of_a_path(tmp_path: Path) -> None:
    path = tmp_path / "12:30.pth"
    path.touch()
    assert parse_backbone(f"mine={path}") == BackboneSpec(name="mine", path=str(path))
    assert parse_backbone(f"mine={path}:boxes") == BackboneSpec(name="mine", path=str(path), task="boxes")


BAD = ["mine", "=a.pth", "mine=", "mine=:boxes", "mine=a.pth:", "mine=random:boxes", ""]


def test_all_bad_names_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_backbones(["random=random", *BAD])
    expected = "NAME=PATH, NAME=PATH:TASK or NAME=random is expected."
    assert caught.value.problems == [f"--weights {text!r}: {expected}" for text in BAD]


def test_what_has_an_address_is_fetched(tiny: TinySuite, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.root / "student.pth"
    asked: list[str] = []
    monkeypatch.setattr(PathManager, "get_local_path", lambda address: (asked.append(address), str(path))[1])
    assert parse_backbones(["mine=https://a/b.pth:boxes"]) == [spec(path, "boxes")]
    assert asked == ["https://a/b.pth"]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"(?s)gone://b\.pth cannot be fetched.*\{seed\} stands in paths alone"):
        parse_backbones(["mine=gone://b.pth", "mine=https://a/{seed}.pth"])


def test_seed_stands_in_the_path() -> None:
    backbone = spec("runs/seed{seed}/x.pth")
    assert backbone.file(4) == Path("runs/seed4/x.pth")
    assert spec("random").file(4) is None


# Checks


def test_backbones_that_can_be_loaded_pass(tiny: TinySuite) -> None:
    student, expanded = tiny.root / "student.pth", tiny.root / "expanded.pth"
    found = [spec(student, name="a"), spec(expanded, "labels", name="b"), spec("random", name="c/d-e_1")]
    check_backbones(found, range(2), tiny.load())


def test_all_problems_of_the_backbones_come_at_once(tiny: TinySuite) -> None:
    student, expanded = tiny.root / "student.pth", tiny.root / "expanded.pth"
    found = checked(
        tiny,
        spec(student, name="same"),
        spec("random", name="same"),
        spec(student, name="a.b"),
        spec("gone{seed}.pth", name="gone"),
        spec(expanded, "label", name="typo"),
        spec(student, "labels", name="plain"),
        spec(expanded, name="whole"),
        seeds=(0, 1),
    )
    expected = [
        "--weights gives 'same' twice.",
        "--weights 'a.b': a role such as squeezed, or role/variant, of letters",
        "--weights gone: there is no file gone0.pth.",
        "--weights gone: there is no file gone1.pth.",
        "--weights typo: .*'label' is no task of .*expanded.pth. Did you mean 'labels'",
        "--weights plain: .*student.pth is no expanded checkpoint",
        "--weights whole: .*expanded.pth holds no ResNet",
    ]
    assert len(found) == len(expected)
    for text, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, text.replace("\n", " ")), (text, pattern)


def test_a_resnet_of_another_architecture_is_refused(tiny: TinySuite) -> None:
    path = tiny.student("wide.pth", opts=WIDER)
    (message,) = checked(tiny, spec(path))
    assert re.search(r"wide\.pth, which says that it is of a ResNet-\d+, does not fit MODEL\.RESNETS", message)
    assert "has shape (" in message


def test_a_branch_of_another_architecture_is_refused(tiny: TinySuite) -> None:
    path = tiny.expanded(*WIDER, name="wide.pth", tasks=("labels",))
    (message,) = checked(tiny, spec(path, "labels"))
    assert "wide.pth, labels: res2 has 32 channels at stride 4, but 16 at stride 4 are expected" in message


def test_an_unreadable_file_is_named(tiny: TinySuite) -> None:
    path = tiny.root / "text.pth"
    path.write_text("hello")
    (message,) = checked(tiny, spec(path))
    assert "text.pth cannot be read" in message


# Fingerprints


def test_fingerprint_is_of_the_content_and_the_task(tiny: TinySuite) -> None:
    expanded, student = tiny.root / "expanded.pth", tiny.root / "student.pth"
    copy = tiny.root / "copy.pth"
    copy.write_bytes(student.read_bytes())
    assert fingerprint(spec(student), 0) == fingerprint(spec(copy, name="other"), 1)
    prints = [fingerprint(b, 0) for b in (spec(student), spec(expanded, "labels"), spec(expanded, "objects"))]
    assert len({*prints}) == 3
    assert fingerprint(spec("random"), 0) == ""


# Loading


def test_a_file_is_loaded_as_it_is(tiny: TinySuite) -> None:
    backbone = load_backbone(spec(tiny.root / "student.pth"), tiny.load(), seed=0)
    stored = read_checkpoint(tiny.root / "student.pth")["model"]
    assert all(torch.equal(value, stored[name]) for name, value in backbone.state_dict().items() if name in stored)
    assert list(backbone.output_shape()) == list(STAGES)


def test_a_branch_gives_the_features_of_the_expanded_backbone(tiny: TinySuite) -> None:
    path = tiny.root / "expanded.pth"
    branch = load_backbone(spec(path, "objects"), tiny.load(), seed=0)
    whole = load_expanded_backbone(str(path)).eval()
    with torch.no_grad():
        assert same(features(branch), whole(images(), "objects"))
        assert not same(features(branch), whole(images(), "labels"))


def test_random_weights_are_the_seeds_alone(tiny: TinySuite) -> None:
    """Whatever was drawn before, and whichever network they are loaded into."""
    cfg = tiny.load()
    first = load_backbone(spec("random"), cfg, seed=3)
    state = torch.random.get_rng_state()
    resnet = build_branch(cfg, out_features=["res4"])
    torch.random.set_rng_state(state)
    other = load_backbone(spec("random"), cfg, seed=3, resnet=resnet)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert other is resnet
    assert torch.equal(features(first)["res4"], features(other)["res4"])
    assert not same(features(load_backbone(spec("random"), cfg, seed=4)), features(first))


@pytest.mark.parametrize("freeze_at", [0, 2, 5])
@pytest.mark.parametrize("own_freeze_at", [0, 2])
@pytest.mark.parametrize("file", ["random", "student.pth"])
def test_loading_keeps_what_is_frozen(tiny: TinySuite, freeze_at: int, own_freeze_at: int, file: str) -> None:
    """Whatever the suite's own FREEZE_AT is."""
    cfg = tiny.load("MODEL.BACKBONE.FREEZE_AT", own_freeze_at)
    backbone = spec(file if file == "random" else tiny.root / file)
    head = tiny.load("MODEL.BACKBONE.FREEZE_AT", freeze_at)
    resnet = load_backbone(backbone, cfg, seed=0, resnet=build_branch(head, out_features=STAGES))
    frozen = [all(not p.requires_grad for p in getattr(resnet, part).parameters()) for part in ("stem", *STAGES)]
    assert frozen == [number <= freeze_at for number in range(1, 6)]
    assert same(features(resnet), features(load_backbone(backbone, tiny.load(), seed=0)))
