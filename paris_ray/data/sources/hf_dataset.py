"""A Hugging Face dataset on disk: Arrow IPC streams, read with pyarrow alone."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from paris_ray.config import ConfigError, HfDatasetSource
from paris_ray.data.images import RejectError
from paris_ray.data.sources.base import Item, Sample, Unit
from paris_ray.data.sources.columns import Columns
from paris_ray.data.sources.files import Steady, bomb, check_link, check_name, one_line, too_many
from paris_ray.data.sources.ipc import sizes
from paris_ray.storage import Folder

STATE, SPLITS = "state.json", "dataset_dict.json"


class HfDataset:
    """What ``Dataset.save_to_disk`` wrote: ``state.json`` names the files ``data-*.arrow``, each one unit.

    A file's record batches are held in memory one at a time (a thousand rows, or a hundred with images, as written by default).

    Args:
        source: where it is, and the names of the columns.
        score: the column with scores, if there is one.
    """

    def __init__(self, source: HfDatasetSource, score: str | None):
        self.columns, self.folder = Columns(source, score), Folder(source.uri)

    def units(self, rows: int) -> list[Unit]:
        """A unit per file, in the order of ``state.json``.

        Raises:
            ConfigError: not such a folder, or one with several splits, or the first file lacks the columns.
        """
        uri = self.folder.uri
        try:
            check_link(self.folder, STATE)
            check_link(self.folder, SPLITS)
        except RejectError as error:
            raise ConfigError(f"data.source.uri: {uri} cannot be read: {error}") from None
        if not self.folder.exists(STATE):
            if self.folder.exists(SPLITS):
                splits = self.folder.read_json(SPLITS).get("splits", [])
                raise ConfigError(f"data.source.uri: {uri} holds several splits; name one: {', '.join(f'{uri}/{split}' for split in splits)}")
            raise ConfigError(f"data.source.uri: {uri} has no {STATE}; name a folder that Dataset.save_to_disk wrote, --set data.source.uri=…")
        try:
            state = self.folder.read_json(STATE)
            names = [check_name(file["filename"]) for file in state["_data_files"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"data.source.uri: {uri}/{STATE} does not name the data files: {one_line(error)}") from None
        if state.get("_indices_files"):
            raise ConfigError(f"data.source.uri: {uri} selects rows by indices that lie elsewhere; save it anew after flatten_indices()")
        sizes = [(name, self.folder.size(name)) for name in names]
        if missing := [name for name, size in sizes if size is None]:
            raise ConfigError(f"data.source.uri: {uri}/{STATE} names {missing[0]}, which is not there; copy the folder again")
        problems = {}
        for name in names:
            if (problem := self._problem(name)) is None:
                break
            problems[name] = problem
        else:
            first = next(iter(problems.items()), ("no data file", "it holds no rows"))
            raise ConfigError(f"data.source: none of the {len(names)} files in {uri} can be read. {first[0]}: {first[1]}")
        return [Unit(number, where, what=where[0]) for number, where in enumerate(sizes)]

    def _problem(self, name: str) -> str | None:
        file = Steady(self.folder, name)
        try:
            with file, pa.ipc.open_stream(file) as stream:
                return self.columns.problem(stream.schema)
        except RejectError as error:
            return str(error)
        except Exception as error:  # of broken content anything
            if file.failure is not None:
                raise file.failure from None
            return f"broken Arrow file: {one_line(error)}"

    def read(self, unit: Unit) -> Iterator[Item]:
        """The rows of one file. Where it breaks off, the rest is one reject: nothing says how many rows it had."""
        name, _ = unit.where
        file, row = Steady(self.folder, name), 0
        try:
            with file, pa.ipc.open_stream(file) as stream:
                problem = self.columns.problem(stream.schema)
                while True:
                    if (reason := bomb(*sizes(file))) is not None:
                        raise RejectError(reason)
                    begin = file.tell()
                    try:
                        batch = stream.read_next_batch()
                    except StopIteration:
                        break
                    if (reason := too_many(len(batch), file.tell() - begin)) is not None:
                        raise RejectError(f"broken Arrow file: {reason}")
                    if problem is None:
                        yield from self.columns.items(batch, name, row)
                    else:
                        yield from (Item(f"{name} row {row + i}", reason=f"wrong columns: {problem}") for i in range(len(batch)))
                    row += len(batch)
        except RejectError as error:
            yield Item(f"{name} from row {row}", reason=str(error))
        except Exception as error:  # as above
            if file.failure is not None:
                raise file.failure from None
            yield Item(f"{name} from row {row}", reason=f"broken Arrow file: {one_line(error)}")

    def load(self, item: Item) -> Sample:
        """Read the file of a row that has only its name. Raises RejectError; OSError when the store fails."""
        return self.columns.load(item)
