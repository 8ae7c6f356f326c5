import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from paris_ray.config import ConfigError
from paris_ray.data.sources import columns, files, open_source, parquet
from paris_ray.data.sources.parquet import Parquet, _units

from .reading import data_config, good, read, reasons


def png(seed, size=(20, 20)):
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def write(path, content, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(content), path, **options)


def simple(n, start=0):
    return {"image": [png(i) for i in range(start, start + n)], "caption": [f"number {i}" for i in range(start, start + n)]}


@pytest.mark.parametrize(("groups", "rows", "expected"), [
    ([3, 3, 3], 6, [[(0, 0, 3, 0), (1, 0, 3, 3)], [(2, 0, 3, 6)]]),
    ([10], 4, [[(0, 0, 4, 0)], [(0, 4, 4, 4)], [(0, 8, 2, 8)]]),
    ([2, 9, 0, 1], 4, [[(0, 0, 2, 0)], [(1, 0, 4, 2)], [(1, 4, 4, 6)], [(1, 8, 1, 10)], [(3, 0, 1, 11)]]),
    ([], 4, []),
])  # fmt: skip
def test_units_are_runs_of_row_groups_or_pieces_of_one(groups, rows, expected):
    assert list(_units(groups, rows)) == expected


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("group", [1, 5, 40])
def test_every_row_once_whatever_the_row_groups(tmp_path, rows, group):
    write(tmp_path / "a.parquet", simple(21), row_group_size=group)
    write(tmp_path / "sub/b.parquet", simple(5, 50), row_group_size=group)
    found = read(tmp_path, "parquet", rows=rows)
    wanted = {f"a.parquet row {i}": f"number {i}" for i in range(21)} | {f"sub/b.parquet row {i}": f"number {50 + i}" for i in range(5)}
    assert {name: row.caption for name, row in found.items()} == wanted
    assert list(found) == list(wanted)


def test_units_are_small_whatever_the_rows(tmp_path):
    captions = np.random.default_rng(0).permutation(100_000).astype(str)  # one that is the same everywhere takes no byte a row
    write(tmp_path / "a.parquet", {"image": [b"x"] * 100_000, "caption": captions}, row_group_size=50_000)
    units = open_source(data_config(tmp_path, "parquet")).units(50_000)
    assert len(units) == 2
    assert sum(len(repr(unit)) for unit in units) < 1000


def test_a_small_file_of_many_rows_is_one_reject(tmp_path):
    """Rows that take no byte: each would be a reject to be kept, and every few thousand a unit."""
    write(tmp_path / "a.parquet", simple(3))
    nothing = {"image": pa.nulls(10**6, pa.binary()), "caption": pa.nulls(10**6, pa.string())}
    write(tmp_path / "b.parquet", nothing)
    assert (tmp_path / "b.parquet").stat().st_size < 10_000
    found = read(tmp_path, "parquet")
    assert len(found) == 4
    assert found["b.parquet row 0"].startswith("broken Parquet file: it claims 1000000 rows in ")


def test_a_large_row_group_is_not_read_whole(tmp_path, monkeypatch):
    large = [np.random.default_rng(i).bytes(400_000) for i in range(64)]
    write(tmp_path / "a.parquet", {"image": large, "caption": ["x"] * 64}, use_dictionary=False, data_page_size=1 << 20, write_batch_size=2)
    source = open_source(data_config(tmp_path, "parquet"))
    (unit,) = source.units(64)
    read_bytes, original = [], files.Steady.read

    def count(file, size=-1):
        data = original(file, size)
        read_bytes.append(len(data))
        return data

    monkeypatch.setattr(files.Steady, "read", count)
    assert next(source.read(unit)).image == large[0]
    assert max(read_bytes) <= 4 << 20
    assert sum(read_bytes) < 20e6 < 25e6 < (tmp_path / "a.parquet").stat().st_size


@pytest.fixture
def decoded(monkeypatch):
    """Rows of each batch that is decoded."""
    found, original = [], columns.Columns.items
    monkeypatch.setattr(columns.Columns, "items", lambda self, batch, *rest: (found.append(len(batch)), original(self, batch, *rest))[1])
    return found


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_small_file_of_large_values_is_not_unpacked(tmp_path, monkeypatch, decoded, dictionary):
    """Zeros in a few kB: alone, two among small values, and one that many rows name."""
    for module in (parquet, files):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", 1 << 20)
    zeros, options = bytes(3 << 19), {"compression": "zstd", "use_dictionary": dictionary}
    write(tmp_path / "one.parquet", {"image": [zeros], "caption": ["x"]}, **options)
    write(tmp_path / "some.parquet", {"image": [zeros] * 2 + [b"y"] * 6, "caption": ["x"] * 8}, **options)
    write(tmp_path / "many.parquet", {"image": [zeros] * 9, "caption": ["x"] * 9}, **options)
    write(tmp_path / "caption.parquet", {"image": [png(5)], "caption": [zeros]}, **options)
    write(tmp_path / "struct.parquet", {"image": [{"bytes": png(5), "extra": zeros}], "caption": ["x"]}, **options)
    write(tmp_path / "z.parquet", simple(2))
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 20_000
    found = read(tmp_path, "parquet")
    assert list(good(found)) == ["z.parquet row 0", "z.parquet row 1"]
    assert list(reasons(found).values()) == ["file too large"] * (1 + 8 + 9 + 1 + 1)
    assert decoded == [2]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.struct([("bytes", pa.binary())])])
def test_values_over_the_limit_cost_only_themselves(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(columns, "MAX_FILE_BYTES", 100_000)
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 100_000)
    monkeypatch.setattr(columns, "MAX_TEXT_BYTES", 50)
    images = [png(0), np.random.default_rng(0).bytes(100_001), png(1), png(2)]
    values = [{"bytes": image} for image in images] if pa.types.is_struct(kind) else images
    write(tmp_path / "a.parquet", {"image": pa.array(values, kind), "caption": ["a", "b", "c" * 51, "d" * 50]})
    found = read(tmp_path, "parquet")
    assert list(good(found)) == ["a.parquet row 0", "a.parquet row 3"]
    assert found["a.parquet row 1"] == "file too large: 100001 bytes, at most 100000 are read"
    assert found["a.parquet row 2"] == "caption too long: 51 bytes, at most 50 are read"


@pytest.mark.parametrize("dictionary", [True, False])
def test_rows_decoded_at_once_depend_on_what_a_row_may_take(tmp_path, monkeypatch, decoded, dictionary):
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 1_000_000)
    for size, most in ((700, 32), (2_900, 8), (20_000, 1)):
        value = np.random.default_rng(0).bytes(size)
        images = [value] * 40 if dictionary else [np.random.default_rng(i).bytes(size) for i in range(40)]
        write(tmp_path / f"{size}/a.parquet", {"image": images, "caption": ["x"] * 40}, use_dictionary=dictionary)
        decoded.clear()
        assert len(read(tmp_path / str(size), "parquet")) == 40
        assert sum(decoded) == 40
        assert max(decoded) == (32 if dictionary else most)


@pytest.mark.parametrize("kind", [
    pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary()),
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]), pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())]),
])  # fmt: skip
@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.binary()])
def test_types_of_columns(tmp_path, kind, text):
    images = [png(i) for i in range(3)]
    values = [{"bytes": image, "path": None} for image in images] if pa.types.is_struct(kind) else images
    image = pa.array(values, pa.binary()).cast(kind) if pa.types.is_dictionary(kind) else pa.array(values, kind)
    caption = pa.array(["a", "b", None]).dictionary_encode().cast(text) if pa.types.is_dictionary(text) else pa.array(["a", "b", None], text)
    write(tmp_path / "a.parquet", {"image": image, "caption": caption})
    found = read(tmp_path, "parquet")
    assert {name: row.caption for name, row in good(found).items()} == {"a.parquet row 0": "a", "a.parquet row 1": "b"}
    assert found["a.parquet row 2"] == "no caption: it is null"


def test_one_file_by_its_name_other_columns_and_keys(tmp_path):
    columns = {
        "jpeg": [png(1), png(1), png(2), png(3), None],
        "text": ["a", "b", "c", "d", "e"],
        "url_hash": pa.array([7, 8, 8, None, 9], pa.int64()),
        "aesthetic": [6.0, 5.0, 6.5, 7.0, 7.0],
    }
    write(tmp_path / "one.parquet", columns)
    write(tmp_path / "other.parquet", simple(2))
    source = {"image": "jpeg", "caption": "text"}
    found = read(tmp_path / "one.parquet", "parquet", source=source)
    assert [row.caption for row in good(found).values()] == ["a", "b", "c", "d"]
    keyed = read(tmp_path / "one.parquet", "parquet", source={**source, "key": "url_hash"})
    names = [f"one.parquet row {i}" for i in range(5)]
    assert keyed[names[0]].id != keyed[names[1]].id == keyed[names[2]].id
    assert keyed[names[0]].id != found[names[0]].id
    assert reasons(keyed) == {names[3]: "no key", names[4]: "no image"}
    scored = read(tmp_path / "one.parquet", "parquet", source=source, filter={"score_column": "aesthetic", "min_score": 6})
    assert reasons(scored) == {names[1]: "low score", names[4]: "no image"}


def test_names_of_files_below_a_folder(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a.png").write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(2))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["sub/a.png", "../secret.png", str(tmp_path / "secret.png"),
             "http://localhost/a.png", "pipe:touch /tmp/x", "gone.png", "link.png", "a\0b", "sub", "sub/a.png/b", "x" * 300,
             "x" * 3000]  # fmt: skip
    write(tmp_path / "t/a.parquet", {"image": names, "caption": ["x"] * len(names)})
    found = read(tmp_path / "t", "parquet", source={"images": str(folder)})
    assert list(good(found)) == ["a.parquet row 0"]
    outside, missing = "file outside the folder", "unreadable file"
    assert list(reasons(found).values()) == [outside, outside, outside, missing, missing, outside, outside, *[missing] * 4]
    with pytest.raises(ConfigError, match=r"the column 'image' holds names; say below which folder .*data.source.images="):
        read(tmp_path / "t", "parquet")
    # Of a struct the bytes count, and the name where there are none.
    both = pa.array([{"bytes": None, "path": "sub/a.png"}, {"bytes": png(3), "path": "gone.png"}, {"bytes": None, "path": None}, None])
    write(tmp_path / "s/a.parquet", {"image": both, "caption": ["x"] * 4})
    found = read(tmp_path / "s", "parquet", source={"images": str(folder)})
    assert list(good(found)) == ["a.parquet row 0", "a.parquet row 1"]
    assert set(reasons(found).values()) == {"no image"}
    assert reasons(read(tmp_path / "s", "parquet"))["a.parquet row 0"] == "no image"


def test_what_cannot_be_used_at_all(tmp_path):
    with pytest.raises(ConfigError, match=r"gone does not exist"):
        read(tmp_path / "gone", "parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \*.parquet file"):
        read(tmp_path / "empty", "parquet")
    write(tmp_path / "a/a.parquet", {"img": [b""], "caption": ["x"]})
    said = r"none of the 1 Parquet files.*a.parquet: wrong columns: there is no column 'image'; name one .* caption: data.source.image=…"
    with pytest.raises(ConfigError, match=said):
        read(tmp_path / "a", "parquet")
    for column, values, what in (
        ("image", [1], "of images holds int64"), ("caption", [1], "of captions holds int64, not strings"),
        ("caption", [["a"]], "of captions holds list"), ("k", [1.5], "of keys holds double"), ("s", ["1"], "of scores holds string, not numbers"),
    ):  # fmt: skip
        write(tmp_path / column / "a.parquet", {"image": [b""], "caption": ["x"], "k": [1], "s": [1], column: values})
        with pytest.raises(ConfigError, match=what):
            read(tmp_path / column, "parquet", source={"key": "k"}, filter={"score_column": "s", "min_score": 0})


def test_a_store_that_fails_is_asked_again_and_is_no_reject(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", simple(3))
    source = open_source(data_config(tmp_path, "parquet"))
    assert isinstance(source, Parquet)
    (unit,) = source.units(10)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    opened, failures = files.Folder.open, iter([True, False, True, False])

    def shaky(folder, name):
        if next(failures, False):
            raise OSError("connection reset")
        return opened(folder, name)

    monkeypatch.setattr(files.Folder, "open", shaky)
    assert len(list(source.read(unit))) == 3
    monkeypatch.setattr(files.Folder, "open", lambda folder, name: (_ for _ in ()).throw(OSError("connection reset")))
    with pytest.raises(OSError, match=r"connection reset"):
        list(source.read(unit))
    with pytest.raises(OSError, match=r"connection reset"):
        source.units(10)
