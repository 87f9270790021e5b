"""What has to happen before torch and Detectron2 are imported: their noise is silenced, here and nowhere else."""

import logging
import os
import warnings

# Threads that wait without spinning leave the processors to the data loader, and to what runs beside.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Detectron2 scripts a few tensor helpers while it is imported.
warnings.filterwarnings("ignore", message=r".*torch\.jit\.(script|trace|interface).*", category=FutureWarning)
warnings.filterwarnings("ignore", message=r".*torch\.jit\.(script|trace|interface).*", category=DeprecationWarning)
# detectron2.model_zoo finds its config files through pkg_resources.
warnings.filterwarnings("ignore", message=r".*pkg_resources is deprecated.*")
# Detectron2 calls torch.meshgrid without the argument newer versions ask for.
warnings.filterwarnings("ignore", message=r".*torch\.meshgrid: in an upcoming release.*")
# DistributedDataParallel: the new argument would make buffers alike at the start, the old one leaves them alone.
warnings.filterwarnings("ignore", message=r".*`broadcast_buffers` is deprecated.*", category=FutureWarning)
# Detectron2's AMPTrainer still calls GradScaler and autocast by their names of CUDA, the latter in every step.
warnings.filterwarnings("ignore", message=r".*`torch\.cuda\.amp\..*` is deprecated.*", category=FutureWarning)
for name in (
    "fvcore.common.config",  # "would need unsafe loading", for every file read
    "detectron2.config.config",  # "has no VERSION", for every head
    "detectron2.data.common",  # three lines on serialising each data set
    "detectron2.data.dataset_mapper",  # the augmentations of each source, which its config says
    "torch.fx._symbolic_trace",  # Detectron2 asks whether it is being traced
    "torch.multiprocessing.spawn",  # that it ends the other workers of one that has failed
    "detectron2.evaluation.sem_seg_evaluation",  # a dict on one line, which the closing table says readably
):
    logging.getLogger(name).setLevel(logging.ERROR)
