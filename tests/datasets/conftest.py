"""Makes the scripts' package importable: ``datasets/`` holds scripts and data, and is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "datasets"))
