"""Read weights without running code from the file, map names explicitly, load strictly, and say what was loaded."""

import collections
import io
import json
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from ..specs import ConfigError
from .fetch import local_file
from .names import BackboneFile, OfTimm, State, backbone_file
from .pixels import PixelConvention, StemConversion, stem_conversion

logger = logging.getLogger(__name__)

#: What norm layers that were frozen in training may lack.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
#: Convolutions that normalise their weights, so that no factor on these has an effect.
_NORMALISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


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
    """Read a ``.pth``/``.pt`` file of tensors and plain containers, a ``.safetensors`` file, or Detectron2's ``.pkl``.

    Returns:
        the file's dict; its weights are under ``"model"`` (also for files that hold nothing but weights).

    Raises:
        ConfigError: when the file is missing, truncated, not a checkpoint, or holds objects that could run code.
    """
    local = local_file(path)
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
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".pkl":
        return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors and, of a student, what the file says of itself."""
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = (file.metadata() or {}).get("xlearner")
    return {"model": weights, **({"xlearner": json.loads(said)} if said else {})}


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


@dataclass(frozen=True)
class LoadReport:
    """How a file's weights met a module.

    Attributes:
        matched: names that both have.
        missing: names that only the module has.
        unexpected: names that only the file has.
        reshaped: those matched whose shape the file has with other sides of one, such as (8,) for (8, 1, 1).
        converted: those matched that were made for other pixels.
        conversion: how these were converted, in words.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    conversion: str = ""

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors loaded"]
        for word, names in (
            ("missing from the file", self.missing),
            ("unused", self.unexpected),
            ("re-shaped", self.reshaped),
            (self.conversion, self.converted),
        ):
            if names:
                parts.append(f"{len(names)} {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
        return ", ".join(parts)


def is_counter(name: str) -> bool:
    """Whether a tensor counts the batches of a norm layer, which no result depends on."""
    return name.endswith("num_batches_tracked")


def with_own_counters(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's weights with the counters of norm layers that ``module`` has: timm's frozen layers have none."""
    own = module.state_dict()
    kept = {name: value for name, value in state.items() if name in own or not is_counter(name)}
    return kept | {name: value for name, value in own.items() if name not in kept and is_counter(name)}


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
        if name in state and isinstance(own[name], Tensor) and state[name].shape != own[name].shape
    ]


def check_resnet(resnet: nn.Module, path: str | Path) -> None:
    """See that :func:`load_resnet` would find what it needs; ``resnet`` may be on the meta device.

    Raises:
        ConfigError: as there.
    """
    _match(resnet, path)


def load_resnet(
    resnet: nn.Module, path: str | Path, *, pixels: PixelConvention | None = None, move_strides: bool = False
) -> LoadReport:
    """Initialise a Detectron2 ResNet, or a network of timm that is cut like one, from any file of such a network.

    Files made for frozen BN may lack ``running_mean``, ``running_var`` and ``num_batches_tracked``: these stay at
    their initial values, under which BN is the affine map the file holds. Stages that ``resnet`` lacks are unused.

    Args:
        pixels: what ``resnet`` will be given; a stem made for another order or std of channels is converted exactly.
            None takes it as it is. What cannot be converted is logged as a warning.
        move_strides: let the bottlenecks of ``resnet`` have their stride in the convolution where the file's have it,
            whatever its config says, instead of a warning.

    Raises:
        ConfigError: when the file holds no such network, lacks a weight, or has one of another shape.
    """
    file, matched, report = _match(resnet, path)
    warnings = []
    if _has_other_strides(resnet, file):
        if move_strides:
            _swap_strides(resnet)
        else:
            text = f"it was trained with MODEL.RESNETS.STRIDE_IN_1X1 {file.stride_in_1x1}, but that is "
            text += f"{not file.stride_in_1x1}; weights cannot be converted from one to the other"
            warnings.append(f"{text}, so that features differ until trained.")
    if pixels is not None and file.pixels is not None:
        conversion = stem_conversion(file.pixels, pixels)
        converted, stuck = convert_stem(resnet, matched, conversion)
        report = replace(report, converted=converted, conversion=str(conversion))
        warnings += [*stuck, *([conversion.problem] if conversion.problem else [])]
    for warning in warnings:
        logger.warning(f"{path}: {warning}")
    resnet.load_state_dict(matched, strict=False)
    return report


def load_res5(res5: nn.Module, resnet: nn.Module, path: str | Path) -> bool:
    """Start the fifth stage that a head has of its own (C4) as that of a file of a network such as ``resnet``.

    Returns:
        False when the file has none, or one that is built otherwise; the head's then stays as it is.
    """
    found = backbone_file(read_checkpoint(path), resnet).state
    state = {name.removeprefix("res5."): value for name, value in found.items() if name.startswith("res5.")}
    own = res5.state_dict()
    needed = [name for name in own if not name.endswith(_STATISTICS)]
    if any(name not in state or state[name].shape != own[name].shape for name in needed):
        return False
    res5.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
    return True


def _match(resnet: nn.Module, path: str | Path) -> tuple[BackboneFile, State, LoadReport]:
    """The file's weights by the network's names and in its shapes."""
    checkpoint = read_checkpoint(path)
    file = backbone_file(checkpoint, resnet)
    description = checkpoint.get("xlearner", {})
    if not file.state:
        wanted = "ResNet under names of Detectron2, torchvision or Caffe2"
        if isinstance(resnet, OfTimm):
            wanted = f"{resnet.timm_name} under names of timm"
        tasks = ", ".join(task["name"] for task in description.get("tasks", ()))
        hint = f" It is an expanded model of the tasks {tasks}; transfer studies take its branches as FILE:TASK."
        raise ConfigError([f"The checkpoint {path} holds no {wanted}.{hint if tasks else ''}"])
    own = resnet.state_dict()
    state = {name: _in_shape(value, own.get(name)) for name, value in file.state.items()}
    missing = [name for name in own if name not in state]
    problems = [f"{name} is missing." for name in missing if not name.endswith(_STATISTICS)]
    problems += _shape_problems(own, state)
    if problems:
        setting = "MODEL.BACKBONE.TIMM" if isinstance(resnet, OfTimm) else "MODEL.RESNETS"
        depth = description.get("resnets", {}).get("DEPTH")
        network = description.get("timm") or (f"ResNet-{depth}" if depth else "")
        holds = f", which says that it is of a {network}," if network else ""
        raise ConfigError(problems[:10], what=f"The checkpoint {path}{holds} does not fit {setting}; it")
    matched = {name: state[name] for name in own if name in state}
    report = LoadReport(
        matched=tuple(matched),
        missing=tuple(missing),
        unexpected=tuple(name for name in state if name not in own),
        reshaped=tuple(name for name in matched if file.state[name].shape != own[name].shape),
    )
    return file, matched, report


def _in_shape(value: Tensor, own: Tensor | None) -> Tensor:
    """The same numbers where shapes differ in sides of one alone, as a linear layer and a 1x1 convolution do."""
    if own is None or value.shape == own.shape:
        return value
    sides = [[side for side in of.shape if side != 1] for of in (value, own)]
    return value.reshape(own.shape) if sides[0] == sides[1] else value


def convert_stem(resnet: nn.Module, state: State, conversion: StemConversion) -> tuple[tuple[str, ...], list[str]]:
    """Convert the weights that read the image, in place of ``state``; name them, and say what could not be done."""
    if not str(conversion):
        return (), []
    convolutions = [
        (f"stem.{name}.weight", module)
        for name, module in resnet.stem.named_modules()  # type: ignore[union-attr]
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and module.groups == 1
    ]
    if conversion.scale and any(isinstance(module, _NORMALISED) for _, module in convolutions):
        return (), ["its stem normalises its own weights, so it cannot be converted: use its PIXEL_STD and FORMAT."]
    for name, _ in convolutions:
        state[name] = conversion(state[name])
    return tuple(name for name, _ in convolutions), []


def _has_other_strides(resnet: nn.Module, file: BackboneFile) -> bool:
    """Whether bottlenecks have their stride elsewhere than the file's, which is no matter of weights."""
    block = next(iter(getattr(resnet, "res3", ())), None)
    if isinstance(resnet, OfTimm) or file.stride_in_1x1 is None or not hasattr(block, "conv3"):
        return False
    in_1x1 = block.conv1.stride != (1, 1)  # type: ignore[union-attr]
    return in_1x1 != file.stride_in_1x1


def _swap_strides(resnet: nn.Module) -> None:
    """Give the stride of each bottleneck's 1x1 convolution to its 3x3 one, and the other way round."""
    bottlenecks: list[Any] = [module for module in resnet.modules() if hasattr(module, "conv3")]
    for block in bottlenecks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        if hasattr(block, "conv2_offset"):  # of a deformable convolution
            block.conv2_offset.stride = block.conv2.stride
