"""Duplicates over the whole dataset, found when all shots are known: same file, same perceptual hash, same embedding.

A shot is compared with the kept shots of the videos before it, in the order of the sources, so the first one stays. The
shots of one video are not compared with each other: a conversation goes back and forth between two pictures. The
comparison is exact and quadratic in the number of shots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from preprocess.filters import DATASET_RULES, SAME_FILE, FilterSettings, judge, rule_of
from preprocess.parts import Part, Row
from preprocess.signature import HASH_BITS, hash_signs, read_signatures

_CHUNK = 512  # shots compared at once


@dataclass(frozen=True)
class Verdict:
    """What was found out about one shot: its scores, and why it goes ("" if it stays)."""

    scores: dict[str, float]
    reason: str = ""
    of: str = ""  # id of the shot (for a file: the video) that it doubles


def is_duplicate(row: Row) -> bool:
    """Whether a rule of this module took the shot of a manifest row."""
    return rule_of(row["filtered"]) in {SAME_FILE, *(rule.name for rule in DATASET_RULES)}


def find_duplicates(parts: Sequence[Part], settings: FilterSettings) -> dict[str, Verdict]:
    """Verdicts by shot id, for the shots of `parts`, in the order of the sources.

    What another filter took, and what is not written, is scored, too, but is no reason for another to go. A shot that
    an earlier run took as a duplicate stays what it was: its latents are gone.
    """
    verdicts: dict[str, Verdict] = {}
    files: dict[str, str] = {}
    vectors: list[str] = []
    compared: list[_Compared] = []
    for part in parts:
        if part.source["status"] == "failed":  # a copy of what is not written has to stay
            continue
        rows = [row for row in part.shots if _is_candidate(row)]
        known = files.get(part.source["sha256"], "") if rows else ""
        if rows and not any(row.get("set_aside") for row in part.shots):
            known = files.setdefault(part.source["sha256"], part.source["video_id"])
        if known and known != part.source["video_id"] and settings.same_file:
            reason = f"{SAME_FILE}: the file has the bytes of {known}"
            verdicts |= {row["shot_id"]: Verdict({}, reason, known) for row in rows}
        begin = len(compared)
        for row in part.shots:
            if row["signature"] and not row.get("duplicate_of"):
                vectors.append(row["signature"])
                stays = _is_candidate(row) and row["shot_id"] not in verdicts
                compared.append(_Compared(row["shot_id"], begin, stays))
    if not compared or (settings.max_similarity is None and settings.min_hash_distance is None):
        return verdicts
    for shot, found in _compare(read_signatures(vectors), compared, settings).items():
        verdicts[shot] = replace(verdicts[shot], scores=found.scores) if shot in verdicts else found
    return verdicts


def _is_candidate(row: Row) -> bool:
    """Whether a shot is kept, but for the rules of this module."""
    return not (row["filtered"] or row.get("set_aside"))


@dataclass(frozen=True)
class _Compared:
    shot_id: str
    first: int  # position at which its video begins
    stays: bool  # unless a comparison takes it


def _compare(vectors: np.ndarray, shots: list[_Compared], settings: FilterSettings) -> dict[str, Verdict]:
    """Sequential: a shot that went is no reason for another to go."""
    signs = hash_signs(vectors)
    limits = {rule.threshold: getattr(settings, rule.threshold) for rule in DATASET_RULES}
    stays = np.array([shot.stays for shot in shots])
    found: dict[str, Verdict] = {}
    for begin in range(0, len(shots), _CHUNK):
        chunk = slice(begin, min(begin + _CHUNK, len(shots)))
        similar = vectors[chunk] @ vectors[: chunk.stop].T  # [c,N]
        distant = (HASH_BITS - signs[chunk] @ signs[: chunk.stop].T) / 2
        for i in range(chunk.start, chunk.stop):
            kept = np.flatnonzero(stays[: shots[i].first])
            if not len(kept):
                continue
            similarities, distances = similar[i - begin, kept], distant[i - begin, kept]
            nearest, closest = int(similarities.argmax()), int(distances.argmin())
            scores = {
                "similarity": round(float(similarities[nearest]), 4),
                "hash_distance": float(distances[closest]),
            }
            reason = judge(scores, limits, DATASET_RULES) if stays[i] else ""
            by_hash = rule_of(reason) == DATASET_RULES[0].name
            of = shots[kept[closest if by_hash else nearest]].shot_id if reason else ""
            stays[i] &= not reason
            found[shots[i].shot_id] = Verdict(scores, f"{reason}, as {of}" if reason else "", of)
    return found
