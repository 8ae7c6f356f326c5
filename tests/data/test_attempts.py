import pytest

from paris_ray.data.attempts import ATTEMPTS, Work, WorkError, attempt, counted
from paris_ray.data.sources.base import Unit
from paris_ray.storage import Folder

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
