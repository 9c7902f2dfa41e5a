"""Videos longer than a clip: which clip makes which frames, by brute force over small cases."""

from __future__ import annotations

from itertools import product

import pytest

from models.windows import clip_windows, default_overlap


@pytest.mark.parametrize(("clip", "overlap"), [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3), (5, 2)])
def test_every_frame_is_made_once_beside_what_is_known_around_it(clip: int, overlap: int) -> None:
    for frames in range(clip, 9):
        for known in product([False, True], repeat=frames):
            done = list(known)
            for window in clip_windows(known, clip, overlap):
                made = [f for f in window if not done[f]]
                assert made and 0 <= window.start and window.stop <= frames and len(window) in (clip - 1, clip)
                before = range(max(0, made[0] - overlap), made[0])
                assert all(done[f] and f in window for f in before), "goes on from the frames before"
                after = made[-1] + 1
                if after < frames and known[after] and clip - overlap > 1:
                    assert after in window, "and arrives at what is known"
                for f in made:
                    done[f] = True
            assert all(done)


def test_clips_advance_as_in_the_paper() -> None:
    """F + (J-1)(F-M) frames in J clips; 15 clips of 16 frames that take over 8 are 128 (the authors' demonstration)."""
    for clip, overlap, count in ((16, 8, 15), (5, 4, 6), (5, 1, 3), (7, 3, 1)):
        frames = clip + (count - 1) * (clip - overlap)
        starts = [window.start for window in clip_windows([False] * frames, clip, overlap)]
        assert starts == [k * (clip - overlap) for k in range(count)]
    assert [window.start for window in clip_windows([False] * 9, 4, 2)] == [0, 2, 4, 5], "the last one takes over more"
    assert [default_overlap(clip) for clip in (1, 2, 3, 16)] == [1, 1, 1, 8]


def test_what_does_not_fit_is_refused() -> None:
    for frames, clip, overlap, message in (
        (9, 4, 4, "overlap is 4, expected 1 to 3 of the clip's 4"),
        (9, 4, 0, "overlap is 0, expected 1 to 3"),
        (9, 10, 2, "clip is 10, expected 1 to the video's 9"),
        (9, 0, 0, "clip is 0, expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_windows([False] * frames, clip, overlap)
