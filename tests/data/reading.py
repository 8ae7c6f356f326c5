"""Every row of a source, as a worker sees it."""

from __future__ import annotations

from paris_ray import config
from paris_ray.data import part
from paris_ray.data.sources import open_source

KINDS = ("folder", "parquet", "webdataset", "hf_dataset")


def data_config(uri, kind="folder", image_size=16, **changes):
    """The demo's data config, but for its source; ``source`` in ``changes`` adds to that."""
    demo = config.load("demo").data.model_dump(mode="json")
    source = {"kind": kind, "uri": str(uri), **changes.pop("source", {})}
    return config.DataConfig.model_validate({**demo, "source": source, "image_size": image_size, **changes})


def read(uri, kind="folder", rows=1000, **changes):
    """What every row became, by its source name; a name twice is an error."""
    data = data_config(uri, kind, **changes)
    source, found = open_source(data), {}
    for unit in source.units(rows):
        before = len(found)
        for name, row in part.read_rows(source, part.unit_of(part.unit_table(unit)), data, 0, 2):
            assert name not in found
            found[name] = row
        assert unit.rows in (None, len(found) - before)
    return found


def good(found):
    """Rows that can be used."""
    return {name: row for name, row in found.items() if not isinstance(row, str)}


def reasons(found):
    """Kinds of the reasons of the others."""
    return {name: row.split(":")[0] for name, row in found.items() if isinstance(row, str)}
