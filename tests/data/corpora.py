"""The same rows as a folder, as Parquet files, as tars and as a Hugging Face dataset."""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq


def write_folder(path, rows):
    """Rows are (name with extension, bytes, caption)."""
    path.mkdir(parents=True, exist_ok=True)
    for name, image, caption in rows:
        (path / name).write_bytes(image)
        (path / name).with_suffix(".txt").write_text(caption)
    return path


def write_parquet(path, rows, files=2, row_group_size=3):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        own = rows[i::files]
        table = pa.table({"image": pa.array([r[1] for r in own], pa.binary()), "caption": pa.array([r[2] for r in own], pa.string())})
        pq.write_table(table, path / f"{i}.parquet", row_group_size=row_group_size)
    return path


def member(name, content=b"", kind=tarfile.REGTYPE, **fields):
    """A member of a tar: header and content."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar_bytes(members, **options):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", **options) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def write_webdataset(path, rows, files=2):
    """As img2dataset: KEY.jpg, KEY.json, KEY.txt, keys of nine digits, and a Parquet file and statistics beside each tar."""
    path.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        members = []
        for n, (name, image, caption) in enumerate(rows[i::files]):
            key, extension = f"{i:05d}{n:04d}", name.rsplit(".", 1)[1]
            meta = {"caption": caption, "url": "http://localhost/x.jpg", "key": key, "status": "success", "exif": "{}"}
            members += [
                member(f"{key}.{extension}", image),
                member(f"{key}.json", json.dumps(meta).encode()),
                member(f"{key}.txt", caption.encode()),
            ]
        (path / f"{i:05d}.tar").write_bytes(tar_bytes(members))
        (path / f"{i:05d}_stats.json").write_text("{}")
    return path


def write_arrow(path, table, batch=4):
    """A table as an Arrow IPC stream."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        for piece in table.to_batches(max_chunksize=batch):
            stream.write_batch(piece)


def write_state(path, names):
    """The two JSON files of a saved dataset."""
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_format_type": None, "_split": "train"}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text(json.dumps({"features": {"image": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"}}}))


def write_hf_dataset(path, rows, files=2):
    path.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        own = rows[i::files]
        image = pa.array([{"bytes": r[1], "path": r[0]} for r in own], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        metadata = {"huggingface": json.dumps({"info": {"features": {}}})}
        table = pa.table({"image": image, "caption": pa.array([r[2] for r in own], pa.string())}).replace_schema_metadata(metadata)
        write_arrow(path / name, table)
    write_state(path, names)
    return path


WRITERS = {"folder": write_folder, "parquet": write_parquet, "webdataset": write_webdataset, "hf_dataset": write_hf_dataset}


def contents(folder):
    """Bytes of all files but those that tell the time, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("_")
    }
