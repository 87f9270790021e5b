"""The student as a graph that runs without this project: ONNX, TorchScript and torch.export."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.files import replacing
from ..modeling.expanded import STAGES
from ..specs import ConfigError
from .convention import Convention, image_convention
from .student import Student

#: Height and width of the image that graphs are recorded with; other sizes run as well.
EXAMPLE_SIZE = (96, 128)


class ImageToFeatures(nn.Module):
    """RGB images (N, 3, H, W), float32 from 0 to 255, to features: ``(res2, res3, res4, res5)``, strides 4 to 32."""

    mean: Tensor
    std: Tensor

    def __init__(self, student: Student):
        super().__init__()
        self.network = student.network
        self.bgr = student.cfg.INPUT.FORMAT == "BGR"
        for name, values in (("mean", student.cfg.MODEL.PIXEL_MEAN), ("std", student.cfg.MODEL.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        images = images.flip(1) if self.bgr else images
        features = self.network((images - self.mean) / self.std)
        return tuple(features[stage] for stage in STAGES)


def _example() -> Tensor:
    return torch.rand(2, 3, *EXAMPLE_SIZE, generator=torch.Generator().manual_seed(0)) * 255


def _dynamic() -> dict[int, "torch.export.Dim"]:
    """Any number of images of any size."""
    return {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}


def _program(student: Student) -> torch.export.ExportedProgram:
    module = ImageToFeatures(student).eval()
    return torch.export.export(module, (_example(),), dynamic_shapes={"images": _dynamic()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own inner workings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _import_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        what = 'pip install "xlearner_d2[onnx]"'
        raise ConfigError([f"The package {error.name} is not installed: {what}."], what="The export to ONNX") from None


def write_onnx(student: Student, path: Path) -> Convention:
    """An ONNX file of one input, ``images``, and an output for each stage; the convention is in its metadata."""
    _import_onnx()
    import onnx

    convention = image_convention(student)
    with replacing(path) as part, _quiet():
        program = torch.onnx.export(
            ImageToFeatures(student).eval(),
            (_example(),),
            dynamo=True,
            input_names=["images"],
            output_names=list(STAGES),
            dynamic_shapes={"images": _dynamic()},
            verbose=False,
        )
        assert program is not None
        program.save(part, external_data=False)
        model = onnx.load(part)
        onnx.helper.set_model_props(model, {"convention": json.dumps(convention.as_dict())})
        onnx.checker.check_model(model)
        onnx.save(model, part)
    return convention


class _OnnxModel(nn.Module):
    """Runs a file in onnxruntime."""

    def __init__(self, path: Path):
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images (N, 3, H, W) by stage."""
        found = self.session.run(list(STAGES), {"images": images.numpy()})
        return {stage: torch.from_numpy(value) for stage, value in zip(STAGES, found, strict=True)}


def read_onnx(student: Student, path: Path) -> nn.Module:
    """The file in onnxruntime, giving features by stage."""
    return _OnnxModel(path)


class _Stages(nn.Module):
    """Features by stage of a module that returns them as a tuple."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images (N, 3, H, W)."""
        return dict(zip(STAGES, self.module(images), strict=True))


def write_torchscript(student: Student, path: Path) -> Convention:
    """A file for ``torch.jit.load``, also of C++; the convention is its extra file ``convention.json``."""
    convention = image_convention(student)
    with _quiet(), torch.no_grad(), replacing(path) as part:
        traced = torch.jit.trace(ImageToFeatures(student).eval(), (_example(),))
        torch.jit.save(traced, str(part), _extra_files={"convention.json": json.dumps(convention.as_dict())})
    return convention


def read_torchscript(student: Student, path: Path) -> nn.Module:
    """The module in a TorchScript file."""
    with _quiet():
        return _Stages(torch.jit.load(str(path)))


def write_torch_export(student: Student, path: Path) -> Convention:
    """A ``.pt2`` file for ``torch.export.load``; the convention is its extra file ``convention.json``."""
    convention = image_convention(student)
    with _quiet(), replacing(path) as part, part.open("wb") as file:
        torch.export.save(_program(student), file, extra_files={"convention.json": json.dumps(convention.as_dict())})
    return convention


def read_torch_export(student: Student, path: Path) -> nn.Module:
    """The module in a ``.pt2`` file."""
    return _Stages(torch.export.load(str(path)).module())
