"""Lets the tests import the tools' files as the tools do: they are programs beside each other, not a package."""

import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path[:0] = [str(TOOLS), *(str(TOOLS / folder) for folder in ("demo", "bench", "continual", "gpu"))]
