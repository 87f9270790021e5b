"""The model card: what the weights were trained on, how, what they are worth, and how to use them."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.files import write_atomically
from ..checkpoint.stored import PIXEL_KEYS, settings_of_its_own
from .convention import Convention
from .libraries import architecture
from .student import Student

_CITATION = """@inproceedings{he2022xlearner,
  title={X-Learner: Learning Cross Sources and Tasks for Universal Visual Representation},
  author={He, Yinan and others},
  booktitle={European Conference on Computer Vision (ECCV)},
  year={2022}
}"""

#: How each format is loaded; {path}, {name} and {network}, the settings that describe it, are filled in.
_USAGE = {
    "d2": ("bash", "python train_net.py --config-file ANY_DETECTRON2_CONFIG.yaml MODEL.WEIGHTS {path}{network}"),
    "d2-pkl": ("bash", "python train_net.py --config-file ANY_DETECTRON2_CONFIG.yaml MODEL.WEIGHTS {path}{network}"),
    "torchvision": (
        "python",
        "import torch, torchvision\n\nmodel = torchvision.models.{name}()\nmodel.fc = torch.nn.Identity()\n"
        'model.load_state_dict(torch.load("{path}", weights_only=True)["state_dict"], strict=False)',
    ),
    "timm": (
        "python",
        'import timm\n\nmodel = timm.create_model("local-dir:{path}", pretrained=True, features_only=True)\n'
        '# or, with the folder on the hub: timm.create_model("hf_hub:USER/REPOSITORY", pretrained=True)',
    ),
    "safetensors": ("python", 'from safetensors.torch import load_file\n\nstate = load_file("{path}")'),
    "onnx": (
        "python",
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{path}")\n'
        'res2, res3, res4, res5 = session.run(None, {{"images": images}})',
    ),
    "torchscript": ("python", 'import torch\n\nres2, res3, res4, res5 = torch.jit.load("{path}")(images)'),
    "torch-export": (
        "python",
        'import torch\n\nres2, res3, res4, res5 = torch.export.load("{path}").module()(images)',
    ),
}


def write_card(
    student: Student, path: Path, *, to: str, library: str, convention: Convention, difference: float
) -> Path:
    """Write the card of an exported file beside it, or into a folder as its README.

    Args:
        to: the format.
        library: which reads it.
        difference: the largest that was found between the student's features and the library's.
    """
    card = path / "README.md" if path.is_dir() else path.with_name(f"{path.name}.md")
    sections = [
        _front_matter(student, library),
        _summary(student),
        _usage(student, path, to, convention),
        f"Features by stage (strides 4, 8, 16, 32) in {library} were compared with those of the trained student, in "
        f"float32: the largest difference is {difference:.1e}.",
        _training(student.training),
        _metrics(student.path.with_name("metrics.json")),
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
    write_atomically("\n\n".join(section for section in sections if section) + "\n", card)
    return card


def may_write_card(folder: Path) -> bool:
    """Whether a folder has no README, or one of an earlier export."""
    readme = folder / "README.md"
    return not readme.is_file() or "- xlearner" in readme.read_text(encoding="utf-8", errors="replace")


def _front_matter(student: Student, library: str) -> str:
    content: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["xlearner", "detectron2", "resnet", "backbone"],
        # What follows from the licences of the data is for whoever publishes the weights to say.
        "license": "other",
    }
    names = [name for source in student.training.get("sources", {}).values() for name in source["licences"]]
    if names:
        content["datasets"] = sorted(set(names))
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _summary(student: Student) -> str:
    tasks = sorted({source["task"] for source in student.training.get("sources", {}).values()})
    learned = f" It was learned from labels for {_listed(tasks)} at once." if tasks else ""
    text = f"One plain {student.name} backbone, squeezed from an expanded multi-task model by xlearner_d2."
    return f"# {student.path.stem}\n\n{text}{learned}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}"


def _usage(student: Student, path: Path, to: str, convention: Convention) -> str:
    language, code = _USAGE[to]
    name = architecture(student).torchvision if to == "torchvision" else ""
    filled = code.format(path=path.name if path.is_file() else path, name=name, network=_network(student))
    return f"## Use\n\n```{language}\n{filled}\n```\n\n{_builder(student, to)}{_input(convention)}"


def _builder(student: Student, to: str) -> str:
    if not (student.timm and to in ("d2", "d2-pkl")):
        return ""
    return (
        "Detectron2 knows these settings when `xlearner_d2.add_xlearner_config(cfg)` has been called. The builder of a "
        "RetinaNet is `build_timm_retinanet_fpn_backbone`, that of a backbone without FPN `build_timm_backbone`.\n\n"
    )


def _network(student: Student) -> str:
    """The settings with which a Detectron2 config has the student's network, behind others on a command line."""
    own = settings_of_its_own(student.cfg)
    if student.timm:
        alike = (*PIXEL_KEYS, "MODEL.RESNETS.RES5_DILATION")  # the others describe a ResNet
        own = {key: value for key, value in own.items() if key in alike}
        own = {"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone", "MODEL.BACKBONE.TIMM": student.timm, **own}
    else:
        own = {"MODEL.RESNETS.DEPTH": student.depth, **own}
    return "".join(f" {key} {shlex.quote(str(value))}" for key, value in own.items())


def _input(convention: Convention) -> str:
    top = f"{convention.value_range:g}"
    how = "The network normalises them itself, by" if convention.normalised_inside else "They are normalised by"
    text = (
        f"Input: {convention.channel_order} images, float32 from 0 to {top}. {how} mean {_numbers(convention.mean)} "
        f"and standard deviation {_numbers(convention.std)}, in that order of channels. Normalisation layers: "
        f"{convention.norm}."
    )
    stride = (
        f" The stride of a bottleneck is in its {convention.stride_in} convolution." if convention.stride_in else ""
    )
    return text + stride


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _training(training: Mapping[str, Any]) -> str:
    if not training:
        return "## Training\n\nThe file does not tell."
    rows = ["| source | task | data sets | images | licences |", "|---|---|---|---|---|"]
    for name, source in training["sources"].items():
        licences = ", ".join(licence or "not stated" for licence in source["licences"].values())
        rows.append(
            f"| {name} | {source['task']} | {', '.join(source['licences'])} | {source['images']} | {licences} |"
        )
    facts = [
        f"- {key}: {training[key]}"
        for key in ("steps", "sharing", "command", "commit", "version", "date")
        if training.get(key)
    ]
    return "## Training\n\n" + "\n".join([*rows, "", *facts])


def _source_rows(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    return [
        f"| {source} | {name} | {metric} | {value:.1f} |"
        for source, by_name in results.items()
        for name, metrics in by_name.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "-" not in metric
    ]


def _metrics(path: Path) -> str:
    """What the run has measured, from the metrics.json beside the weights."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or that of Detectron2, a record on each line
        return ""
    if not isinstance(found, dict):
        return ""
    own, rows = (_source_rows(found.get(name, {})) for name in ("squeezed", "expanded"))
    probes = [
        f"| {name} | linear probe, top-1 | {values['student']:.1f} |"
        for name, values in found.get("probes", {}).items()
    ]
    parts = []
    if probes:
        parts += ["Of these weights:", "", "| data | metric | percent |", "|---|---|---|", *probes, ""]
    if own:
        parts += ["Of these weights, with the heads that they were squeezed with:", ""]
        parts += ["| source | test data | metric | percent |", "|---|---|---|---|", *own, ""]
    if rows:
        parts += ["Of the expanded model that they were squeezed from:", ""]
        parts += ["| source | test data | metric | percent |", "|---|---|---|---|", *rows]
    return "## Measured\n\n" + "\n".join(parts) if parts else ""
