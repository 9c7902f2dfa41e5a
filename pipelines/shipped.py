"""Where the models that come with Shotloom lie."""

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent.parent / "toyworld" / "weights"
SHIPPED_WAN = WEIGHTS / "wan-small"  # single-shot ToyWorld `small`, 64x64, 17 frames
