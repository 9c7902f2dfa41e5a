"""Where the models that come with Shotloom lie, and what whoever trains them on has to know."""

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent.parent / "toyworld" / "weights"
SHIPPED_WAN = WEIGHTS / "wan-small"  # single-shot ToyWorld `small`, 64x64, 17 frames
SHOT_GAP = 24  # empty time steps between the clips of a sequence in its pretraining, and so between shots
