"""Files that a path with ``://`` names, fetched and checked; nothing else touches the network."""

import hashlib
import logging
from pathlib import Path

from detectron2.utils.file_io import PathManager

from ..specs import ConfigError

logger = logging.getLogger(__name__)

_MARK = "#sha256="


def local_file(path: str | Path) -> Path:
    """The file, or the local copy of one that is fetched: ``URL`` or ``URL#sha256=HEX``.

    A file that is fetched without a checksum is told its own in a warning, for the next time.

    Raises:
        ConfigError: when it is not there, cannot be fetched, or is another file than the checksum says.
    """
    where, _, wanted = str(path).partition(_MARK)
    if "://" not in where:
        if not Path(path).is_file():
            raise ConfigError([f"There is no checkpoint {path}."])
        return Path(path)
    try:
        local = Path(PathManager.get_local_path(where))
        with local.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except Exception as error:  # each protocol fails in its own way
        raise ConfigError([f"{where} cannot be fetched: {error or type(error).__name__}"]) from error
    if wanted and found != wanted.lower():
        what = f"{wanted} is expected, but {local} has {found}; remove it if it is damaged"
        raise ConfigError([f"{where} is not the file of its SHA-256: {what}."])
    if not wanted:
        logger.warning(f"{where} is taken as it was fetched. To have it checked, write {where}{_MARK}{found}.")
    return local
