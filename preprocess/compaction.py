"""Take duplicates out of finished parts, at compaction: rows, records, latents; the rest stays byte for byte."""

from __future__ import annotations

from dataclasses import replace

from safetensors.torch import load, save

from models.scene import PIXEL_TENSORS, Scene, shot_tensor_key
from preprocess.dataset import Finished, Sample
from preprocess.duplicates import Verdict
from preprocess.filters import DATASET_RULES, stage_of_shots, summary
from preprocess.parts import Part


def without_duplicates(finished: Finished, verdicts: dict[str, Verdict], cuts: str) -> Finished:
    """The part with the verdicts on its shots: scores in all rows; those that go are not encoded any more.

    `cuts`: of the settings.
    """
    part = finished.part
    rows = []
    for row in part.shots:
        verdict = verdicts.get(row["shot_id"])
        if not row["duplicate_of"]:  # what an earlier run compared it with may be gone
            row = row | {f"score_{rule.score}": None for rule in DATASET_RULES}
        if verdict is None:
            rows.append(row)
            continue
        row |= {f"score_{name}": value for name, value in verdict.scores.items()}
        if verdict.reason:
            row |= {"filtered": verdict.reason, "duplicate_of": verdict.of}
            row |= {"encoded_frames": 0, "encoded_start_frame": -1, "encoded_height": 0, "encoded_width": 0}
        rows.append(row)
    written = {row["key"] for row in rows if row["encoded_frames"] > 0}
    rows = [row if row["key"] in written else row | {"key": "", "shard": ""} for row in rows]
    source = part.source
    if source["status"] == "written":
        encoded = [row["encoded_frames"] for row in rows if row["key"] and row["encoded_frames"]]
        source = source | {
            "scenes": len(written), "encoded_shots": len(encoded), "encoded_frames": sum(encoded)
        }  # fmt: skip
        if not written:
            reason = f"no shot is left of {len(rows)}: {summary([row['filtered'] for row in rows])}"
            source |= {"status": "filtered", "stage": stage_of_shots(cuts), "reason": reason}
    return replace(finished, part=Part(source, rows))


def gone_by_scene(verdicts: dict[str, Verdict]) -> dict[str, dict[str, str]]:
    """The reasons of the shots that go: scene -> shot -> reason."""
    found: dict[str, dict[str, str]] = {}
    for shot, verdict in verdicts.items():
        if verdict.reason:
            found.setdefault(shot.rpartition("/")[0], {})[shot] = verdict.reason
    return found


def cleaned_sample(key: str, files: Sample, scenes: dict[str, dict[str, str]]) -> Sample | None:
    """A scene without its duplicates; the very same object where it has none; None where nothing of it is left.

    `scenes` is what `gone_by_scene` gives.
    """
    gone = scenes.get(key)
    if not gone:
        return files
    scene = Scene.from_json(files["json"])
    tensors = load(files["safetensors"])
    for shot in scene.shots:
        if shot.shot_id in gone:
            shot.encoded, shot.filtered = None, gone[shot.shot_id]
            shot.states, shot.predicted_states = [], []
            for name in (*PIXEL_TENSORS, "states_text"):
                tensors.pop(shot_tensor_key(shot.index, name), None)
    if not any(shot.encoded for shot in scene.shots):
        return None
    return files | {"json": scene.to_json().encode(), "safetensors": save(tensors)}
