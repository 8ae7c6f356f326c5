import itertools
import json
import tarfile

import pytest

from paris_ray.config import ConfigError
from paris_ray.data.sources import open_source
from paris_ray.data.sources.webdataset import Webdataset

from .corpora import member, tar_bytes
from .reading import data_config, good, read, reasons
from .test_parquet import png


def write(folder, name, members, **options):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(tar_bytes(members, **options))
    return folder


def test_the_caption_is_the_txt_else_the_jsons(tmp_path):
    meta = json.dumps({"caption": "from json", "key": "k", "aesthetic": 6.0}).encode()
    folder = write(tmp_path, "a.tar", [
        member("000.jpg", png(0)), member("000.json", meta), member("000.txt", b"from txt"),
        member("001.PNG", png(1)), member("001.JSON", meta),
        member("sub/002.webp", png(2)), member("sub/002.cls", b"7"), member("sub/002.txt", b"two"),
        member("003.txt", b"before its image"), member("003.png", png(3)),
        member("dir", kind=tarfile.DIRTYPE),
    ])  # fmt: skip
    found = read(folder, "webdataset")
    captions = {"a.tar/000": "from txt", "a.tar/001": "from json", "a.tar/sub/002": "two", "a.tar/003": "before its image"}
    assert {name: row.caption for name, row in found.items()} == captions
    scored = read(folder, "webdataset", filter={"score_column": "aesthetic", "min_score": 5})
    assert reasons(scored) == {"a.tar/sub/002": "no score", "a.tar/003": "no score"}
    assert reasons(scored).keys() | good(scored).keys() == captions.keys()
    keyed = read(folder, "webdataset", source={"key": "key"})
    assert keyed["a.tar/000"].id == keyed["a.tar/001"].id  # the same key in both
    assert reasons(keyed) == {"a.tar/sub/002": "no key", "a.tar/003": "no key"}


def test_samples_that_are_no_row(tmp_path):
    folder = write(tmp_path, "a.tar", [
        member("000.txt", b"alone"),
        member("001.jpg", png(1)),
        member("002.jpg", png(2)), member("002.png", png(2)), member("002.txt", b"two images"),
        member("003.jpg", png(3)), member("003.json", b"{"),
        member("004.jpg", png(4)), member("004.json", b'{"caption": null}'),
        member("005.jpg", png(5)), member("005.json", b"[]"),
        member("006", png(6)),
    ])  # fmt: skip
    assert list(reasons(read(folder, "webdataset")).items()) == [
        ("a.tar/000", "no image"), ("a.tar/001", "no caption"), ("a.tar/002", "several images"), ("a.tar/003", "broken .json"),
        ("a.tar/004", "no caption"), ("a.tar/005", "broken .json"), ("a.tar/006", "no image"),
    ]  # fmt: skip


def test_of_several_images_none_is_held_and_members_of_a_key_have_an_end(tmp_path, monkeypatch):
    """Every spelling of an extension is a member of its own: ten of .jpg and .webp here."""
    spellings = ["".join(letters) for letters in itertools.product("jJ", "pP", "gG")] + ["webp", "Webp"]
    large = bytes(100_000)
    folder = write(tmp_path, "a.tar", [
        *(member(f"a.{extension}", large) for extension in spellings), member("a.txt", b"x"),
        *(member(f"b.x{i}", b"") for i in range(100)),
        member("c.jpg", png(1)), member("c.txt", b"fine"),
    ])  # fmt: skip
    held, made, unit = [], Webdataset._items, open_source(data_config(folder, "webdataset")).units(1)[0]

    def watched(self, sample, *rest):
        held.append((len(sample.sizes), sum(map(len, sample.members.values()))))
        return made(self, sample, *rest)

    monkeypatch.setattr(Webdataset, "_items", watched)
    items = list(Webdataset(str(folder)).read(unit))
    assert held == [(0, 0), (11, 1), (32, 0), (32, 0), (32, 0), (4, 0), (2, len(png(1)) + 4)]
    assert [(item.source, (item.reason or "").split(":")[0]) for item in items] == [
        ("a.tar/a", "several images"), ("a.tar/b", "no image"), *((f"a.tar/b#00{i}", "no image") for i in (2, 3, 4)), ("a.tar/c", ""),
    ]  # fmt: skip


def test_a_key_again_is_another_row(tmp_path):
    folder = write(tmp_path, "a.tar", [
        member("0.jpg", png(0)), member("0.txt", b"first"), member("0.jpg", png(1)), member("0.txt", b"second"),
        member("1.jpg", png(2)), member("1.txt", b"x"), member("0.jpg", png(3)), member("0.txt", b"third"),
    ])  # fmt: skip
    found = read(folder, "webdataset")
    assert {name: row.caption for name, row in found.items()} == {
        "a.tar/0": "first", "a.tar/0#002": "second", "a.tar/1": "x", "a.tar/0#003": "third",
    }  # fmt: skip


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_and_odd_names(tmp_path, style):
    names = ["é" * 60, "x" * 120] if style != tarfile.USTAR_FORMAT else ["é" * 40, "x" * 90]
    names = [*names, "y" * 60 + "/" + "z" * 80]
    members = [one for i, name in enumerate(names) for one in (member(f"{name}.png", png(i)), member(f"{name}.txt", b"c"))]
    if style != tarfile.PAX_FORMAT:
        members += [member("b\udcff.png", png(9)), member("b\udcff.txt", b"c")]
    folder = write(tmp_path, "a.tar", members, format=style)
    wanted = [f"a.tar/{name}" for name in names] + (["a.tar/b?"] if style != tarfile.PAX_FORMAT else [])
    assert list(good(read(folder, "webdataset"))) == wanted


def test_an_extended_header_is_small(tmp_path, monkeypatch):
    """Python 3.11 looks for a field in all of it, from each of its digits: 1 MB takes half an hour."""
    parsed, original = [], tarfile.TarInfo._proc_pax

    def count(header, tar):
        parsed.append(header.size)
        return original(header, tar)

    monkeypatch.setattr(tarfile.TarInfo, "_proc_pax", count)
    good_row = [member("0.png", png(0)), member("0.txt", b"c")]
    long = [member(f"{'é' * 1000}.png", png(1)), member(f"{'é' * 1000}.txt", b"c")]
    digits = member("PaxHeader", b"1" * (9 << 10), kind=tarfile.XHDTYPE)
    write(tmp_path, "a.tar", [*good_row, *long, digits], format=tarfile.PAX_FORMAT)
    found = read(tmp_path, "webdataset")
    last = f"a.tar from '{'é' * 1000}' on"
    assert list(good(found)) == ["a.tar/0", f"a.tar/{'é' * 1000}"]
    assert found[last] == f"broken tar: ReadError: a header claims {9 << 10} bytes"
    assert len(parsed) == 2
    assert max(parsed) < 8 << 10


def test_one_tar_by_its_name_and_folders_that_cannot_be_used(tmp_path):
    write(tmp_path, "a.tar", [member("0.jpg", png(0)), member("0.txt", b"first")])
    write(tmp_path, "b.tar", [member("0.jpg", png(1)), member("0.txt", b"second")])
    assert list(read(tmp_path / "a.tar", "webdataset")) == ["a.tar/0"]
    assert len(read(tmp_path, "webdataset")) == 2
    assert [unit.rows for unit in open_source(data_config(tmp_path, "webdataset")).units(1)] == [None, None]
    with pytest.raises(ConfigError, match=r"gone does not exist"):
        read(tmp_path / "gone", "webdataset")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \*.tar file"):
        read(tmp_path / "empty", "webdataset")
