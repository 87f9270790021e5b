"""Every key of this project, under ``XLEARNER``, and how a config file and the command line are merged into it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import OmegaConf

from .specs import ConfigError, nearest

STAGES = ("expand", "squeeze", "all")
STEPS = ("joint", "alternating")
SHARING = ("separate", "shared", "detached", "bidirectional")


def add_xlearner_config(cfg: CfgNode) -> None:
    """Add the ``XLEARNER`` and ``MODEL.CLASSIFIER`` sections, with their defaults, to a Detectron2 config."""
    cfg.XLEARNER = x = CfgNode()
    # What train_net.py runs: expand, squeeze, or all (expand, then squeeze).
    x.STAGE = "all"
    # Modules of other projects, such as detectron2.projects.point_rend, that are imported before anything else: they
    # register what heads and data sets name, and their functions add_…_config add the keys of head configs.
    x.IMPORTS = []
    # Data sets to register, by name; see specs.DatasetSpec. Those of Detectron2 need no entry.
    x.DATASETS = CfgNode(new_allowed=True)
    # The sources, by name; see specs.SourceSpec.
    x.SOURCES = CfgNode(new_allowed=True)
    # What is special about the branches of some tasks, by task; see branches.BranchSpec.
    x.BRANCHES = CfgNode(new_allowed=True)
    # Linear probes of the student at the end, by name; see specs.ProbeSpec.
    x.PROBES = CfgNode(new_allowed=True)
    # How branches share: separate, shared (one trunk), detached (features passed on without gradient), bidirectional.
    x.SHARING = "detached"
    # Images per data set that are decoded before training starts, spread evenly; all must exist. -1: every image.
    x.CHECK_IMAGES = 5000
    # Faster convolutions on GPUs with tensor cores and on CPUs.
    x.CHANNELS_LAST = True
    # Backend of torch.compile for the stages of branches and of the student, such as "inductor"; "" for none. On CPUs
    # inductor is slower than none (docs/SPEED.md).
    x.COMPILE = ""

    # Project on Weights & Biases to log to as well; "" for none. Needs the package wandb.
    x.WANDB = ""

    # joint: every step draws from every source. alternating: from one source, in turn; so little memory is needed, but
    # the steps of a source are fewer.
    x.STEPS = "joint"

    x.SAMPLING = s = CfgNode()
    # Images of a step, to be shared among the sources instead of each one's IMS_PER_BATCH; 0 keeps those. Alternating
    # steps have so many images of one source, and the shares decide how often its turn comes.
    s.IMS_PER_BATCH = 0
    # The shares go with size ** (1 / TEMPERATURE): 1 by size, 2 by its square root, larger ones more evenly.
    s.TEMPERATURE = 2.0

    x.TIMEOUT = t = CfgNode()
    # Seconds without a sign of life after which a worker counts as hung or its machine as lost, and the others end with
    # an error. A worker that dies is noticed at once.
    t.SILENT = 180.0
    # Seconds that a worker waits for the others in one operation of a training step, as when one of them reads from a
    # file system that hangs; also for all to start. Evaluation, checkpoints and export may take longer.
    t.STUCK = 1800.0

    x.WEIGHTING = w = CfgNode()
    # How the losses of sources are weighed: fixed (LOSS_WEIGHT), uncertainty (a learned variance for each source,
    # Kendall et al. 2018), dwa (sources whose loss falls slowly count more, Liu et al. 2019). All start as LOSS_WEIGHT.
    w.METHOD = "fixed"
    # dwa: larger ones weigh more evenly.
    w.TEMPERATURE = 2.0
    # dwa: steps over which losses are averaged before they are compared.
    w.WINDOW = 100

    # An expanded checkpoint to extend by the sources and tasks that it does not have; it starts with all it has.
    x.EXTEND = ""
    # Start of the branches that EXTEND does not have: one of its tasks (that branch), a ResNet checkpoint, "random", or
    # "" (the branch of its first task).
    x.EXTEND_INIT = ""
    # Tasks of EXTEND that stay as they are: their branches, the layers into these, and the heads of its sources. Those
    # sources then need no TRAIN; new sources of these tasks train their heads alone.
    x.FREEZE = []

    x.RECONCILIATION = r = CfgNode()
    # Stages of a branch that receive features of the other branches.
    r.STAGES = ["res2", "res3", "res4"]
    # A stage receives the others' same stage and all shallower ones (True), or the same stage alone (False).
    r.CROSS_SCALE = True
    # Run these layers again in the backward pass rather than keep what they compute: less memory, more time.
    r.RECOMPUTE = False

    x.SQUEEZE = q = CfgNode()
    # Distil during the expansion run, from the branches as they are, instead of afterwards.
    q.ONLINE = False
    # Expanded checkpoint to squeeze; "" takes the one that the expand stage left in OUTPUT_DIR.
    q.TEACHER = ""
    # Start of the student: "random", a task's name (that branch), a ResNet checkpoint, or "" (the branch of the first
    # source of classes, else of the first source; random when the student is built otherwise).
    q.INIT = ""
    # Depth of the student, a ResNet as MODEL.RESNETS says otherwise; 0 takes that of the branches.
    q.DEPTH = 0
    # A model of timm as the student; "" takes what the branches are.
    q.TIMM = ""
    # Stages whose features are matched.
    q.STAGES = ["res4", "res5"]
    # Weight of each of these stages; 0 leaves one out.
    q.STAGE_WEIGHTS = [1.0, 1.0]
    # What a hint is compared by: cosine_smooth_l1 (half each), mse, cosine, smooth_l1.
    q.DISTANCE = "cosine_smooth_l1"
    # 1x1 convolutions between a student's and a branch's features in training, with BN and ReLU between them.
    q.PROJECTOR_LAYERS = 1
    # How the teacher's features are normalised: standardise (per channel, running), l2, phi_s, none.
    q.NORMALISER = "standardise"
    # Whether the student learns from the sources' labels as well, through heads of its own that start as the teacher's.
    q.TASK_LOSSES = True
    # Whether a branch gives hints for the images of its own task's sources alone, instead of for all images.
    q.OWN_IMAGES = False
    # Factor on all hints, against the task losses.
    q.HINT_WEIGHT = 1.0
    # Batches of the source mix, each of images of one size, over which the student's BN statistics are estimated at
    # the end; 0 keeps the running averages.
    q.BN_RECALIBRATION_BATCHES = 50
    # Export a running average of the student's weights instead of the last ones, with this decay, approached from 0
    # as 1 - step^(-2/3); 0 turns it off, 0.999 or 0.9999 are common.
    q.EMA_DECAY = 0.0
    # Keys of SOLVER with other values in the squeeze stage.
    q.SOLVER = CfgNode(new_allowed=True)

    # "SGD" as in Detectron2, or "AdamW", which gets further in short runs from scratch.
    cfg.SOLVER.OPTIMIZER = "AdamW"

    x.PLUG_IN = p = CfgNode()
    # For build_xlearner_*_backbone: the expanded checkpoint.
    p.WEIGHTS = ""
    # The task whose branch becomes the backbone.
    p.TASK = ""

    add_head_config(cfg)
    add_transfer_config(cfg)


def add_transfer_config(cfg: CfgNode) -> None:
    """Add what a transfer suite needs to a Detectron2 config."""
    cfg.TRANSFER = t = CfgNode()
    # Name of the suite.
    t.NAME = ""
    # Ways to measure a backbone, by name; see transfer.suite.ProtocolSpec.
    t.PROTOCOLS = CfgNode(new_allowed=True)
    # Downstream sets, by name; see transfer.suite.SetSpec.
    t.SETS = CfgNode(new_allowed=True)


def usable_device(cfg: CfgNode) -> str:
    """``MODEL.DEVICE``, but the CPU where Detectron2's default, a GPU of any number, meets a machine without one."""
    return "cpu" if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available() else cfg.MODEL.DEVICE


def add_head_config(cfg: CfgNode) -> None:
    """Add what this project's heads and mappers need to a Detectron2 config."""
    # A third party's training mapper, as module.Class, called with the head's config; "" for the one that suits the
    # head. Test images are mapped as Detectron2 maps them.
    cfg.INPUT.MAPPER = ""

    # Strength of brightness, contrast and saturation changes of training images with boxes, masks or label maps.
    # Detectron2 has none; those of images with a label of their own are INPUT.CLASSIFICATION.COLOR_JITTER.
    cfg.INPUT.COLOR_JITTER = 0.0

    # A model of timm instead of the ResNet, such as "convnext_tiny": that of all branches and of the student, or that
    # of build_timm_backbone and its like in other configs. "" for the ResNet.
    cfg.MODEL.BACKBONE.TIMM = ""

    cfg.MODEL.CLASSIFIER = c = CfgNode()
    # The stage that ImageClassifier pools.
    c.IN_FEATURE = "res5"
    # Read from the data set's metadata when the config is a source's head.
    c.NUM_CLASSES = 1000
    # An image has any number of classes: each is a yes or no of its own. Of a detection set, those of its objects.
    c.MULTI_LABEL = False
    # Share of the target that is spread over all classes.
    c.LABEL_SMOOTHING = 0.1
    # Strength of timm's mixup; 0 turns it off.
    c.MIXUP = 0.0
    # Strength of timm's cutmix; 0 turns it off.
    c.CUTMIX = 0.0
    # Probability of dropping a pooled feature in training.
    c.DROPOUT = 0.0

    cfg.INPUT.CLASSIFICATION = a = CfgNode()
    # Side of the square that training and test images are cropped to, in pixels.
    a.SIZE = 224
    # Share of the image's area that a random crop takes, at least and at most.
    a.SCALE = [0.25, 1.0]
    # Strength of brightness, contrast and saturation changes.
    a.COLOR_JITTER = 0.4
    # A policy of timm, such as "rand-m9-mstd0.5"; "" for none.
    a.AUTO_AUGMENT = ""
    # Test images are resized to SIZE / CROP_PCT, then cropped at the centre.
    a.CROP_PCT = 0.875

    cfg.MODEL.DEPTH_HEAD = d = CfgNode()
    # Features that DepthEstimator reads, of an FPN.
    d.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    # Channels of its convolutions.
    d.CONVS_DIM = 128
    # Norm of its convolutions.
    d.NORM = "GN"
    # Stride of its prediction, before it is upsampled to the image.
    d.COMMON_STRIDE = 4
    # Nearest and farthest distance that is learned from and predicted, in metres.
    d.RANGE = [0.1, 100.0]


def _node_problems(node: yaml.Node, *, trusted: bool, path: str = "", above: tuple[yaml.Node, ...] = ()) -> list[str]:
    """Keys given twice in one YAML mapping, which a reader would merge silently, and values that run code when read."""
    name = path.removesuffix(".") or "The file"
    if node in above:
        return [f"{name} contains itself."]
    if not trusted and node.tag not in yaml.SafeLoader.yaml_constructors:
        line = node.start_mark.line + 1
        return [f"{name} has the YAML tag {node.tag!r} in line {line}, but plain values are expected."]
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        return [p for child in node.value for p in _node_problems(child, trusted=trusted, path=path, above=above)]
    if not isinstance(node, yaml.MappingNode):
        return []
    found, seen = [], set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            found.append(f"{name} has a key in line {line} that is no name.")
            continue
        if key.value in seen:
            found.append(f"{path}{key.value} is given twice (the second time in line {line}).")
        seen.add(key.value)
        found += _node_problems(value, trusted=trusted, path=f"{path}{key.value}.", above=above)
    return found


def check_config_file(path: str | Path, *, derived: tuple[Path, ...] = ()) -> None:
    """See that ``path`` and the files it is based on are YAML mappings without double keys and without code.

    A file that passes can be read with ``allow_unsafe=True``: only Detectron2's model zoo may have tags that run
    code, because the model zoo computes RetinaNet's anchor sizes in one.

    Args:
        derived: files that are based on ``path``.

    Raises:
        ConfigError: with the problems of the first file that has any.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError([f"There is no config file {path}."])
    if path.suffix == ".py":
        raise ConfigError([f"{path} is a Python config, which train_net.py reads, but a YAML file is expected here."])
    if path.resolve() in derived:
        raise ConfigError([f"{path} is based on itself through _BASE_."])
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} is not valid YAML: {error}"]) from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError([f"{path} should hold a mapping such as 'XLEARNER: …'."])
    # In a Detectron2 that was built from its repository, this folder is a link to one outside the package.
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    trusted = path.resolve().is_relative_to(zoo.resolve())
    problems = _node_problems(node, trusted=trusted)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    for key, value in node.value:
        if key.value == "_BASE_":
            for base in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(base, yaml.ScalarNode):
                    raise ConfigError([f"{path}: _BASE_ should be a file or a list of files."])
                check_config_file(path.parent / Path(base.value).expanduser(), derived=(*derived, path.resolve()))


def _decode(key: str, text: Any) -> Any:
    """A value of the command line, read as in a file: YAML, and numbers such as 1e-3, which only yacs takes for one."""
    try:
        return CfgNode._decode_cfg_value(yaml.safe_load(text) if isinstance(text, str) else text)
    except yaml.YAMLError as error:
        raise ConfigError([f"{key}: {text!r} is not valid YAML: {error}"]) from error


def _merge_free_overrides(cfg: CfgNode, opts: Sequence[str]) -> list[str]:
    """Apply the pairs that may set new keys, and return the others, as yacs accepts only keys that exist already.

    These are ``XLEARNER.{SOURCES,DATASETS,PROBES,BRANCHES}.name[.KEY]`` and ``TRANSFER.{SETS,PROTOCOLS}.name[.KEY]``,
    as a record may leave keys at their defaults, and ``XLEARNER.SQUEEZE.SOLVER.KEY``.
    """
    rest: list[str] = []
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        match key.split("."):
            case ["XLEARNER" as part, "SOURCES" | "DATASETS" | "PROBES" as kind, name] | [
                "TRANSFER" as part,
                "SETS" | "PROTOCOLS" as kind,
                name,
            ]:
                cfg[part][kind][name] = _decode(key, text)
            case ["XLEARNER" as part, "SOURCES" | "DATASETS" | "PROBES" as kind, name, inner] | [
                "TRANSFER" as part,
                "SETS" | "PROTOCOLS" as kind,
                name,
                inner,
            ]:
                records = cfg[part][kind]
                if not isinstance(records.get(name), CfgNode):
                    raise ConfigError([f"{key}: there is no such record.{nearest(name, records)}"])
                records[name][inner] = _decode(key, text)
            case ["XLEARNER", "BRANCHES", name, inner]:  # of a record that need not be there
                record = cfg.XLEARNER.BRANCHES.get(name)
                cfg.XLEARNER.BRANCHES[name] = CfgNode({**(record or {}), inner: _decode(key, text)})
            case ["XLEARNER", "BRANCHES", name]:
                cfg.XLEARNER.BRANCHES[name] = _decode(key, text)
            case ["XLEARNER" as part, "FREEZE" as kind]:  # names, which yacs would want in quotes
                cfg[part][kind] = _decode(key, text)
            case ["XLEARNER", "SQUEEZE", "SOLVER", inner]:
                cfg.XLEARNER.SQUEEZE.SOLVER[inner] = _decode(key, text)
            case _:
                rest += [key, text]
    return rest


def _check_known(cfg: CfgNode, opts: Sequence[str]) -> list[str]:
    """Problems of command-line keys that no section knows, with the nearest known key."""
    problems = []
    for key in opts[::2]:
        node: Any = cfg
        for number, part in enumerate(key.split(".")):
            if not isinstance(node, CfgNode) or (part not in node and not node.is_new_allowed()):
                known = node if isinstance(node, CfgNode) else ()
                prefix = ".".join(key.split(".")[:number])
                problems.append(f"There is no setting {key} (below {prefix or 'the top'}).{nearest(part, known)}")
                break
            node = node.get(part)
            if node is None:
                break
    return problems


def default_config() -> CfgNode:
    """Detectron2's config with the keys of this project, all at their defaults."""
    cfg = get_cfg()
    add_xlearner_config(cfg)
    return cfg


def read_python_settings(path: str | Path) -> CfgNode:
    """Run a Python config, as Detectron2's LazyConfig does, and return its ``settings``.

    Raises:
        ConfigError: when the file is not there, fails, or has no settings.
    """
    if not Path(path).is_file():
        raise ConfigError([f"There is no config file {path}."])
    try:
        found = LazyConfig.load(str(path))
        settings = OmegaConf.to_container(found.settings, resolve=True) if "settings" in found else None
    except ConfigError:
        raise
    except Exception as error:  # it may be anything, as the file is a program
        raise ConfigError([f"{path}: {type(error).__name__}: {error}"]) from error
    if not isinstance(settings, dict):
        raise ConfigError([f"{path} should define 'settings', a dict with the keys of a YAML config."])
    return CfgNode(settings)


def load_config(config_file: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """Read a config file, then the overrides of the command line, into a new Detectron2 config.

    Args:
        config_file: YAML, which is read without running code; or Python (``.py``), which is run.
        opts: keys and values in turn.

    Raises:
        ConfigError: for a missing, malformed or contradictory file and for unknown or ill-typed settings.
    """
    cfg = default_config()
    python = Path(config_file).suffix == ".py"
    if not python:
        check_config_file(config_file)
    try:
        if python:
            cfg.merge_from_other_cfg(read_python_settings(config_file))
        else:
            cfg.merge_from_file(str(config_file), allow_unsafe=True)  # checked above
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError([f"{config_file}: {error}"]) from error
    opts = list(opts)
    if len(opts) % 2:
        raise ConfigError([f"The settings after the options should be pairs of key and value, got {opts}."])
    opts = _merge_free_overrides(cfg, opts)
    problems = _check_known(cfg, opts)
    if problems:
        raise ConfigError(problems, what="The command line")
    try:
        cfg.merge_from_list(opts)
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError([f"The command line: {error}"]) from error
    return cfg
