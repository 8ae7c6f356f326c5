import io
import itertools
import json
import re

import numpy as np
import pyarrow as pa
import pytest

from paris_ray.config import ConfigError
from paris_ray.data.sources import files, open_source
from paris_ray.data.sources.columns import Columns
from paris_ray.data.sources.ipc import sizes
from paris_ray.storage import Folder

from .corpora import write_arrow, write_state
from .reading import data_config, good, read, reasons
from .test_parquet import png


def images(*values):
    return pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def test_files_in_the_order_of_the_state_and_rows_in_theirs(tmp_path):
    for name, start in (("data-00001-of-00002.arrow", 5), ("data-00000-of-00002.arrow", 0)):
        columns = {
            "image": images(*({"bytes": png(start + i), "path": None} for i in range(5))),
            "caption": [f"number {start + i}" for i in range(5)],
        }
        write_arrow(tmp_path / name, pa.table(columns), batch=2)
    write_state(tmp_path, ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"])
    found = read(tmp_path, "hf_dataset")
    assert [row.caption for row in found.values()] == [f"number {i}" for i in (5, 6, 7, 8, 9, 0, 1, 2, 3, 4)]
    assert [unit.rows for unit in open_source(data_config(tmp_path, "hf_dataset")).units(1)] == [None, None]


def test_captions_that_are_no_utf8_cost_only_their_row(tmp_path):
    raw = pa.array([b"good", b"caf\xe9", b"also good"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    write_arrow(tmp_path / "a.arrow", pa.table({"image": images(*({"bytes": png(i), "path": None} for i in range(3))), "caption": text}))
    write_state(tmp_path, ["a.arrow"])
    assert list(reasons(read(tmp_path, "hf_dataset")).items()) == [("a.arrow row 1", "undecodable caption")]


def test_other_columns_a_key_and_names_below_a_folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(png(1))
    columns = {"img": ["a.png", "../a.png", "a.png"], "text": ["x", "y", "z"], "uid": ["k1", "k2", "k1"], "q": pa.array([1, 2, None], pa.float32())}
    write_arrow(tmp_path / "a.arrow", pa.table(columns))
    write_state(tmp_path, ["a.arrow"])
    source = {"image": "img", "caption": "text", "key": "uid", "images": str(tmp_path / "pictures")}
    found = read(tmp_path, "hf_dataset", source=source, filter={"score_column": "q", "min_score": 1})
    assert [row.caption for row in good(found).values()] == ["x"]
    assert reasons(found) == {"a.arrow row 1": "file outside the folder", "a.arrow row 2": "no score"}


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match=r"has no state.json; name a folder that Dataset.save_to_disk wrote"):
        read(tmp_path, "hf_dataset")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=rf"holds several splits; name one: {tmp_path}/train, {tmp_path}/test"):
        read(tmp_path, "hf_dataset")
    for names, said in ((["../data.arrow"], "outside the folder"), (["gone.arrow"], "gone.arrow, which is not there"), ([], "it holds no rows")):
        write_state(tmp_path, names)
        with pytest.raises(ConfigError, match=said):
            read(tmp_path, "hf_dataset")
    (tmp_path / "state.json").write_text("[")
    with pytest.raises(ConfigError, match=r"state.json does not name the data files"):
        read(tmp_path, "hf_dataset")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}], "_indices_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(ConfigError, match=r"flatten_indices"):
        read(tmp_path, "hf_dataset")
    write_arrow(tmp_path / "a.arrow", pa.table({"img": [b""], "caption": ["x"]}))
    write_state(tmp_path, ["a.arrow"])
    with pytest.raises(ConfigError, match=r"none of the 1 files.*a.arrow: there is no column 'image'.*img, caption"):
        read(tmp_path, "hf_dataset")


def stream_of(batches, **options):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return sink.getvalue()


def batch_of(content, caption="x"):
    return pa.record_batch({"image": pa.array(content, pa.binary()), "caption": pa.array([caption] * len(content), pa.string())})


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_what_would_unpack_to_more_than_memory_is_not_unpacked(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1 << 20)
    decoded, original = [], Columns.items
    monkeypatch.setattr(Columns, "items", lambda self, batch, *rest: (decoded.append(len(batch)), original(self, batch, *rest))[1])
    fine, zeros = batch_of([png(0), png(1)]), batch_of([bytes(3 << 19), bytes(3 << 19)])
    named = zeros.set_column(0, "image", zeros["image"].dictionary_encode())
    large = batch_of([np.random.default_rng(i).bytes(3 << 18) for i in range(2)])
    streams = {
        "bomb": stream_of([fine, zeros, fine], compression=compression),
        "dictionary": stream_of([named], compression=compression),
        "large": stream_of([large], compression=compression),  # what does not shrink is no bomb
        "plain": stream_of([fine, fine.slice(0, 0), zeros, fine]),
    }
    for name, content in streams.items():
        (tmp_path / f"{name}.arrow").write_bytes(content)
    assert (tmp_path / "bomb.arrow").stat().st_size < 50_000
    write_state(tmp_path, [f"{name}.arrow" for name in streams])
    found = read(tmp_path, "hf_dataset")
    assert {name: reason for name, reason in reasons(found).items() if "from" in name} == {
        "bomb.arrow from row 2": "file too large", "dictionary.arrow from row 0": "file too large",
    }  # fmt: skip
    assert list(good(found)) == [f"{name}.arrow row {i}" for name, rows in (("bomb", (0, 1)), ("plain", (0, 1, 4, 5))) for i in rows]
    assert decoded == [2, 2, 2, 0, 2, 2]


@pytest.mark.parametrize("caption", ["caption", "other"])
def test_a_batch_of_rows_that_take_no_byte_is_one_reject(tmp_path, caption):
    """Of type null a batch has as many rows as it says; with the wrong columns each would be a reject all the same."""
    nothing = pa.nulls(10**7)
    (tmp_path / "a.arrow").write_bytes(stream_of([batch_of([png(0)])]))
    (tmp_path / "b.arrow").write_bytes(stream_of([pa.record_batch({"image": nothing[:3], caption: nothing[:3]})] * 2))
    (tmp_path / "c.arrow").write_bytes(stream_of([pa.record_batch({"image": nothing, caption: nothing})] * 2))
    assert (tmp_path / "c.arrow").stat().st_size < 1000
    write_state(tmp_path, ["a.arrow", "b.arrow", "c.arrow"])
    source, found = open_source(data_config(tmp_path, "hf_dataset")), []
    for unit in source.units(1000):
        found += itertools.islice(source.read(unit), 100)
    assert [item.source for item in found] == ["a.arrow row 0", *(f"b.arrow row {i}" for i in range(6)), "c.arrow from row 0"]
    assert re.fullmatch(r"broken Arrow file: it claims 10000000 rows in \d\d\d bytes", found[-1].reason)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_sizes_are_those_of_the_buffers(tmp_path, compression):
    """Against pyarrow's own count of an uncompressed batch, buffers rounded up to 8 bytes."""
    g = np.random.default_rng(0)
    batches = [batch_of([g.bytes(int(n)) + bytes(2000) for n in g.integers(1, 3000, 20)]) for _ in range(3)]
    (tmp_path / "a").write_bytes(stream_of(batches, compression=compression))
    with files.Steady(Folder(tmp_path), "a") as file, pa.ipc.open_stream(file) as stream:
        for batch in batches:
            place = file.tell()
            stored, unpacked = sizes(file)
            assert file.tell() == place
            wanted = sum(buffer.size for column in batch.columns for buffer in column.buffers() if buffer is not None)
            assert wanted <= unpacked <= wanted + 64 * 6
            assert stored == unpacked if compression is None else stored < 0.7 * unpacked
            assert stream.read_next_batch() == batch
        assert sizes(file) == (0, 0)
