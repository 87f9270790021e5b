"""What a config needs to use a network that was trained with another one."""

import pytest

from xlearner_d2.checkpoint.stored import settings_of_its_own
from xlearner_d2.config import default_config


def test_detectron2s_own_network_needs_nothing() -> None:
    assert settings_of_its_own(default_config()) == {}


def test_what_is_no_default_is_needed() -> None:
    cfg = default_config()
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_STD = (58.0, 57.0, 57.0)
    cfg.SOLVER.BASE_LR = 7.0
    assert settings_of_its_own(cfg) == {
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_STD": [58.0, 57.0, 57.0],
        "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
    }


@pytest.mark.parametrize(("norm", "needed"), [("BN", {}), ("SyncBN", {}), ("GN", {"MODEL.RESNETS.NORM": "GN"})])
def test_another_norm_than_bn_is_needed(norm: str, needed: dict[str, str]) -> None:
    """Detectron2's frozen BN would take the scales of GN for its own, and be another map."""
    cfg = default_config()
    cfg.MODEL.RESNETS.NORM = norm
    assert settings_of_its_own(cfg) == needed


def test_a_network_without_bottlenecks_has_no_stride_in_them() -> None:
    cfg = default_config()
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    assert settings_of_its_own(cfg) == {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
