"""Hostile rows in every form of a source, through the whole stage: each is right or has its reason, none costs another, no code runs."""

import collections
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paris_ray.data import embed as stage
from paris_ray.data import part, schema
from paris_ray.storage import Folder

from . import corpora, hostile
from .corpora import write_arrow, write_state
from .in_process import in_process  # noqa: F401
from .reading import good, read, reasons
from .test_embed_sources import run_config

LIMITS = (f"data.max_pixels={hostile.MAX_PIXELS}", f"data.filter.max_caption_chars={hostile.MAX_CAPTION}")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("kind", hostile.WRITERS)
def test_every_row_is_right_or_has_its_reason(tmp_path, kind):
    marker = tmp_path / "code_ran"
    wanted = hostile.WRITERS[kind](tmp_path / "source", marker)
    before = sorted(os.listdir(tmp_path))
    config = run_config(tmp_path / "run", kind, tmp_path / "source", *LIMITS)
    counts = stage.embed(config)["counts"]
    run = Folder(config.run_dir)
    found = dict.fromkeys(schema.read_columns(run / "corpus", ["source"])["source"].tolist(), hostile.RIGHT)
    rejected = [row for name in schema.parts(run / "rejected") for row in schema.read_table(run / "rejected", name).to_pylist()]
    assert len(found) + len(rejected) == counts["listed"] == counts["rows"] + counts["rejected"]
    found |= {row["source"]: row["reason"].split(":")[0] for row in rejected}
    assert found == wanted
    assert len(wanted) == counts["listed"]
    assert len(set(wanted.values()) - {None}) >= 9
    assert sum(reason is not None for reason in wanted.values()) >= 25
    assert counts["reasons"] == collections.Counter(reason for reason in wanted.values() if reason is not None)
    assert not marker.exists()
    assert sorted({*os.listdir(tmp_path)} - {"run"}) == before  # nothing was unpacked


@pytest.mark.parametrize("kind", ["folder", "table", "parquet", "webdataset", "hf_dataset"])
def test_a_key_or_a_score_costs_only_its_row(tmp_path, kind):
    wanted = hostile.write_identities(tmp_path / "source", kind)
    key = {} if kind in ("folder", "table") else {"key": "id"}
    found = read(tmp_path / "source", "folder" if kind == "table" else kind, source=key, filter={"score_column": "score", "min_score": 6})
    assert dict.fromkeys(good(found), hostile.RIGHT) | reasons(found) == wanted
    assert max(len(row) for row in found.values() if isinstance(row, str)) <= part.MAX_REASON
    assert len({row.id for row in good(found).values()}) == len(good(found))


@pytest.mark.parametrize("kind", hostile.WRITERS)
def test_the_source_itself_may_be_a_link(tmp_path, kind):
    files = {} if kind == "folder" else {"files": 1}
    corpora.WRITERS[kind](tmp_path / "real", [("a.png", hostile.encoded(hostile.noise(1), "PNG"), "fine")], **files)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/source").symlink_to(tmp_path / "real")
    assert [row.caption for row in good(read(tmp_path / "links/source", kind)).values()] == ["fine"]
    if kind in ("parquet", "webdataset"):  # one file by its name
        ending = "parquet" if kind == "parquet" else "tar"
        (file,) = (tmp_path / "real").glob(f"*.{ending}")
        file.rename(tmp_path / "real/blob")  # as in the cache of the hub
        (tmp_path / f"links/one.{ending}").symlink_to(tmp_path / "real/blob")
        assert [row.caption for row in good(read(tmp_path / f"links/one.{ending}", kind)).values()] == ["fine"]


def test_the_payload_works(tmp_path):
    """Else the absence of its file would prove nothing."""
    pickle.loads(pickle.dumps(hostile.Payload(tmp_path / "code_ran"))).close()
    assert (tmp_path / "code_ran").exists()


@pytest.mark.parametrize("kind", ["parquet", "hf_dataset"])
@pytest.mark.parametrize("name", ["ray.data.arrow_pickled_object", "ray.data.arrow_tensor_v2", "ray.data.arrow_tensor", "arrow.py_extension_type"])
@pytest.mark.parametrize("where", ["beside", "caption", "image", "inside"])
def test_extension_types_that_were_once_unpickled(tmp_path, kind, name, where):
    """With Ray Data's types registered, as in a worker: as a column beside, as the captions, as the images, as a field inside the images."""
    import ray.data  # noqa: F401

    marker = tmp_path / "code_ran"
    evil = pickle.dumps(hostile.Payload(marker))
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": evil}
    bad = pa.large_binary() if "pickled" in name else pa.list_(pa.int64()) if "tensor" in name else pa.binary()
    values = [[1], [2]] if pa.types.is_list(bad) else [evil, evil]
    content = [hostile.encoded(hostile.noise(i), "PNG") for i in range(2)]
    if where == "inside":
        kind_of_image = pa.struct([pa.field("bytes", pa.binary()), pa.field("extra", bad, metadata=metadata)])
        images = pa.field("image", kind_of_image), [{"bytes": one, "extra": value} for one, value in zip(content, values, strict=True)]
    else:
        images = pa.field("image", pa.binary()), content
    fields = {"image": images, "caption": (pa.field("caption", pa.string()), ["one", "two"])}
    column = "extra" if where in ("beside", "inside") else where
    fields[column] = (pa.field(column, bad, metadata=metadata), values)
    schema_ = pa.schema([field for field, _ in fields.values()])
    table = pa.Table.from_arrays([pa.array(value, field.type) for field, value in fields.values()], schema=schema_)
    safe = pa.table({"image": content[:1], "caption": ["three"]})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
        pq.write_table(safe, tmp_path / "b.parquet")
    else:
        write_arrow(tmp_path / "a.arrow", table)
        write_arrow(tmp_path / "b.arrow", safe)
        write_state(tmp_path, ["b.arrow", "a.arrow"])
    found = read(tmp_path, kind)
    ending = "parquet" if kind == "parquet" else "arrow"
    assert f"b.{ending} row 0" in good(found)
    # A type that nobody registered is its storage: bytes that are neither caption nor image.
    unknown = {"undecodable caption", "not an image"} if name.startswith("arrow.") else set()
    assert set(reasons(found).values()) <= {"wrong columns", "broken Arrow file", "broken Parquet file"} | unknown
    assert not marker.exists()
    if where in ("beside", "inside") and "pickled" in name:
        assert [row.caption for name, row in good(found).items() if name.startswith("a")] == ["one", "two"]
