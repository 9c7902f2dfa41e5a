"""ToyWorld's files are what they say: frames, PTS, cuts, rotation, captions."""

import json

import av
import numpy as np
import pytest

from toyworld.render import render_scene
from toyworld.text import parse_sentence, parse_shot_prompt, parse_story, shot_attributes
from toyworld.video import Footage, write_video
from toyworld.world import ToyScene, sample_scene


@pytest.fixture(scope="module")
def scene():
    return sample_scene("full", index=3, num_shots=3)


def decode(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return frames, container.streams.video[0]


def test_same_scene_same_bytes(scene, tmp_path):
    one = write_video(scene, tmp_path / "one.mp4", size=64)
    two = write_video(scene, tmp_path / "two.mp4", size=64)
    assert one.video.read_bytes() == two.video.read_bytes()
    assert one.sha256 == two.sha256
    assert not list(tmp_path.glob("*.part"))


def test_file_shows_the_scene(scene, tmp_path):
    files = write_video(scene, tmp_path / "v.mp4", size=128)
    frames, stream = decode(files.video)
    truth = json.loads(files.truth.read_text())
    assert stream.codec_context.name == "h264"
    assert stream.codec_context.pix_fmt == "yuv420p"
    assert [f.pts for f in frames] == truth["video"]["pts"]
    assert len(frames) == files.num_frames == scene.num_frames == len(truth["frames"])
    drawn, record = render_scene(scene, 128)
    decoded = np.stack([f.to_ndarray(format="rgb24") for f in frames])
    assert np.abs(decoded.astype(int) - drawn).mean() < 3.0
    assert truth["frames"] == json.loads(json.dumps(record))
    assert [c["frame"] for c in truth["cuts"]] == scene.cuts
    assert [c["pts"] * 8 for c in truth["cuts"]] == [c * 90_000 for c in scene.cuts]
    assert ToyScene.from_dict(truth["scene"]) == scene


def test_transition_intervals(tmp_path):
    scenes = [sample_scene("full", index=k, num_shots=4) for k in range(12)]
    kinds = set()
    for k, scene in enumerate(s for s in scenes[:6]):
        truth = json.loads(write_video(scene, tmp_path / f"{k}.mp4", size=32).truth.read_text())
        for shot, record in zip(scene.shots, truth["shots"], strict=True):
            begin, end = record["transition_frames"]
            kinds.add(shot.transition)
            assert record["transition_pts"][0] <= record["start_pts"] <= record["transition_pts"][1]
            if shot.transition == "dissolve":
                assert (begin, end - begin) == (record["start_frame"], shot.transition_frames)
            elif shot.transition == "fade":
                half = shot.transition_frames // 2
                assert (begin, end) == (record["start_frame"] - half, record["start_frame"] + half)
            else:
                assert begin == end == record["start_frame"]
    assert {"cut", "dissolve", "fade"} <= kinds


def test_sidecar_says_what_a_captioner_would(scene, tmp_path):
    files = write_video(scene, tmp_path / "v.mp4", size=32, phrasing_seed=1)
    record = json.loads(files.captions.read_text())
    assert set(record) == {"story", "entities", "shots"}
    said = parse_story(record["story"])
    assert len(record["entities"]) == len(said.characters)
    for i, shot in enumerate(record["shots"]):
        assert set(shot) == {"start_frame", "end_frame", "prompt", "sentence", "camera", "states"}
        assert parse_sentence(shot["sentence"]) == shot_attributes(scene, i)
        assert parse_shot_prompt(shot["prompt"]).resolve(said) == shot_attributes(scene, i)
        assert all(set(s) == {"text", "frame"} for s in shot["states"])
    assert [s["start_frame"] for s in record["shots"]] == [0, *scene.cuts]
    assert record["shots"][-1]["end_frame"] == scene.num_frames
    assert "hue" not in files.captions.read_text()  # unsaid traits stay unsaid


def test_no_captions(scene, tmp_path):
    files = write_video(scene, tmp_path / "v.mp4", size=32, captions=False)
    assert files.captions is None
    assert not (tmp_path / "v.json").exists()


@pytest.mark.parametrize("fps", [5, 12.5, 24, 30000 / 1001])
def test_frame_rate_keeps_cuts_in_time(scene, tmp_path, fps):
    files = write_video(scene, tmp_path / "v.mp4", size=32, fps=fps)
    truth = json.loads(files.truth.read_text())
    frames, _ = decode(files.video)
    assert [f.pts for f in frames] == truth["video"]["pts"]
    for cut, record in zip(scene.cuts, truth["cuts"], strict=True):
        late = record["pts"] / 90_000 - cut / scene.fps
        assert 0 <= late < 1 / fps + 1e-3
        assert truth["video"]["pts"][record["frame"]] == record["pts"]


def test_variable_frame_rate(scene, tmp_path):
    files = write_video(scene, tmp_path / "v.mp4", size=32, footage=Footage(variable_rate=True))
    truth = json.loads(files.truth.read_text())
    frames, _ = decode(files.video)
    pts = [f.pts for f in frames]
    assert pts == truth["video"]["pts"]
    assert len(pts) < scene.num_frames
    assert len(set(np.diff(pts))) > 5
    assert len(truth["cuts"]) == len(scene.shots) - 1
    for cut, record in zip(scene.cuts, truth["cuts"], strict=True):
        assert abs(record["pts"] / 90_000 - cut / scene.fps) < 0.3 / scene.fps


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_turns_it_upright(scene, tmp_path, degrees):
    look = Footage(rotation=degrees, letterbox=0.125)
    files = write_video(scene, tmp_path / "v.mp4", size=64, footage=look)
    frames, _ = decode(files.video)
    assert frames[0].rotation % 360 == -degrees % 360  # PyAV counts counter-clockwise
    stored = frames[5].to_ndarray(format="rgb24")
    upright = np.rot90(stored, k=-degrees // 90)
    assert upright.shape == (80, 64, 3)
    assert np.abs(upright[8:72].astype(int) - render_scene(scene, 64)[0][5]).mean() < 4.0
    assert upright[:6].max() < 40
    assert json.loads(files.truth.read_text())["video"]["content_box"] == [0, 8, 64, 72]


def test_noise_and_logo(scene, tmp_path):
    plain, _ = decode(write_video(scene, tmp_path / "p.mp4", size=64).video)
    dirty, _ = decode(write_video(scene, tmp_path / "d.mp4", size=64, footage=Footage(noise=12, logo=True)).video)
    gap = np.abs(plain[3].to_ndarray(format="rgb24").astype(int) - dirty[3].to_ndarray(format="rgb24"))
    assert gap.mean() > 4.0
    assert gap[-9:-6, -9:-6].mean() > 2 * gap[:20].mean() or gap[-9:-6, -9:-6].mean() > 20


def test_wrong_arguments_are_refused(scene, tmp_path):
    with pytest.raises(ValueError, match="even size"):
        write_video(scene, tmp_path / "v.mp4", size=65)
    with pytest.raises(ValueError, match=r"\.mp4"):
        write_video(scene, tmp_path / "v.mkv")
