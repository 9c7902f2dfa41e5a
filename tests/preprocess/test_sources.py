"""Sources: order, ids, lists, and what is wrong said by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preprocess.sources import SourceError, list_sources, video_id


def touch(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_folder_is_searched_in_a_stable_order_and_other_files_are_left(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/z.MOV", "a/notes.txt", ".hidden.mp4", "a/.git/x.mp4", "c.gif"):
        touch(tmp_path / name)
    found = list_sources([tmp_path])
    assert [file.name for file in found.files] == ["b.mp4", "c.gif", "a/z.MOV"]
    assert [file.video_id for file in list_sources([str(tmp_path)]).files] == [f.video_id for f in found.files]


def test_ids_depend_on_the_name_alone(tmp_path: Path) -> None:
    touch(tmp_path / "one" / "b" / "clip.mp4")
    alone = list_sources([tmp_path / "one"]).files[0]
    touch(tmp_path / "one" / "a" / "clip.mp4")
    both = list_sources([tmp_path / "one"]).files
    assert both[1].video_id == alone.video_id == video_id("b/clip.mp4")
    assert both[0].video_id != both[1].video_id


@pytest.mark.parametrize(
    "name", ["-video-with-dash-.mp4", "a.b.c.mp4", "überraschung ☃.mov", "..mp4", "x" * 300 + ".mp4"]
)
def test_ids_are_safe_as_file_names_and_webdataset_keys(name: str) -> None:
    made = video_id(name)
    assert made.isascii() and not made.startswith("-") and len(made) < 60
    assert all(c.isalnum() or c == "-" for c in made)  # WebDataset ends a key at the first dot


def test_same_relative_name_in_two_folders_gives_two_sources(tmp_path: Path) -> None:
    touch(tmp_path / "one" / "clip.mp4", b"1")
    touch(tmp_path / "two" / "clip.mp4", b"2")
    found = list_sources([tmp_path / "one", tmp_path / "two"])
    assert [file.name for file in found.files] == ["clip.mp4", "clip.mp4~2"]
    assert len({file.video_id for file in found.files}) == 2


def test_a_file_given_twice_is_taken_once(tmp_path: Path) -> None:
    path = touch(tmp_path / "clip.mp4")
    (tmp_path / "link.mp4").symlink_to(path)
    found = list_sources([tmp_path, path])
    assert [file.name for file in found.files] == ["clip.mp4"]
    assert found.repeated == ["link.mp4", "clip.mp4"]


def test_globs_and_single_files(tmp_path: Path) -> None:
    for name in ("x1.mp4", "x2.webm", "y.mp4", "x3.txt"):
        touch(tmp_path / name)
    assert [f.name for f in list_sources([f"{tmp_path}/x*"]).files] == ["x1.mp4", "x2.webm"]
    assert [f.name for f in list_sources([f"{tmp_path}/y.mp4"]).files] == ["y.mp4"]


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_list_files(tmp_path: Path, kind: str) -> None:
    touch(tmp_path / "videos" / "a.mp4")
    touch(tmp_path / "captions" / "a.json")
    listing = tmp_path / f"list.{kind}"
    if kind == "txt":
        listing.write_text("# two videos\nvideos/a.mp4\n\nvideos/missing.mp4\n")
    elif kind == "csv":
        listing.write_text("path,captions\nvideos/a.mp4,captions/a.json\nvideos/missing.mp4,\n")
    else:
        rows = [{"path": "videos/a.mp4", "captions": "captions/a.json"}, {"path": "videos/missing.mp4"}]
        listing.write_text("\n".join(map(json.dumps, rows)))
    found = list_sources([listing])
    assert [file.name for file in found.files] == ["videos/a.mp4", "videos/missing.mp4"]
    assert found.files[0].bytes == 1 and found.files[1].bytes == -1  # set aside later, by name
    assert (found.files[0].captions or "").endswith("captions/a.json" if kind != "txt" else "")


def test_sidecar_is_found_beside_the_video(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4"), touch(tmp_path / "a.json"), touch(tmp_path / "b.mp4")
    a, b = list_sources([tmp_path]).files
    assert a.captions == str(tmp_path / "a.json") and a.captions_mtime_ns > 0
    assert b.captions is None


def test_the_output_folder_is_not_searched(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4"), touch(tmp_path / "out" / "b.mp4")
    assert [f.name for f in list_sources([tmp_path], exclude=tmp_path / "out").files] == ["a.mp4"]


def test_errors_name_the_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty: no video in it"):
        list_sources([tmp_path / "empty"])
    with pytest.raises(SourceError, match="nowhere: no such file"):
        list_sources([tmp_path / "nowhere"])
    bad = tmp_path / "bad.csv"
    bad.write_text("file\na.mp4\n")
    with pytest.raises(SourceError, match="bad.csv.*column 'path'"):
        list_sources([bad])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"path": "a.mp4"}\n{"video": 1}\n')
    with pytest.raises(SourceError, match="bad.jsonl.*line 2"):
        list_sources([bad])
