"""Export a student to a format, and compare what the library there makes of it with the student."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..specs import ConfigError, nearest
from . import detectron, graphs, libraries
from .card import may_write_card, write_card
from .convention import Convention, feed
from .student import Student, load_student

#: Largest difference between the student's features and the library's, where these are around 1; else relative to them.
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format: how its file is written, and read back by the library that it is for.

    Attributes:
        ending: of the file's name; empty for a folder.
        library: whose own code reads it in the comparison.
        sizes: heights and widths of the images of the comparison.
    """

    ending: str
    library: str
    write: Callable[[Student, Path], Convention]
    read: Callable[[Student, Path], nn.Module]
    sizes: Sequence[tuple[int, int]] = ((160, 128), (150, 117))


FORMATS = {
    "d2": Format(ending=".pth", library="detectron2", write=detectron.write_d2, read=detectron.read_d2),
    "d2-pkl": Format(ending=".pkl", library="detectron2", write=detectron.write_d2_pkl, read=detectron.read_d2),
    "torchvision": Format(
        ending=".pth", library="torchvision", write=libraries.write_torchvision, read=libraries.read_torchvision
    ),
    # Of sides that 32 does not divide, timm's own networks may round down where the student rounds up.
    "timm": Format(
        ending="", library="timm", write=libraries.write_timm, read=libraries.read_timm, sizes=((160, 128),)
    ),
    "safetensors": Format(
        ending=".safetensors", library="detectron2", write=detectron.write_safetensors, read=detectron.read_safetensors
    ),
    "onnx": Format(ending=".onnx", library="onnxruntime", write=graphs.write_onnx, read=graphs.read_onnx),
    "torchscript": Format(ending=".ts", library="torch", write=graphs.write_torchscript, read=graphs.read_torchscript),
    "torch-export": Format(
        ending=".pt2", library="torch", write=graphs.write_torch_export, read=graphs.read_torch_export
    ),
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export left.

    Attributes:
        path: the file or folder.
        card: the model card.
        difference: the largest between features of the student and of the library, see :data:`TOLERANCE`.
    """

    path: Path
    card: Path
    difference: float


def export(weights: str | Path, *, to: str, output: str | Path = "") -> Exported:
    """Write a student's weights in a format, check them in the library that the format is for, and add a model card.

    Args:
        weights: a student's file.
        to: one of :data:`FORMATS`.
        output: file, or folder for timm; by default beside the weights.

    Raises:
        ConfigError: when the weights are no student's, the format is unknown or cannot express the student, or the
            library's features differ from the student's. What was at ``output`` before is still there then.
    """
    if to not in FORMATS:
        raise ConfigError([f"--to is {to!r}.{nearest(to, FORMATS)}"], what="The command")
    chosen, student = FORMATS[to], load_student(weights)
    path = Path(output) if str(output) else _default_path(student.path, to, chosen)
    _check_path(path, student.path, chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        convention = chosen.write(student, part)
        difference = compare(student, chosen.read(student, part), convention, chosen.sizes)
        if not difference <= TOLERANCE:
            what = f"features in {chosen.library} differ by {difference:.1e}, but at most {TOLERANCE} is expected"
            raise ConfigError([f"{path}: {what}. Please report this."], what="The export")
        _move(part, path)
    card = write_card(student, path, to=to, library=chosen.library, convention=convention, difference=difference)
    return Exported(path=path, card=card, difference=difference)


def _move(part: Path, path: Path) -> None:
    """A file to its place, or the files of a folder to theirs."""
    if part.is_file():
        part.replace(path)
        return
    path.mkdir(exist_ok=True)
    for file in part.iterdir():
        file.replace(path / file.name)


def _check_path(path: Path, weights: Path, chosen: Format) -> None:
    problems = []
    if path.resolve() == weights.resolve():
        problems.append(f"--output is {path}, the file to export: name another.")
    if path.suffix != chosen.ending and chosen.ending:
        problems.append(f"--output is {path}, but a name that ends in {chosen.ending} is expected.")
    if not chosen.ending and path.is_file():
        problems.append(f"--output is {path}, a file, but the name of a folder is expected.")
    if not chosen.ending and not may_write_card(path):
        problems.append(f"--output is {path}, whose README.md is not that of an export: name another folder.")
    if problems:
        raise ConfigError(problems, what="The command")


def _default_path(weights: Path, to: str, chosen: Format) -> Path:
    stem = weights.stem.removesuffix("_d2")
    path = weights.with_name(f"{stem}_{to.replace('-', '_')}{chosen.ending}")
    return path if path != weights else weights.with_name(f"{stem}_d2_copy{chosen.ending}")


@torch.no_grad()
def compare(student: Student, model: nn.Module, convention: Convention, sizes: Sequence[tuple[int, int]]) -> float:
    """The largest difference between a model's features and the student's, over all stages, in float32.

    Of features beyond 1, the difference is relative to the largest of a stage. Images are noise and smooth shapes, of
    sizes that no graph was recorded with.

    Args:
        sizes: heights and widths of the images.
    """
    found = []
    for size in sizes:
        images = _images(size)
        own, others = student.features(images), model(feed(images, convention))
        found += [_difference(own[stage], others[stage]) for stage in own]
    return float(torch.tensor(found).max())  # NaN if one is, which Python's max may pass over


def _difference(own: Tensor, found: Tensor) -> float:
    scale = max(1.0, float(own.abs().max()))
    return float((own - found).abs().max()) / scale


def _images(size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 5, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return torch.cat([smooth, torch.rand(2, 3, *size, generator=generator)]) * 255
