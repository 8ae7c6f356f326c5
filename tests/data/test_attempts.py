import contextlib

import pytest

from paris_ray.data import embed as stage
from paris_ray.data import part, schema
from paris_ray.data.attempts import ATTEMPTS, Work, WorkError, attempt, counted
from paris_ray.data.sources import open_source
from paris_ray.data.sources.base import Unit
from paris_ray.storage import Folder

from . import light
from .corpora import WRITERS
from .in_process import in_process  # noqa: F401
from .test_embed_sources import rows

WORKS = [Work.of(Unit(n, n, what=f"{n}.tar")) for n in range(3)]


def test_what_is_left_leaves_no_trace(tmp_path):
    folder = Folder(tmp_path)
    for _ in range(3 * ATTEMPTS):
        with attempt(folder, WORKS[1]):
            assert len(folder.files()) == 1
    with pytest.raises(OSError, match="store"), attempt(folder, WORKS[1]):
        raise OSError("the store fails")
    assert not folder.files()


def test_a_unit_on_which_workers_die_is_refused_and_named(tmp_path):
    folder, dead = Folder(tmp_path), []
    for _ in range(ATTEMPTS):
        dead.append(attempt(folder, WORKS[1]))
        dead[-1].__enter__()  # and is never left
    with attempt(folder, WORKS[2]):
        pass
    wanted = rf"part 1 \('1.tar'\): {ATTEMPTS} workers have died on it"
    with pytest.raises(WorkError, match=wanted), attempt(folder, WORKS[1]):
        pass
    (name,) = [entry.name for entry in folder.files()]
    state = folder.read_bytes(name)

    def fail():
        folder.write_bytes(name, state)
        raise ValueError("what Ray says of it")

    with pytest.raises(WorkError, match=wanted), counted(folder, WORKS):
        fail()
    with pytest.raises(ValueError, match="what Ray says"), counted(folder, WORKS[:1]):
        fail()
    with counted(folder, WORKS):  # anew
        assert not folder.files()


def test_a_file_that_another_worker_just_deleted_hides_no_error(tmp_path, monkeypatch):
    folder = Folder(tmp_path)

    def fail():
        for work in WORKS:
            folder.write_json(f"_attempts-{work.number:05d}.json", {"times": 1})
        entries = folder.files()
        monkeypatch.setattr(folder, "files", lambda: entries)
        folder.delete(entries[1].name)
        raise ValueError("403")

    with pytest.raises(ValueError, match="403"), counted(folder, WORKS):
        fail()


class Death(BaseException):
    """In place of a signal that nothing outlives."""


@pytest.fixture
def deadly(monkeypatch):
    """Pictures that kill who decodes them, by their bytes. A worker that dies leaves its files."""
    left, found, load = [], [], part.load_square

    @contextlib.contextmanager
    def attempt_of_a_mortal(*of):
        left.append(attempt(*of))  # held, or it would tidy up as it is collected
        yield left[-1].__enter__()
        left[-1].__exit__(None, None, None)

    def load_or_die(data, *of):
        if data in found:
            raise Death
        return load(data, *of)

    monkeypatch.setattr(part, "attempt", attempt_of_a_mortal)
    monkeypatch.setattr(part, "load_square", load_or_die)
    return found


def deaths(worker, table):
    """How many workers died before one did the unit."""
    for count in range(30):
        with contextlib.suppress(Death):
            worker(table)
            return count
    raise AssertionError("for ever")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_rows_that_kill_their_workers_are_refused_and_the_others_kept(tmp_path, monkeypatch, deadly, kind):
    monkeypatch.setattr(stage, "_save_frozen", light.save_frozen)
    monkeypatch.setattr(stage, "EncodePart", light.LightEncode)
    some = rows(8)
    uri = WRITERS[kind](tmp_path / "source", some, **({} if kind == "folder" else {"files": 1}))
    config = light.light_config(tmp_path / "run", f"{{kind: {kind}, uri: {uri}}}")
    run = Folder(config.run_dir)
    stage.embed(config)
    whole = schema.read_table(run / "corpus", schema.part_name(0)).to_pylist()
    (unit,) = open_source(config.data).units(8)
    table = part.unit_table(unit)
    for name in ("corpus", "rejected"):
        (run / name).delete_all()
    deadly += [some[2][1], some[5][1]]
    bare = config.data.model_dump(mode="json")
    assert deaths(light.LightEncode(bare, config.seed, run.uri), table) == 2 + 2 * len(deadly)  # two in company, then two for each that kills
    assert schema.read_table(run / "corpus", schema.part_name(0)).to_pylist() == [row for i, row in enumerate(whole) if i not in (2, 5)]
    refused = schema.read_table(run / "rejected", schema.part_name(0)).to_pylist()
    assert [row["source"] for row in refused] == [whole[i]["source"] for i in (2, 5)]
    assert {row["reason"].split(":")[0] for row in refused} == {"kills its worker"}
    assert deaths(part.SumPart(bare, config.seed, run.uri), table) == 2 + 2 * len(deadly)
    assert not [entry for name in ("corpus", "encoders") for entry in (run / name).files() if "_attempts" in entry.name]


def test_deaths_on_ever_other_rows_are_no_rows_fault(tmp_path):
    held = []
    for times in range(ATTEMPTS):
        held.append(attempt(Folder(tmp_path), WORKS[0]))
        begun = held[-1].__enter__()
        assert begun.alone == (times >= 2)
        if begun.alone:
            held.append(begun.reading(times))
            held[-1].__enter__()
    with pytest.raises(WorkError, match=r"5 workers have died on it, of memory, or of a decoder"), attempt(Folder(tmp_path), WORKS[0]):
        pass
