"""The one place where import-time noise of Detectron2 and its dependencies is silenced; imported first."""

import logging
import warnings

# Detectron2 scripts a few tensor helpers while it is imported.
warnings.filterwarnings("ignore", message=r".*torch\.jit\.(script|trace|interface).*", category=FutureWarning)
warnings.filterwarnings("ignore", message=r".*torch\.jit\.(script|trace|interface).*", category=DeprecationWarning)
# detectron2.model_zoo finds its config files through pkg_resources.
warnings.filterwarnings("ignore", message=r".*pkg_resources is deprecated.*")
# Detectron2 calls torch.meshgrid without the argument newer versions ask for.
warnings.filterwarnings("ignore", message=r".*torch\.meshgrid: in an upcoming release.*")
# fvcore announces on every load that a config file with Python tags would need unsafe loading.
logging.getLogger("fvcore.common.config").setLevel(logging.ERROR)
