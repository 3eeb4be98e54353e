"""Makes toy_objective importable by the tests and the scripts beside it, however pytest imports test files."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
