"""A suite whose MODEL names a network of timm: students, branches and random weights, in each family."""

from pathlib import Path

import pytest
from tiny_suite import TinySuite

from xlearner_d2.specs import ConfigError
from xlearner_d2.transfer.backbones import BackboneSpec, check_backbones
from xlearner_d2.transfer.protocols import run_protocol
from xlearner_d2.transfer.suite import Suite

PROTOCOLS = {"probe": "pics", "knn": "pics", "tuned": "pics", "dense": "boxes", "linear": "areas"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinySuite:
    found = TinySuite(tmp_path_factory.mktemp("timm_suite"))
    found.content["MODEL"]["BACKBONE"] = {"TIMM": "test_convnext"}
    found.content["TRANSFER"]["SETS"]["pics"]["PROTOCOLS"] = ["probe", "knn", "tuned"]
    found.write()
    found.student()
    found.expanded()
    return found


@pytest.fixture(scope="module")
def suite(tiny: TinySuite) -> Suite:
    return tiny.parse()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("file", ["student.pth", "expanded.pth", "random"])
def test_every_protocol_measures_every_kind_of_backbone(
    tiny: TinySuite, suite: Suite, protocol: str, file: str, tmp_path: Path
) -> None:
    backbone = BackboneSpec(
        name="it",
        path="random" if file == "random" else str(tiny.root / file),
        task="objects" if file == "expanded.pth" else "",
    )
    check_backbones([backbone], [0], suite.cfg)
    spec, of = suite.sets[PROTOCOLS[protocol]], suite.protocols[protocol]
    value, _ = run_protocol(suite, spec, of, backbone, seed=0, cache=tmp_path / "features.npz")
    assert 0 <= value <= 100


def test_a_file_of_another_network_is_refused(tiny: TinySuite) -> None:
    resnet = tiny.student("resnet.pth", opts=["MODEL.BACKBONE.TIMM", ""])
    with pytest.raises(ConfigError, match="--weights it: "):
        check_backbones([BackboneSpec(name="it", path=str(resnet))], [0], tiny.load())


def test_another_network_is_measured_anew(tiny: TinySuite, suite: Suite) -> None:
    other = tiny.parse("MODEL.BACKBONE.TIMM", "test_efficientnet")
    for name, spec in suite.sets.items():
        protocol = suite.protocols[spec.protocols[0]]
        assert suite.settings(spec, protocol) != other.settings(other.sets[name], protocol)
