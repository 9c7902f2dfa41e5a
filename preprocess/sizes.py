"""Which of several training sizes a video takes. A size is (height, width) of the encoded frames, in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Size = tuple[int, int]

ALIKE = Fraction(21, 20)  # a size of about the same aspect leaves at most so much less of the picture than the best


def choose_size(picture: Size, sizes: Sequence[Size]) -> Size:
    """The size for a displayed picture without its black bars, (height, width); in exact numbers, in any order.

    The one of the nearest aspect, which loses least when the picture is scaled to cover it and cropped. Among sizes of
    about that aspect (`ALIKE`) it is one that the picture is not enlarged for, the largest of these; where it is
    enlarged for all, the one for which it is least. Then the nearer aspect and the wider size decide.
    """

    def loss(size: Size) -> Fraction:
        """Picture to what remains of it, 1 for the same aspect."""
        ratio = Fraction(picture[1] * size[0], picture[0] * size[1])
        return max(ratio, 1 / ratio)

    def order(size: Size) -> tuple[Fraction, int, Fraction, int]:
        enlarged = max(Fraction(size[0], picture[0]), Fraction(size[1], picture[1]))
        return max(enlarged, Fraction(1)), -size[0] * size[1], loss(size), -size[1]

    least = min(loss(size) for size in sizes)
    return min((size for size in sizes if loss(size) <= least * ALIKE), key=order)


def in_words(size: Sequence[int]) -> str:
    """Width x height, as people and the configuration say it: `832x480`."""
    return f"{size[1]}x{size[0]}"
