"""Which texts and given frames a training sample loses, so that guidance can do without them."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TextDrop:
    """Shares of samples that lose text in training, so that guidance works at sampling. At most one of them applies.

    A method that tells its model of given frames (AID, FCA) can lose them, too, alone or with the text; states go with
    the text.
    """

    everything: float = 0.1
    story: float = 0.0
    prompts: float = 0.0  # the shots' own prompts; the story stays
    given: float = 0.0  # given frames; all text stays
    both: float = 0.0  # everything and given frames
    shots: float = 0.0  # of scenes: about half of the shots lose all text, so that they must follow the others

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 0 or sum(asdict(self).values()) > 1:
            raise ValueError(f"text drop probabilities must be at least 0 and sum to at most 1: {self}")

    def choose(self, draw: float) -> str | None:
        """What a sample with the uniform `draw` loses, if anything."""
        for name in ("everything", "story", "prompts", "given", "both", "shots"):
            if draw < getattr(self, name):
                return name
            draw -= getattr(self, name)
        return None

    def check(self, loses_given: bool, needs_both: bool) -> None:
        """Raises ValueError for shares that a method cannot use or has to have (`ShardDataset`)."""
        if loses_given and needs_both and not self.both:
            raise ValueError(
                f"text_drop.both is {self.both}, but this method guides by its given frames: the pass without them and "
                "without text would never be trained; set text_drop.both, such as 0.05"
            )
        if not loses_given and (self.given or self.both):
            raise ValueError(
                f"text_drop.given is {self.given}, text_drop.both {self.both}, but this method does not guide by given "
                "frames: set both to 0"
            )
