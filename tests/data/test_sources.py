import collections
import json
import os

import pytest
from PIL import Image

from paris_ray import config
from paris_ray.config import ConfigError, SplitConfig
from paris_ray.data import part, sources
from paris_ray.data.images import RejectError

from .hostile import HOSTILE, write_hostile


def data_config(folder, **changes):
    demo = config.load("demo").data.model_dump(mode="json")
    return config.DataConfig.model_validate({**demo, "source": {"kind": "folder", "uri": str(folder)}, "image_size": 16, **changes})


def png(path, colour="red", size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def read(folder, **changes):
    """Every row of a folder: what it became, by its source name."""
    data = data_config(folder, **changes)
    source = sources.open_source(data)
    return {item.source: part.read_row(source, item, data, 0) for item in source.items()}


def test_every_hostile_row_has_its_reason_and_costs_no_other(tmp_path):
    good = write_hostile(tmp_path)
    found = read(tmp_path, max_pixels=1_000_000, max_caption_chars=200)
    assert {name: row for name, row in found.items() if not isinstance(row, str)}.keys() == set(good)
    reasons = {name: row.split(":")[0] for name, row in found.items() if isinstance(row, str)}
    assert reasons == HOSTILE


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
    assert sorted(row.split(":")[0] for row in found.values() if isinstance(row, str)) == ["broken table row"] * 4 + ["undecodable caption"] * 2


def test_a_field_too_long_for_the_csv_reader_costs_only_its_row(tmp_path):
    png(tmp_path / "a.png")
    png(tmp_path / "b.png")
    (tmp_path / "captions.csv").write_text(f"file,caption\na.png,{'x' * 200_000}\nb.png,fine\nb.png\n")
    found = read(tmp_path)
    assert found["b.png"].caption == "fine"
    assert sorted(row.split(":")[0] for row in found.values() if isinstance(row, str)) == ["broken table row", "broken table row", "no caption"]


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match=r"gone does not exist.*--set data.source.uri"):
        sources.open_source(data_config(tmp_path / "gone")).items()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no image \(.bmp.*among its 0 files"):
        sources.open_source(data_config(tmp_path / "empty")).items()
    png(tmp_path / "two/a.png")
    for name in sources.TABLES:
        (tmp_path / "two" / name).write_text("")
    with pytest.raises(ConfigError, match=r"holds both captions.csv and captions.jsonl"):
        sources.open_source(data_config(tmp_path / "two")).items()
    png(tmp_path / "headless/a.png")
    (tmp_path / "headless/captions.csv").write_text("a.png,what is this\n")
    with pytest.raises(ConfigError, match=r"must name the columns 'file' and 'caption'"):
        sources.open_source(data_config(tmp_path / "headless")).items()


def test_a_folder_by_uri(tmp_path):
    png(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    assert read(f"file://{tmp_path}")["a.png"].caption == "a caption"
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/pictures/x/a.png", (tmp_path / "a.png").read_bytes())
    memory.pipe("/pictures/x/a.txt", b"from memory")
    assert read("memory://pictures")["x/a.png"].caption == "from memory"


def test_a_store_that_fails_is_no_reject(tmp_path, monkeypatch):
    png(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    data = data_config(tmp_path)
    source = sources.open_source(data)
    items, calls = source.items(), []

    def away(name):
        calls.append(name)
        raise OSError("connection reset")

    monkeypatch.setattr(source.folder, "read_bytes", away)
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match=r"connection reset"):
        part.read_row(source, items[0], data, 0)
    assert len(calls) == sources.READ_TRIES


@pytest.mark.skipif(os.name != "posix", reason="bytes as file names")
def test_names_that_are_no_unicode(tmp_path):
    png(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("fine")
    item = sources.Item("b\udcff.png", "b\udcff.png", 3, None, "neither image nor caption: by its name")
    number, back = part.items_of(part.part_rows(7, [item, *sources.open_source(data_config(tmp_path)).items()]))
    assert number == 7
    assert back[0] == item
    assert part.shown(item.source) == "b?.png"


# -- identity and splits ------------------------------------------------------------------------------------------------


def test_equal_pictures_share_a_group_and_a_fate(tmp_path):
    for name, caption in (("a", "one"), ("b", "two"), ("c", "one")):
        png(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    png(tmp_path / "d.png", "blue")
    (tmp_path / "d.txt").write_text("one")
    found = read(tmp_path)
    assert found["a.png"].group == found["b.png"].group == found["c.png"].group != found["d.png"].group
    assert found["a.png"].id == found["c.png"].id
    assert len({found[name].id for name in ("a.png", "b.png", "d.png")}) == 3
    # Captions of one picture are never divided over splits, whichever they are.
    for shade in range(24):
        for caption in ("one", "two"):
            png(tmp_path / "many" / f"{shade}{caption}.png", (10 * shade, 0, 0))
            (tmp_path / "many" / f"{shade}{caption}.txt").write_text(caption)
    found = read(tmp_path / "many", split={"held_out_groups": 0.1, "held_out_rows": 0.3, "validation_rows": 0.3})
    fates = [{found[f"{shade}{caption}.png"].split for caption in ("one", "two")} for shade in range(24)]
    assert all(len(fate) == 1 for fate in fates)
    assert set.union(*fates) == {"train", "validation", "held_out"}


def test_split_shares_and_disjointness():
    split = SplitConfig(held_out_groups=0.1, held_out_rows=0.05, validation_rows=0.1)
    drawn = collections.Counter()
    by_group = collections.defaultdict(set)
    for group in range(4000):
        for row in range(5):
            kind = sources.split_of(split, 3, f"g{group}", f"g{group}r{row}")
            drawn[kind] += 1
            by_group[group].add(kind)
    n = 20_000
    # Expected shares, within five standard deviations (of 4000 groups for the first).
    assert abs(drawn["held_out"] / n - (0.1 + 0.9 * 0.05)) < 5 * (0.1 * 0.9 / 4000) ** 0.5
    assert abs(drawn["validation"] / n - 0.9 * 0.1) < 5 * (0.09 * 0.91 / n) ** 0.5 + 5 * 0.1 * (0.1 * 0.9 / 4000) ** 0.5
    # Whole groups are held out, more of them than would be by rows.
    assert abs(sum(kinds == {"held_out"} for kinds in by_group.values()) / 4000 - 0.1) < 0.024


def test_split_depends_on_seed_and_on_nothing_else():
    split = SplitConfig()
    rows = [(f"g{i // 3}", f"r{i}") for i in range(600)]
    once = [sources.split_of(split, 1, *row) for row in rows]
    assert once == [sources.split_of(split, 1, *row) for row in reversed(rows)][::-1]
    assert once != [sources.split_of(split, 2, *row) for row in rows]
    none = SplitConfig(held_out_groups=0, held_out_rows=0, validation_rows=0)
    assert {sources.split_of(none, 1, *row) for row in rows} == {"train"}


def test_caption_rules():
    assert sources.check_caption("  a\n\tb\0c ", 10) == "a b c"
    with pytest.raises(RejectError, match=r"empty caption"):
        sources.check_caption(" \n\0", 10)
    with pytest.raises(RejectError, match=r"caption too long: 11 characters, max_caption_chars is 10"):
        sources.check_caption("x" * 11, 10)


def test_listing_tells_of_every_change():
    base = [sources.Item("a", "a", 1, "c"), sources.Item("b", "b", 2)]
    prints = {sources.listing(items)["fingerprint"] for items in (
        base, base[:1], base[::-1], [sources.Item("a", "a", 9, "c"), base[1]], [sources.Item("a", "a", 1, "d"), base[1]],
    )}  # fmt: skip
    assert len(prints) == 5
