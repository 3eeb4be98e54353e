"""Makes dual_objectives importable by the tests and by the script that torchrun starts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
