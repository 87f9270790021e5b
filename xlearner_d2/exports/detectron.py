"""The student for Detectron2 itself, and under the same names as safetensors."""

import json
import pickle
from pathlib import Path

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_backbone
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoint.export import describe_student, export_student
from ..checkpoint.files import replacing
from ..checkpoint.load import is_counter
from ..modeling.expanded import STAGES
from .convention import Convention, own_convention
from .student import Student


def write_d2(student: Student, path: Path) -> Convention:
    """A ``.pth`` file, as the squeeze stage leaves it."""
    export_student(student.network, student.cfg, path, training=student.training)
    return own_convention(student)


def write_d2_pkl(student: Student, path: Path) -> Convention:
    """A ``.pkl`` file of numpy arrays, as in Detectron2's model zoo."""
    arrays = {name: value.numpy() for name, value in _state(student).items()}
    content = {"model": arrays, "__author__": "xlearner_d2", "matching_heuristics": True}
    content["xlearner"] = describe_student(student.cfg, student.training)
    with replacing(path) as part, part.open("wb") as file:
        pickle.dump(content, file)
    return own_convention(student)


def _state(student: Student) -> dict[str, Tensor]:
    """Detectron2's names and the weights, without the counters that frozen BN lacks."""
    state = student.network.state_dict()
    return {name: value.contiguous() for name, value in state.items() if not is_counter(name)}


def read_d2(student: Student, path: Path) -> nn.Module:
    """The backbone that Detectron2 builds from a config, with the file's weights as ``MODEL.WEIGHTS``."""
    model = nn.Module()
    model.backbone = _backbone(student)
    DetectionCheckpointer(model).load(str(path))
    return model.backbone.eval()


def _backbone(student: Student) -> nn.Module:
    cfg = student.cfg.clone()
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone" if student.timm else "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    return build_backbone(cfg)


def write_safetensors(student: Student, path: Path) -> Convention:
    """Detectron2's names; the network, its input and how it was made are in the file's metadata, as JSON."""
    convention = own_convention(student)
    metadata = {"format": "pt", "convention": json.dumps(convention.as_dict())}
    metadata["xlearner"] = json.dumps(describe_student(student.cfg, student.training))
    with replacing(path) as part:
        save_file(_state(student), part, metadata=metadata)
    return convention


def read_safetensors(student: Student, path: Path) -> nn.Module:
    """A new network with the file's weights."""
    backbone = _backbone(student)
    found = backbone.load_state_dict(load_file(path), strict=False)
    missing = [name for name in found.missing_keys if not is_counter(name)]
    assert not missing, missing
    return backbone.eval()
