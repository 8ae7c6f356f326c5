import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paris_ray.data import schema
from paris_ray.storage import Folder

META = {
    "text": {"max_length": 4, "width": 6},
    "codec": {"channels": 3, "latent_size": 2},
    "embedding": {"width": 5},
}


def rows(n, store_text="states"):
    g = np.random.default_rng(n)
    text = {"text": g.standard_normal((n, 4, 6)).astype("f2")} if store_text == "states" else {"token_ids": g.integers(0, 99, (n, 4)).astype("i4")}
    return {
        **text,
        "latent": g.standard_normal((n, 3, 2, 2)).astype("f2"),
        "embedding": g.standard_normal((n, 5)).astype("f2"),
        "text_len": np.arange(n, dtype="i4"),
        "id": [f"{i:032x}" for i in range(n)],
        "caption": [f"näme {i}" for i in range(n)],
        "split": ["train"] * n,
        "group": ["g"] * n,
        "phash": range(n),
        "caption_cut": [False] * n,
        "source": [f"{i}.png" for i in range(n)],
        "width": [10] * n,
        "height": [11] * n,
    }


@pytest.mark.parametrize("store_text", ["states", "token_ids"])
def test_round_trip_over_parts_in_name_order(tmp_path, store_text):
    kind, folder = schema.corpus_schema(META, store_text), Folder(tmp_path)
    pieces = [rows(n, store_text) for n in (3, 0, 2)]
    for index in (2, 0, 1):  # written out of order
        schema.write_table(folder, schema.part_name(index), schema.table(kind, pieces[index]))
    columns = ["latent", "embedding", "id", "text_len", "phash", "text" if store_text == "states" else "token_ids"]
    found = schema.read_columns(folder, columns)
    for name in columns:
        wanted = np.concatenate([np.asarray(piece[name]) for piece in pieces if len(piece["id"])])
        assert found[name].shape == wanted.shape
        assert (found[name] == wanted).all()
    assert found["latent"].dtype == np.float16


def test_names_of_very_many_parts_are_in_the_order_of_their_rows():
    numbers = [0, 9, 10, 20_000, 99_999, 100_000, 9_999_999]
    names = [schema.part_name(number) for number in numbers]
    assert sorted(names) == names
    assert [schema.part_number(name) for name in names] == numbers


def test_files_need_nothing_but_pyarrow(tmp_path):
    content = rows(3)
    schema.write_table(Folder(tmp_path), "part-0000000.parquet", schema.table(schema.corpus_schema(META, "states"), content))
    table = pq.read_table(tmp_path / "part-0000000.parquet")
    assert table.schema.field("latent").type == pa.fixed_shape_tensor(pa.float16(), (3, 2, 2))
    values = table["latent"].combine_chunks().storage.flatten().to_numpy()  # as any Arrow reader sees it
    assert (values == content["latent"].reshape(-1)).all()


def test_equal_tables_are_equal_bytes(tmp_path):
    kind = schema.corpus_schema(META, "states")
    for name in ("a", "b"):
        schema.write_table(Folder(tmp_path), name, schema.table(kind, rows(4)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_shard_schema_is_a_subset_with_the_cluster():
    corpus, shard = schema.corpus_schema(META, "token_ids"), schema.shard_schema(META, "token_ids")
    assert set(shard.names) - set(corpus.names) == {"fine"}
    assert all(shard.field(name) == corpus.field(name) for name in shard.names if name != "fine")


def test_wrong_shapes_and_columns_are_refused(tmp_path):
    kind = schema.corpus_schema(META, "states")
    with pytest.raises(ValueError, match=r"\(3, 2, 1\).*\[3, 2, 2\]|\(3, 2, 1\).*\(3, 2, 2\)"):
        schema.table(kind, {**rows(2), "latent": np.zeros((2, 3, 2, 1))})
    with pytest.raises(ValueError, match=r"columns are"):
        schema.table(kind, {key: value for key, value in rows(2).items() if key != "group"})
    with pytest.raises(FileNotFoundError, match=r"no part"):
        schema.read_columns(Folder(tmp_path), ["id"])


def test_tensors_are_written_small_and_read_by_plain_pyarrow(tmp_path):
    kind = pa.schema([("latent", pa.fixed_shape_tensor(pa.float16(), (4, 8, 8))), ("token_ids", pa.fixed_shape_tensor(pa.int32(), (9,)))])
    g = np.random.default_rng(0)
    columns = {"latent": g.standard_normal((500, 4, 8, 8)).astype("f2"), "token_ids": g.integers(0, 50, (500, 9))}
    content = schema.table(kind, columns)
    schema.write_table(Folder(tmp_path), "ours.parquet", content)
    pq.write_table(content, tmp_path / "plain.parquet", compression="zstd")
    latent, tokens = (pq.read_metadata(tmp_path / "ours.parquet").row_group(0).column(i) for i in range(2))
    assert "RLE_DICTIONARY" in tokens.encodings
    assert "RLE_DICTIONARY" not in latent.encodings
    assert "BYTE_STREAM_SPLIT" in latent.encodings
    assert (tmp_path / "ours.parquet").stat().st_size < 0.9 * (tmp_path / "plain.parquet").stat().st_size
    assert pq.read_table(tmp_path / "ours.parquet").equals(content)
