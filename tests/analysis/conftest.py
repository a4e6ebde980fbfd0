"""The tests of analyses make their checkpoints as those of conversions do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint" / "hf"))
