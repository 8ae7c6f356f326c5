import collections
import json
import os

import pytest
from PIL import Image

from paris_ray.config import ConfigError
from paris_ray.data import part
from paris_ray.data.sources import captions, files, open_source
from paris_ray.data.sources.base import listing

from .reading import data_config, good, read, reasons


def png(path, colour="red", size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def units(folder):
    return open_source(data_config(folder)).units(1000)


def test_sidecars_below_folders_in_the_order_of_names(tmp_path):
    for name in ("b/2.PNG", "b/1.png", "a.png", "ä/ö.png"):
        png(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"\ufeff  the {name}\n second   line ", encoding="utf-8")
    found = read(tmp_path)
    assert list(found) == ["a.png", "b/1.png", "b/2.PNG", "ä/ö.png"]
    assert found["ä/ö.png"].caption == "the ä/ö.png second line"
    assert (found["a.png"].width, found["a.png"].height) == (20, 20)


def table_csv(rows):
    quoted = [f'"{file}","{caption}"' for file, caption in rows]
    return "\ufefffile,other,caption\r\n" + "\r\n".join(row.replace('","', '",x,"', 1) for row in quoted) + "\r\n"


def table_jsonl(rows):
    return "\n".join(json.dumps({"file": file, "caption": caption}) for file, caption in rows) + "\n\n"


@pytest.mark.parametrize(("name", "table"), [("captions.csv", table_csv), ("captions.jsonl", table_jsonl)])
def test_caption_tables(tmp_path, name, table):
    for file in ("a.png", "sub/b.png", "c.png", "d.png"):
        png(tmp_path / file)
    (tmp_path / "c.txt").write_text("from the sidecar")
    rows = [("a.png", "one, with a comma"), ("sub/b.png", "zwei ü"), ("a.png", "a second caption"), ("gone.png", "x"), ("/etc/passwd", "x"),
            ("../a.png", "x"), ("http://h/a.png", "x"), ("", "x"), ("c.txt", "x")]  # fmt: skip
    (tmp_path / name).write_text(table(rows), encoding="utf-8")
    found = read(tmp_path)
    captions = {source: row.caption for source, row in found.items() if not isinstance(row, str)}
    assert captions == {"a.png": "one, with a comma", "a.png#002": "a second caption", "sub/b.png": "zwei ü", "c.png": "from the sidecar"}
    assert found["a.png"].group == found["a.png#002"].group
    assert found["a.png"].id != found["a.png#002"].id
    reasons = collections.Counter(row.split(":")[0] for row in found.values() if isinstance(row, str))
    assert reasons == {"no such file": 1, "file outside the folder": 4, "neither image nor caption": 1, "no caption": 1}


def test_broken_rows_of_a_table_cost_only_themselves(tmp_path):
    png(tmp_path / "a.png")
    png(tmp_path / "b.png")
    (tmp_path / "captions.jsonl").write_bytes(
        b'{"file": "a.png", "caption": "good"}\nnot json\n[1]\n{"file": "b.png"}\n'
        b'{"file": "b.png", "caption": "\\ud800"}\n{"file": "b.png", "caption": "\xff\xfe"}\n' + b"[" * 100_000 + b"\n"
    )
    found = read(tmp_path)
    assert found["a.png"].caption == "good"
    assert sorted(reasons(found).values()) == ["broken table row"] * 4 + ["undecodable caption"] * 2


def test_a_field_too_long_for_the_csv_reader_costs_only_its_row(tmp_path):
    png(tmp_path / "a.png")
    png(tmp_path / "b.png")
    (tmp_path / "captions.csv").write_text(f"file,caption\na.png,{'x' * 200_000}\nb.png,fine\nb.png\n")
    found = read(tmp_path)
    assert found["b.png"].caption == "fine"
    assert sorted(reasons(found).values()) == ["broken table row", "broken table row", "no caption"]


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match=r"gone does not exist.*--set data.source.uri"):
        units(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no image \(.bmp.*among its 0 files"):
        units(tmp_path / "empty")
    png(tmp_path / "two/a.png")
    for name in captions.TABLES:
        (tmp_path / "two" / name).write_text("")
    with pytest.raises(ConfigError, match=r"holds both captions.csv and captions.jsonl"):
        units(tmp_path / "two")
    png(tmp_path / "headless/a.png")
    (tmp_path / "headless/captions.csv").write_text("a.png,what is this\n")
    with pytest.raises(ConfigError, match=r"must name the columns 'file' and 'caption'"):
        units(tmp_path / "headless")


def test_a_folder_by_uri(tmp_path):
    png(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    assert read(f"file://{tmp_path}")["a.png"].caption == "a caption"
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/pictures/x/a.png", (tmp_path / "a.png").read_bytes())
    memory.pipe("/pictures/x/a.txt", b"from memory")
    assert read("memory://pictures")["x/a.png"].caption == "from memory"
    source = open_source(data_config("memory://pictures"))
    (unit,) = source.units(10)
    memory.rm("/pictures", recursive=True)
    with pytest.raises(OSError, match=r"cannot read memory://pictures, which was listed: it is not there"):
        list(part.read_rows(source, unit, data_config("memory://pictures"), 0, 1))


def test_a_store_that_fails_is_no_reject(tmp_path, monkeypatch):
    png(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    data = data_config(tmp_path)
    source, calls = open_source(data), []
    (unit,) = source.units(10)

    def away(name):
        calls.append(name)
        raise OSError("connection reset")

    monkeypatch.setattr(source.folder, "open", away)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match=r"connection reset"):
        list(part.read_rows(source, unit, data, 0, 1))
    assert len(calls) == files.READ_TRIES


@pytest.mark.parametrize("what", ["gone", "a mount point", "closed", "a mount point below"])
def test_a_source_that_is_not_mounted_here_is_no_reject(tmp_path, what):
    """As on a node that lacks the disk: else every row would be refused in silence, sooner than others are read."""
    root, sub = tmp_path / "pictures", tmp_path / "pictures/sub"
    for path in (root / "a.png", sub / "b.png"):
        png(path)
        path.with_suffix(".txt").write_text(path.stem)
    data = data_config(root)
    source = open_source(data)
    (unit,) = source.units(10)
    if what == "closed":
        root.chmod(0)
        if os.access(root, os.R_OK):  # to root nothing is closed
            root.chmod(0o700)
            pytest.skip("this user reads all")
    else:
        away = sub if "below" in what else root
        away.rename(tmp_path / "away")
        if "mount" in what:
            away.mkdir()
    why = {"gone": "No such file", "closed": "denied"}.get(what, "it is empty")
    said = rf"data.source: the node .* cannot read {sub if 'below' in what else root}, .*{why}.*mount it on every node"
    try:
        with pytest.raises(OSError, match=said):
            list(part.read_rows(source, unit, data, 0, 1))
    finally:
        if root.exists():
            root.chmod(0o700)


def test_one_file_that_is_gone_or_closed_costs_only_its_row(tmp_path):
    for name in ("a", "b", "c"):
        png(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    data = data_config(tmp_path)
    source = open_source(data)
    (unit,) = source.units(10)
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").chmod(0)
    found = dict(part.read_rows(source, unit, data, 0, 1))
    closed = {} if os.access(tmp_path / "b.png", os.R_OK) else {"b.png": "unreadable file"}
    assert reasons(found) == {"a.png": "unreadable file", **closed}


@pytest.mark.skipif(os.name != "posix", reason="bytes as file names")
def test_names_that_are_no_unicode(tmp_path):
    png(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("fine")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/b\xff.png")
    os.rename(tmp_path / "a.txt", os.fsencode(tmp_path) + b"/b\xff.txt")
    assert list(read(tmp_path)) == ["b?.png"]


def test_json_beside_a_picture(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png"):
        png(tmp_path / name)
    (tmp_path / "a.json").write_text('{"caption": "from json", "aesthetic": 6.5}')
    (tmp_path / "b.json").write_text('{"caption": "from json", "aesthetic": 4}')
    (tmp_path / "b.txt").write_text("from txt")
    (tmp_path / "c.json").write_text("[1]")
    (tmp_path / "d.json").write_text('{"title": "x"}')
    (tmp_path / "e.json").write_text('{"caption": 5}')
    (tmp_path / "f.json").write_text("{}")
    found = read(tmp_path)
    assert {name: row.caption for name, row in good(found).items()} == {"a.png": "from json", "b.png": "from txt"}
    wrong = {"c.png": "broken .json", "d.png": "no caption", "e.png": "caption is not text", "f.json": "caption without image"}
    assert reasons(found) == wrong
    scored = read(tmp_path, filter={"score_column": "aesthetic", "min_score": 5})
    assert scored["a.png"].caption == "from json"
    assert reasons(scored) == {**wrong, "b.png": "low score"}


def test_extensions_in_capitals(tmp_path):
    """As cameras and some systems write them. Every file is a row, a caption or a reject."""
    for name in ("IMG.JPG", "b.png", "c.PNG", "d.png"):
        png(tmp_path / name)
    texts = {"IMG.TXT": "by a camera", "b.Json": '{"caption": "from json"}', "d.JSON": "{", "d.TXT": "x"}
    texts |= {"c.txt": "small", "c.TXT": "capitals", "E.TXT": "x"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    found = read(tmp_path)
    captions = {"IMG.JPG": "by a camera", "b.png": "from json", "c.PNG": "small", "d.png": "x"}
    assert {name: row.caption for name, row in good(found).items()} == captions
    assert reasons(found) == {"c.TXT": "caption without image", "E.TXT": "caption without image"}


@pytest.mark.parametrize("extension", ["txt", "json"])
def test_a_caption_of_another_length_is_another_listing(tmp_path, extension):
    """Else parts that were made before would have the old one, and later ones the new."""
    png(tmp_path / "a.png")
    beside = tmp_path / f"a.{extension}"
    beside.write_text('{"caption": "short"}')
    before = listing(units(tmp_path))
    assert listing(units(tmp_path)) == before
    beside.write_text('{"caption": "longer"}')
    assert listing(units(tmp_path)) != before


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_scores_in_a_table(tmp_path, name):
    for file in ("a.png", "b.png", "c.png"):
        png(tmp_path / file)
    scores = {"a.png": 7, "b.png": 3, "c.png": "high"}
    if name.endswith("csv"):
        (tmp_path / name).write_text("file,caption,Score\n" + "".join(f"{file},x {file},{score}\n" for file, score in scores.items()))
    else:
        (tmp_path / name).write_text("".join(json.dumps({"file": file, "caption": file, "Score": score}) + "\n" for file, score in scores.items()))
    found = read(tmp_path, filter={"score_column": "Score", "min_score": 5})
    assert list(good(found)) == ["a.png"]
    assert reasons(found) == {"b.png": "low score", "c.png": "no score"}
    if name.endswith("csv"):
        with pytest.raises(ConfigError, match=r"score_column is 'score'.*it has file, caption, Score"):
            read(tmp_path, filter={"score_column": "score", "min_score": 5})


def test_links_may_not_lead_out(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("a password")
    folder = tmp_path / "folder"
    png(folder / "real/a.png")
    (folder / "real/a.txt").write_text("fine")
    (folder / "b.png").symlink_to("real/a.png")
    (folder / "b.txt").symlink_to(secret)
    (folder / "c.png").symlink_to(folder / "real/a.png")
    (folder / "c.txt").symlink_to(folder / "real/a.txt")
    (folder / "d.png").symlink_to("nowhere.png")
    (folder / "d.txt").write_text("x")
    (folder / "real/back").symlink_to("..")
    found = read(folder)
    assert {name: row.caption for name, row in good(found).items()} == {"real/a.png": "fine", "c.png": "fine"}
    assert reasons(found) == {"b.png": "file outside the folder", "d.png": "unreadable file"}


@pytest.mark.parametrize("name", captions.TABLES)
def test_a_table_may_not_be_a_link_out(tmp_path, name):
    png(tmp_path / "folder/a.png")
    private = {"captions.csv": "file,caption\na.png,private\n", "captions.jsonl": '{"file": "a.png", "caption": "private"}'}[name]
    (tmp_path / name).write_text(private)
    (tmp_path / "folder" / name).symlink_to(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"folder has a table .*'{name}' is a link that leads out of it; put the file itself there"):
        read(tmp_path / "folder")
    (tmp_path / "folder" / name).unlink()
    (tmp_path / "folder/other").write_text(private)
    (tmp_path / "folder" / name).symlink_to("other")
    assert read(tmp_path / "folder")["a.png"].caption == "private"


def test_a_unit_is_a_run_of_files_and_travels_as_text(tmp_path):
    for i in range(7):
        png(tmp_path / f"{i}.png", (i, 0, 0))
        (tmp_path / f"{i}.txt").write_text(str(i))
    found = open_source(data_config(tmp_path)).units(3)
    assert [(unit.number, unit.rows) for unit in found] == [(0, 3), (1, 3), (2, 1)]
    assert all(isinstance(unit.where, str) for unit in found)
    assert list(read(tmp_path, rows=3)) == list(read(tmp_path)) == [f"{i}.png" for i in range(7)]
