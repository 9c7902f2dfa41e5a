"""Sources: order, ids, lists, and what is wrong said by name."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem

from preprocess import sources
from preprocess.remote import stamp
from preprocess.settings import Ids
from preprocess.sources import SourceError, fields_text, list_sources, video_id


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


def test_names_whose_short_hashes_agree_have_ids_of_their_own() -> None:
    """Both are c43be23c in 32 bits."""
    assert video_id("d013982/clip.mp4") != video_id("d038062/clip.mp4")


@pytest.mark.parametrize("ids", ["path", "content"])
def test_ids_that_collide_end_the_listing_before_any_work(
    tmp_path: Path, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a" / "clip.mp4", b"1"), touch(tmp_path / "b" / "clip.mp4", b"2")
    monkeypatch.setattr(sources, "video_id", lambda name: "clip")
    monkeypatch.setattr(sources, "sha256_at", lambda path, span: hashlib.sha256(Path(path).read_bytes()).hexdigest())
    if ids == "content":
        assert len(list_sources([tmp_path], ids=ids).files) == 2
        monkeypatch.setattr(sources, "sha256_at", lambda path, span: "f" * 24 + Path(path).parent.name)
    with pytest.raises(SourceError, match="a/clip.mp4 and b/clip.mp4 would have the same id '(clip|f{24})'"):
        list_sources([tmp_path], ids=ids)


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


def test_globs_name_files_from_where_they_begin_to_differ(tmp_path: Path, store: AbstractFileSystem) -> None:
    """So that a folder that comes or goes leaves the ids of the others, in stores too."""
    for name in ("b/clip.mp4", "c/clip.mp4"):
        touch(tmp_path / name), store.pipe(f"/v/{name}", b"x")
    patterns = [f"{tmp_path}/*/clip.mp4", f"{tmp_path}/[a-c]*", f"{tmp_path}/**/*.mp4", "memory://v/*/clip.mp4"]
    before = [list_sources([pattern]).files for pattern in patterns]
    assert all([file.name for file in files] == ["b/clip.mp4", "c/clip.mp4"] for files in before)
    touch(tmp_path / "a" / "clip.mp4"), store.pipe("/v/a/clip.mp4", b"x")
    after = [list_sources([pattern]).files for pattern in patterns]
    for old, new in zip(before, after, strict=True):
        assert [file.name for file in new] == ["a/clip.mp4", "b/clip.mp4", "c/clip.mp4"]
        assert [file.video_id for file in new[1:]] == [file.video_id for file in old]


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
    bad.write_text('{"video": 1}\n')
    with pytest.raises(
        SourceError, match="bad.jsonl: no video in it; the first of 1: bad.jsonl:1 field 'path' is None"
    ):
        list_sources([bad])
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SourceError, match="bad.parquet.*not a Parquet file"):
        list_sources([bad])


def write_rows(path: Path, rows: list[dict]) -> Path:
    """The same rows in the format that the suffix says."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_lists_keep_other_columns_and_set_bad_rows_aside(tmp_path: Path, kind: str) -> None:
    for name in ("a.mp4", "sub/b.mp4", "c.mp4"):
        touch(tmp_path / name)
    rows = [
        {"path": "a.mp4", "text": 'says "hi",\nthen goes', "fps": "25"},
        {"path": "", "text": "no path"},
        {"path": "sub/b.mp4", "text": "fine", "fps": "fast"},
        {"path": "../outside.mp4", "text": "", "fps": ""},
        {"path": "/etc/passwd"},
        {"path": "file:///etc/passwd"},
        {"path": "c.mp4", "captions": "sub/../../c.json"},
        {"path": "sub/../c.mp4"},
    ]
    listing = write_rows(tmp_path / f"list.{kind}", rows)
    found = list_sources([listing]).files
    good = [file for file in found if not file.error]
    assert [file.name for file in good] == ["a.mp4", "sub/../c.mp4"] and good[1].path == str(tmp_path / "c.mp4")
    assert good[0].fields == {"text": 'says "hi",\nthen goes', "fps": 25.0} and good[0].fps is None
    bad = {file.name: file.error for file in found if file.error}
    lines = [int(name.partition(":")[2]) for name in bad]
    # a value with a line break makes CSV lines later, its header one more
    assert lines == ([4, 5, 6, 7, 8, 9] if kind == "csv" else [2, 3, 4, 5, 6, 7])
    errors = list(bad.values())
    assert "field 'path' is" in errors[0] and "expected the path of a file" in errors[0]
    assert errors[1] == "field 'fps' is 'fast', expected frames per second above 0"
    assert errors[2].startswith("field 'path' is '../outside.mp4', which leads out of")
    assert all("set list_root" in error for error in errors[3:])
    assert "field 'captions' is 'sub/../../c.json'" in errors[5]
    assert len({file.video_id for file in found}) == len(found)


REFERENCES = [{"role": "portrait", "path": "pictures/who.png"}, {"role": "source", "path": "memory://v/a.mp4"}]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_rows_of_lists_name_references_and_a_class(tmp_path: Path, kind: str) -> None:
    value = json.dumps(REFERENCES) if kind == "csv" else REFERENCES
    rows = [{"path": "a.mp4", "references": value, "label": 3, "n": "x"}, {"path": "b.mp4", "label": 0.0}]
    one, two = list_sources([write_rows(tmp_path / f"list.{kind}", rows)]).files
    assert [(ref.role, ref.path, ref.place) for ref in one.references] == [
        ("portrait", "pictures/who.png", str(tmp_path / "pictures/who.png")),
        ("source", "memory://v/a.mp4", "memory:///v/a.mp4"),
    ]
    assert (one.label, one.fields) == (3, {"n": "x"}) and (two.label, two.references) == (0, [])
    assert json.loads(fields_text(one)) == {"n": "x", "label": 3, "references": REFERENCES}


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"references": [{"role": "face", "path": "x.png"}]}, "references[0].role is 'face', expected one of 'image'"),
        ({"references": [{"role": "image"}]}, "references[0]: missing field 'path'"),
        ({"references": {"role": "image", "path": "x.png"}}, "field 'references' is {'role'"),
        ({"references": "[{"}, "field 'references' is '[{', expected a list of"),
        (
            {"references": [{"role": "image", "path": "x.png"}, {"role": "image", "path": "../x.png"}]},
            "references[1].path' is '../x.png', which leads out of",
        ),
        ({"references": [{"role": "image", "path": "file:///etc/passwd"}]}, "which leads out of"),
        ({"references": [{"role": "image", "path": " "}]}, "references[0].path' is ' ', expected the path of a file"),
        ({"label": "cat"}, "field 'label' is 'cat', expected a class, counted from 0"),
        ({"label": -1}, "field 'label' is -1, expected a class"),
        ({"label": 2.5}, "field 'label' is 2.5, expected a class"),
        ({"label": True}, "field 'label' is True, expected a class"),
        ({"label": 1e30}, "field 'label' is 1e+30, expected a class"),
    ],
)
def test_bad_references_and_classes_of_a_row_are_named(tmp_path: Path, row: dict, error: str) -> None:
    listing = tmp_path / "list.jsonl"
    listing.write_text("\n".join(json.dumps(one) for one in ({"path": "a.mp4"}, {"path": "b.mp4"} | row)))
    _, bad = list_sources([listing]).files
    assert bad.name == "list.jsonl:2" and error in bad.error


def test_list_root_widens_what_a_list_may_name(tmp_path: Path) -> None:
    touch(tmp_path / "videos" / "a.mp4")
    listing = touch(tmp_path / "lists" / "list.txt")
    listing.write_text(f"../videos/a.mp4\n{tmp_path}/videos/b.mp4\n")
    with pytest.raises(SourceError, match="list.txt: no video in it; the first of 2: list.txt:1 .*leads out of"):
        list_sources([listing])
    assert [f.path for f in list_sources([listing], list_root=tmp_path).files] == [
        str(tmp_path / "videos" / name) for name in ("a.mp4", "b.mp4")
    ]


@pytest.mark.parametrize(
    ("text", "line", "error"),
    [
        ('{"path": "a.mp4"}\n{"path": 3}\n', 2, "field 'path' is 3, expected the path of a file"),
        ('{"path": "a.mp4"}\n\n{path}\n', 3, "is not JSON"),
        ('{"path": "a.mp4"}\n["a"]\n', 2, "is not a JSON object"),
        ('{"path": "a.mp4", "fps": -1}\n{"path": "b.mp4"}\n', 1, "field 'fps' is -1"),
        ('{"path": "a.mp4"}\n{"path": "s3://b/c::file:///etc/passwd"}\n', 2, "chained addresses are not taken"),
        ('{"path": "a.mp4"}\n{"path": "nowhere://x/y.mp4"}\n', 2, "Protocol not known: nowhere"),
        ('{"path": "a.mp4"}\n{"path": "a\\u0000.mp4"}\n', 2, "expected the path of a file"),
    ],
)
def test_a_bad_row_is_named_by_line_field_and_value(tmp_path: Path, text: str, line: int, error: str) -> None:
    listing = tmp_path / "list.jsonl"
    listing.write_text(text)
    (bad,) = [file for file in list_sources([listing]).files if file.error]
    assert bad.name == f"list.jsonl:{line}" and error in bad.error


def test_fields_are_what_a_record_can_hold(tmp_path: Path) -> None:
    listing = tmp_path / "list.parquet"
    day = datetime(2026, 1, 2, tzinfo=UTC)
    row = {"path": ["a.mp4"], "day": [day], "score": [float("nan")], "data": [b"x"], "box": [{"x": 1, "y": [2.5]}]}
    pq.write_table(pa.table(row), listing)
    (file,) = list_sources([listing]).files
    assert file.fields == {"day": str(day), "score": "nan", "data": "b'x'", "box": {"x": 1, "y": [2.5]}}
    (tmp_path / "list.csv").write_bytes(b"path,who\na.mp4,caf\xe9\n")
    (file,) = list_sources([tmp_path / "list.csv"]).files
    assert file.fields == {"who": "caf\\udce9"}


def test_csv_rows_of_another_width(tmp_path: Path) -> None:
    listing = tmp_path / "list.csv"
    listing.write_text("path,text\na.mp4\nb.mp4,x,y\n\nc.mp4,z\n")
    found = list_sources([listing]).files
    assert [(f.name, f.fields) for f in found if not f.error] == [("a.mp4", {}), ("c.mp4", {"text": "z"})]
    assert [(f.name, f.error) for f in found if f.error] == [
        ("list.csv:3", "has 1 values more than the header has names: ['y']")
    ]


def test_a_list_may_name_files_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    touch(tmp_path / name)
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.mp4\n")
    (file,) = list_sources([tmp_path / "list.txt"]).files
    assert file.bytes == 1 and file.name.isascii()


def make_tar(path: Path, members: dict[str, bytes], special: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in special:
            tar.addfile(info)
    return path


def test_webdataset_tars(tmp_path: Path) -> None:
    captions = json.dumps({"story": "", "shots": []}).encode()
    tar = make_tar(
        tmp_path / "shards" / "000.tar",
        {
            "s/a.mp4": b"AAAA", "s/a.json": captions, "s/a.txt": b"a dog\n",
            "./b.left.mp4": b"BB", "._b.left.mp4": b"macOS", "b.json": b'{"url": "x", "n": 2}',
            "b.jpg": b"-", "c.webm": b"CCC",
        },
    )  # fmt: skip
    found = list_sources([tmp_path / "shards"]).files
    assert [file.name for file in found] == ["000.tar/s/a.mp4", "000.tar/b.left.mp4", "000.tar/c.webm"]
    data = tar.read_bytes()
    assert [data[f.span[0] : sum(f.span)] for f in found if f.span] == [b"AAAA", b"BB", b"CCC"]
    assert [file.bytes for file in found] == [4, 2, 3]
    a, b, c = found
    assert a.captions == str(tar) and a.captions_span and data[a.captions_span[0] :][:8] == captions[:8]
    # what X.json holds is seen when its video is probed, as in a folder
    assert a.fields == {"txt": "a dog"} and (b.fields, b.captions) == ({}, str(tar)) and c.captions is None
    assert [file.name for file in list_sources([tar]).files] == [file.name for file in found]


def test_no_path_leads_out_of_a_tar(tmp_path: Path) -> None:
    link, hard = tarfile.TarInfo("link.mp4"), tarfile.TarInfo("hard.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "../a.mp4"
    tar = make_tar(tmp_path / "x.tar", {"../up.mp4": b"1", "/abs.mp4": b"2", "ok.mp4": b"3"}, (link, hard))
    found = list_sources([tar]).files
    assert [file.name for file in found if not file.error] == ["x.tar/ok.mp4"]
    errors = [file.error for file in found if file.error]
    assert ["leads out of the tar"] * 2 == [error[-20:] for error in errors[:2]]
    assert all("is a link" in error for error in errors[2:]) and len(errors) == 4
    assert all(c.isalnum() or c == "-" for file in found for c in file.video_id)


def test_a_tar_that_is_cut_off_gives_what_is_whole(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", {"a.mp4": b"1" * 600, "b.mp4": b"2" * 5000})
    tar.write_bytes(tar.read_bytes()[:4000])
    a, b, *rest = list_sources([tar]).files
    assert not a.error and "cut off" in b.error and all(one.error for one in rest)
    (tmp_path / "y.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(SourceError, match="y.tar: no video in it.*damaged here, or compressed"):
        list_sources([tmp_path / "y.tar"])


def test_folders_of_numbered_images(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        touch(tmp_path / "clip" / f"frame_{number:04d}.png")
    touch(tmp_path / "pictures" / "who.png"), touch(tmp_path / "a.mp4"), touch(tmp_path / "clip.json")
    for name in ("l_1.png", "l_2.png", "r_3.png"):
        touch(tmp_path / "two" / name)
    assert [file.name for file in list_sources([tmp_path]).files] == ["a.mp4"]
    files = {file.name: file for file in list_sources([tmp_path], frames_fps=12).files}
    assert set(files) == {"a.mp4", "clip", "two"}
    assert files["clip"].fps == 12 and files["clip"].bytes == 3 and files["a.mp4"].fps is None
    assert files["clip"].captions == str(tmp_path / "clip.json")
    assert "several sequences of images (l_*.png, r_*.png)" in files["two"].error
    listing = write_rows(tmp_path / "list.jsonl", [{"path": "clip", "fps": 24}, {"path": "clip"}])
    listed, without = list_sources([listing]).files
    assert listed.fps == 24 and "give the rate of its images as 'fps'" in without.error


@pytest.fixture
def store() -> Iterator[AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.store.clear(), fs.pseudo_dirs.clear()
    yield fs
    fs.store.clear(), fs.pseudo_dirs.clear()


def test_addresses(store: AbstractFileSystem) -> None:
    for name in ("v/b.mp4", "v/a/c.MOV", "v/b.json", "v/notes.md", "v/.x/d.mp4"):
        store.pipe(f"/{name}", b"data")
    found = list_sources(["memory://v"]).files
    assert [file.name for file in found] == ["a/c.MOV", "b.mp4"]
    assert found[1].path == "memory:///v/b.mp4" and found[1].captions == "memory:///v/b.json"
    assert found[0].captions is None and found[0].bytes == 4 and found[0].mtime_ns > 0
    for source in ("memory://v/b.mp4", "memory://v/*.mp4"):
        (one,) = list_sources([source]).files
        assert (one.path, one.captions, one.bytes) == ("memory:///v/b.mp4", "memory:///v/b.json", 4), source
    assert found[1].mtime_ns == one.mtime_ns and one.captions_mtime_ns == found[1].captions_mtime_ns > 0
    with pytest.raises(SourceError, match="memory://nowhere: no such file"):
        list_sources(["memory://nowhere"])


@pytest.mark.parametrize(
    "name", ["ETag", "etag", "Last-Modified", "LastModified", "last_modified", "Content-MD5", "md5Hash", "mtime"]
)
def test_a_stamp_is_read_by_whatever_name_a_driver_gives_it(name: str) -> None:
    assert 0 < stamp({"size": 1, name: "a"}) != stamp({"size": 1, name: "b"}) and stamp({"size": 1}) == 0


def test_lists_and_tars_at_addresses(store: AbstractFileSystem, tmp_path: Path) -> None:
    store.pipe("/v/a.mp4", b"data")
    store.pipe("/v/list.csv", b"path\na.mp4\n../b.mp4\nmemory://v/a.mp4\nmemory://v/gone.mp4\n")
    found = list_sources(["memory://v/list.csv"])
    assert [(f.path, f.bytes) for f in found.files if not f.error][0] == ("memory:///v/a.mp4", 4)
    assert "points outside of the folder of its list" in found.files[1].error
    assert found.repeated == ["memory://v/a.mp4"] and found.files[2].bytes == -1
    store.pipe("/t/x.tar", make_tar(tmp_path / "x.tar", {"a.mp4": b"AAAA"}).read_bytes())
    (one,) = list_sources(["memory://t"]).files
    assert one.name == "x.tar/a.mp4" and one.span and one.span[1] == 4


def test_file_addresses_are_paths(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    assert [f.path for f in list_sources([f"file://{tmp_path}"]).files] == [str(tmp_path / "a.mp4")]


@pytest.mark.parametrize(
    ("address", "package"), [("s3://b/k.mp4", "s3fs"), ("gs://b/k", "gcsfs"), ("az://b/k", "adlfs")]
)
def test_a_missing_driver_says_what_to_install(tmp_path: Path, address: str, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(SourceError, match=f"driver that is not installed: pip install {package}"):
        list_sources([address])
    (tmp_path / "list.txt").write_text(f"a.mp4\n{address}\n")
    with pytest.raises(SourceError, match=f"pip install {package}"):
        list_sources([tmp_path / "list.txt"])


def test_ids_of_the_content(tmp_path: Path, store: AbstractFileSystem) -> None:
    """The same wherever the file lies; a copy is taken once; what an earlier run has hashed is not read again."""
    touch(tmp_path / "a.mp4", b"one"), touch(tmp_path / "b" / "copy.mp4", b"one"), touch(tmp_path / "c.mp4", b"two")
    found = list_sources([tmp_path], ids="content")
    assert [f.name for f in found.files] == ["a.mp4", "c.mp4"] and found.repeated == ["b/copy.mp4"]
    assert found.files[0].video_id == hashlib.sha256(b"one").hexdigest()[:24]
    tar = make_tar(tmp_path / "x.tar", {"n.mp4": b"one"})
    store.pipe("/v/m.mp4", b"one")
    for source in (tar, "memory://v"):
        assert list_sources([source], ids="content").files[0].video_id == found.files[0].video_id
    file = found.files[1]
    known = {(file.name, file.path, file.bytes, file.mtime_ns): "f" * 64}
    assert list_sources([tmp_path / "c.mp4"], ids="content", known=known).files[0].video_id == "f" * 24
    (tmp_path / "list.txt").write_text("gone.mp4\na.mp4\n")
    assert list_sources([tmp_path / "list.txt"], ids="content").files[0].video_id == video_id("gone.mp4")
