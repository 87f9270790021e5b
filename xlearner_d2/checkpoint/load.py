"""Read weights without running code from the file, map names explicitly, load strictly, and say what was loaded."""

import collections
import io
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from ..specs import ConfigError

State = dict[str, Tensor]


def _encode(text: str, encoding: str) -> bytes:
    """What old pickle protocols call to hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}, which weights have no use for")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what Detectron2's .pkl files consist of: plain containers and numpy arrays."""

    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in ("_reconstruct", "scalar", "_frombuffer") and re.fullmatch(r"numpy\.(_?core)\.\w+", module):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights have no use for") from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a ``.pth``/``.pt`` file of tensors and plain containers, or a ``.pkl`` file of Detectron2.

    Returns:
        the file's dict; its weights are under ``"model"`` (also for files that hold nothing but weights).

    Raises:
        ConfigError: when the file is missing, truncated, not a checkpoint, or holds objects that could run code.
    """
    local = Path(PathManager.get_local_path(str(path)))
    if not local.is_file():
        raise ConfigError([f"There is no checkpoint {path}."])
    try:
        found = _read(local)
    except Exception as error:  # damaged pickles can raise any
        raise ConfigError([f"The checkpoint {path} cannot be read: {_reason(error)}"]) from error
    if isinstance(found, dict) and "model" not in found:
        found = {"model": found.get("state_dict", found.get("blobs", found))}
    weights = found["model"] if isinstance(found, dict) else found
    if not isinstance(weights, dict):
        kind = type(weights).__name__
        raise ConfigError([f"The checkpoint {path} holds a {kind}, but a dict of weights is expected."])
    try:
        found["model"] = _tensors(weights)
    except TypeError as error:
        raise ConfigError([f"The checkpoint {path} cannot be read: {error}"]) from error
    return found


def _read(path: Path) -> Any:
    if path.suffix == ".pkl":
        return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """The first line of an error, without torch's advice to run the file's code."""
    text = str(error).split("WeightsUnpickler error:")[-1].strip()
    wanted = re.search(r"GLOBAL ([\w.]+)", text)
    if wanted:
        return f"it asks for {wanted[1]}, which weights have no use for"
    return text.split("\n")[0] or type(error).__name__


def _tensors(weights: Mapping[Any, Any]) -> State:
    """The named tensors and arrays, the latter as tensors."""
    return {
        name: torch.as_tensor(value)
        for name, value in weights.items()
        if isinstance(name, str) and isinstance(value, Tensor | np.ndarray | np.generic)
    }


_TORCHVISION = (
    (re.compile(r"^conv1\."), "stem.conv1."),
    (re.compile(r"^bn1\."), "stem.conv1.norm."),
    (re.compile(r"^layer(\d)\."), lambda match: f"res{int(match[1]) + 1}."),
    (re.compile(r"\.downsample\.0\."), ".shortcut."),
    (re.compile(r"\.downsample\.1\."), ".shortcut.norm."),
    (re.compile(r"\.bn(\d)\."), r".conv\1.norm."),
)


def _from_torchvision(name: str) -> str:
    for pattern, replacement in _TORCHVISION:
        name = pattern.sub(replacement, name)
    return name


def _from_caffe2(state: Mapping[str, Tensor]) -> State:
    names = [name for name in sorted(state) if not name.endswith("_momentum")]
    return dict(zip(convert_basic_c2_names(names), (state[name] for name in names), strict=True))


def resnet_state(state: Mapping[str, Tensor]) -> State:
    """The weights of a ResNet under Detectron2's names (``stem.…``, ``res2.…``), without anything else.

    Understands Detectron2's names, alone or within a model; torchvision's and timm's; and Caffe2's (MSRA) names.
    """
    if "res2_0_branch2a_w" in state:
        state = _from_caffe2(state)
    elif "layer1.0.conv1.weight" in state:
        state = {_from_torchvision(name): value for name, value in state.items()}
    else:
        prefixes = {name.split("stem.conv1.weight")[0] for name in state if name.endswith("stem.conv1.weight")}
        if len(prefixes) != 1:
            return {}
        prefix = prefixes.pop()
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {name: value for name, value in state.items() if re.match(r"(stem|res\d)\.", name)}


@dataclass(frozen=True)
class LoadReport:
    """How a file's weights met a module: names that matched, and those that only one of them has."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors loaded"]
        for word, names in (("missing from the file", self.missing), ("unused", self.unexpected)):
            if names:
                parts.append(f"{len(names)} {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
        return ", ".join(parts)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, path: str | Path) -> LoadReport:
    """Load ``state`` into ``module``; every tensor of either must be in the other, with equal shape.

    Raises:
        ConfigError: naming the file and each tensor that is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    problems = [f"{name} is missing." for name in own if name not in state]
    problems += [f"{name} is unexpected." for name in state if name not in own]
    problems += _shape_problems(own, state)
    if problems:
        hidden = [f"… and {len(problems) - 10} more tensors."] if len(problems) > 10 else []
        raise ConfigError([*problems[:10], *hidden], what=f"The checkpoint {path} does not fit the model; it")
    module.load_state_dict(dict(state))
    return LoadReport(matched=tuple(own), missing=(), unexpected=())


def _shape_problems(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} has shape {tuple(state[name].shape)}, but {tuple(own[name].shape)} is needed."
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]


def load_resnet(resnet: nn.Module, path: str | Path) -> LoadReport:
    """Initialise a Detectron2 ResNet from any ResNet checkpoint that ``resnet_state`` understands.

    Files made for frozen BN may lack ``running_mean``, ``running_var`` and ``num_batches_tracked``: these stay at
    their initial values, under which BN is the affine map the file holds. Stages that ``resnet`` lacks are unused.

    Raises:
        ConfigError: when the file holds no ResNet, lacks a weight, or has one of another shape.
    """
    state = resnet_state(read_checkpoint(path)["model"])
    if not state:
        raise ConfigError([f"The checkpoint {path} holds no ResNet under names of Detectron2, torchvision or Caffe2."])
    own = resnet.state_dict()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    missing = [name for name in own if name not in state]
    problems = [f"{name} is missing." for name in missing if not name.endswith(statistics)]
    problems += _shape_problems(own, state)
    if problems:
        raise ConfigError(problems[:10], what=f"The checkpoint {path} does not fit MODEL.RESNETS; it")
    matched = {name: state[name] for name in own if name in state}
    resnet.load_state_dict(matched, strict=False)
    unexpected = tuple(name for name in state if name not in own)
    return LoadReport(matched=tuple(matched), missing=tuple(missing), unexpected=unexpected)
