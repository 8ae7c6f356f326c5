import json

import pyarrow as pa
import pytest

from paris_ray.config import ConfigError
from paris_ray.data.sources import open_source

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
