"""Every key that this project adds to Detectron2's config, with its default; docs/SETTINGS.md is written from here."""

import torch
from detectron2.config import CfgNode

STAGES = ("expand", "squeeze", "all")
STEPS = ("joint", "alternating")
AMP_PRECISIONS = ("float16", "bfloat16")
SHARING = ("separate", "shared", "detached", "bidirectional")


def add_xlearner_config(cfg: CfgNode) -> None:
    """Add the keys of this project, such as the section ``XLEARNER``, with their defaults, to a Detectron2 config."""
    cfg.XLEARNER = x = CfgNode()
    # What train_net.py runs: expand, squeeze, or all (expand, then squeeze).
    x.STAGE = "all"
    # Modules of other projects, such as detectron2.projects.point_rend, that are imported before anything else: they
    # register what heads and data sets name, and their functions add_…_config add the keys of head configs.
    x.IMPORTS = []
    # Data sets, by name; see specs.DatasetSpec. Those that no source, probe or set of a suite names need not be there,
    # and those of Detectron2 need no entry.
    x.DATASETS = CfgNode(new_allowed=True)
    # The sources, by name; see specs.SourceSpec.
    x.SOURCES = CfgNode(new_allowed=True)
    # What is special about the branches of some tasks, by task; see branches.BranchSpec.
    x.BRANCHES = CfgNode(new_allowed=True)
    # Linear probes of the student at the end, by name; see specs.ProbeSpec.
    x.PROBES = CfgNode(new_allowed=True)
    # How branches share: separate, shared (one trunk), detached (features passed on without gradient), bidirectional.
    x.SHARING = "detached"
    # Steps of hard sharing on the same sources before the expansion (SOLVER.MAX_ITER), whose branches then start as
    # that trunk; 0 for none, and branches start as MODEL.WEIGHTS says (docs/OWN_DATA.md#short-training).
    x.TRUNK_STEPS = 0
    # Images per data set that are decoded before training starts, spread evenly; all must exist. -1: every image.
    x.CHECK_IMAGES = 5000
    # Faster convolutions on GPUs with tensor cores and on CPUs.
    x.CHANNELS_LAST = True
    # What SOLVER.AMP computes in on GPUs: float16, as Detectron2 does, or bfloat16, which has the range of float32 and
    # fewer digits. CPUs have bfloat16 or compute in float32.
    x.AMP_PRECISION = "float16"
    # Backend of torch.compile for the stages of branches and of the student, such as "inductor"; "" for none. On CPUs
    # inductor is slower than none (docs/SPEED.md).
    x.COMPILE = ""

    # Project on Weights & Biases to log to as well; "" for none. Needs the package wandb.
    x.WANDB = ""

    # "SGD" as in Detectron2, or "AdamW", which gets further in short runs from scratch.
    cfg.SOLVER.OPTIMIZER = "AdamW"

    _add_balance(x)
    _add_timeout(x)
    _add_growth(x)
    _add_reconciliation(x)
    _add_squeeze(x)
    _add_plug_in(x)
    add_head_config(cfg)
    _add_transfer(cfg)


def _add_balance(x: CfgNode) -> None:
    """Who is seen how often, and counts how much."""
    # joint: every step draws from every source. alternating: from one source, in turn; so little memory is needed, but
    # the steps of a source are fewer.
    x.STEPS = "joint"

    x.SAMPLING = s = CfgNode()
    # Images of a step, to be shared among the sources instead of each one's IMS_PER_BATCH; 0 keeps those. Alternating
    # steps have so many images of one source, and the shares decide how often its turn comes.
    s.IMS_PER_BATCH = 0
    # The shares go with size ** (1 / TEMPERATURE): 1 by size, 2 by its square root, larger ones more evenly.
    s.TEMPERATURE = 2.0

    x.WEIGHTING = w = CfgNode()
    # How the losses of sources are weighed: fixed (LOSS_WEIGHT), uncertainty (a learned variance for each source,
    # Kendall et al. 2018), dwa (sources whose loss falls slowly count more, Liu et al. 2019). All start as LOSS_WEIGHT.
    w.METHOD = "fixed"
    # dwa: larger ones weigh more evenly.
    w.TEMPERATURE = 2.0
    # dwa: steps over which losses are averaged before they are compared.
    w.WINDOW = 100


def _add_timeout(x: CfgNode) -> None:
    """How long workers wait for each other."""
    x.TIMEOUT = t = CfgNode()
    # Seconds without a sign of life after which a worker counts as hung or its machine as lost, and the others end with
    # an error. A worker that dies is noticed at once.
    t.SILENT = 180.0
    # Seconds that a worker waits for the others in one operation of a training step, as when one of them reads from a
    # file system that hangs; also for all to start. Evaluation, checkpoints and export may take longer.
    t.STUCK = 1800.0


def _add_growth(x: CfgNode) -> None:
    """Sources and tasks that a trained expansion does not have."""
    # An expanded checkpoint to extend by the sources and tasks that it does not have; it starts with all it has.
    x.EXTEND = ""
    # Start of the branches that EXTEND does not have: one of its tasks (that branch), a ResNet checkpoint, "random", or
    # "" (the branch of its first task).
    x.EXTEND_INIT = ""
    # Tasks of EXTEND that stay as they are: their branches, the layers into these, and the heads of its sources. Those
    # sources then need no TRAIN; new sources of these tasks train their heads alone.
    x.FREEZE = []


def _add_reconciliation(x: CfgNode) -> None:
    """What branches receive from each other."""
    x.RECONCILIATION = r = CfgNode()
    # Stages of a branch that receive features of the other branches.
    r.STAGES = ["res2", "res3", "res4"]
    # A stage receives the others' same stage and all shallower ones (True), or the same stage alone (False).
    r.CROSS_SCALE = True


def _add_squeeze(x: CfgNode) -> None:
    """The student, and what it learns from."""
    x.SQUEEZE = q = CfgNode()
    # Distil during the expansion run, from the branches as they are, instead of afterwards.
    q.ONLINE = False
    # Expanded checkpoint to squeeze; "" takes the one that the expand stage left in OUTPUT_DIR.
    q.TEACHER = ""
    # Start of the student: "random", a task's name (that branch, as far as it goes), a ResNet checkpoint, or "" (the
    # branch of the first source of classes, else of the first source; random when the student is built otherwise).
    q.INIT = ""
    # Depth of the student, a ResNet as MODEL.RESNETS says otherwise; 0 takes that of the branches.
    q.DEPTH = 0
    # A model of timm as the student; "" takes what the branches are.
    q.TIMM = ""
    # Stages of the student that get hints from the branches.
    q.STAGES = ["res4", "res5"]
    # For each of these, the stage of the branches that gives them, itself or a shallower one, averaged over positions
    # to its stride. res5 of a branch is made for its own labels: where these are few and training is long, res4 for
    # both is far better, and in short runs with many labels it is level (docs/EXPERIMENTS.md).
    q.TEACHER_STAGES = ["res4", "res4"]
    # Weight of each of these stages; 0 leaves one out.
    q.STAGE_WEIGHTS = [1.0, 1.0]
    # What a hint is compared by: mse, cosine_smooth_l1 (half each), cosine, smooth_l1.
    q.DISTANCE = "mse"
    # 1x1 convolutions between a student's and a branch's features in training, with BN and ReLU between them.
    q.PROJECTOR_LAYERS = 1
    # How the teacher's features are normalised: standardise (per channel, running), l2, phi_s (channels are a power of
    # two), none.
    q.NORMALISER = "standardise"
    # Whether the student learns from the sources' labels as well, through heads of its own that start as the teacher's.
    q.TASK_LOSSES = True
    # Whether a branch gives hints for the images of its own task's sources alone, instead of for all images; a task
    # whose sources have no TRAIN then gives none.
    q.OWN_IMAGES = False
    # Factor on all hints, against the task losses. Where labels are few and training is long, 3 is level with 1; in
    # short runs it costs points of classification (docs/EXPERIMENTS.md).
    q.HINT_WEIGHT = 1.0
    # By task, a further factor on the hints of its branch, such as {classification: 0.0}; 1 for those not named, and 0
    # asks a branch for none.
    q.TASK_WEIGHTS = CfgNode(new_allowed=True)
    # Batches of the source mix, each of images of one size, over which the student's BN statistics are estimated at
    # the end; 0 keeps the running averages.
    q.BN_RECALIBRATION_BATCHES = 50
    # Export a running average of the student's weights instead of the last ones, with this decay, approached from 0
    # as 1 - step^(-2/3); 0 turns it off, 0.999 or 0.9999 are common.
    q.EMA_DECAY = 0.0
    # Keys of SOLVER with other values in the squeeze stage.
    q.SOLVER = CfgNode(new_allowed=True)


def _add_plug_in(x: CfgNode) -> None:
    """A branch of the expanded model as the backbone of any config."""
    x.PLUG_IN = p = CfgNode()
    # For build_xlearner_*_backbone: the expanded checkpoint.
    p.WEIGHTS = ""
    # The task whose branch becomes the backbone.
    p.TASK = ""


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


def _add_transfer(cfg: CfgNode) -> None:
    """What a transfer suite needs."""
    cfg.TRANSFER = t = CfgNode()
    # Name of the suite.
    t.NAME = ""
    # Ways to measure a backbone, by name; see transfer.suite.ProtocolSpec.
    t.PROTOCOLS = CfgNode(new_allowed=True)
    # Downstream sets, by name; see transfer.suite.SetSpec.
    t.SETS = CfgNode(new_allowed=True)


def usable_device(cfg: CfgNode) -> str:
    """``MODEL.DEVICE``, but the CPU where Detectron2's default, a GPU of any number, meets a machine without one."""
    return usable(cfg.MODEL.DEVICE)


def usable(device: str) -> str:
    """See :func:`usable_device`."""
    return "cpu" if device == "cuda" and not torch.cuda.is_available() else device
