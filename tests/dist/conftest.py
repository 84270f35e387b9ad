"""Makes the modules of this folder importable, which the tests share with the programs that they start."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
