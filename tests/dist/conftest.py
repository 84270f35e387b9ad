"""Lets the tests of this folder import the modules that they share with the rank programs they start."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
