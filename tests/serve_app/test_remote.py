"""The two sides of remote experts, without Ray between them: the wire, the text cache, failures and recovery."""

import pickle
import threading
import time

import numpy as np
import pytest
import torch

from paris_ray.diffusion.ensemble import Conditioning, ExpertCall
from paris_ray.inference.experts import ExpertError, LocalExperts
from paris_ray.inference.weights import load_model, open_experts
from serve_app import remote
from serve_app.cards import ExpertState
from serve_app.remote import RemoteCallee, RemoteExperts


class Line:
    """A method of a handle: pickles what goes over it, as Serve does, and answers in another thread; can be cut."""

    def __init__(self, handle, method):
        self.handle, self.method = handle, method

    def remote(self, *args):
        self.handle.log.append((self.method, args))
        handle, sent = self.handle, pickle.dumps(args)

        class Response:
            def __init__(self):
                self.done, self.value, self.error = threading.Event(), None, None
                threading.Thread(target=self.work, daemon=True).start()

            def work(self):
                try:
                    handle.held.wait()
                    handle.running.wait()
                    if handle.cut:
                        raise ConnectionError("the process has died")
                    if handle_method == "velocities":
                        time.sleep(handle.delay)
                    self.value = pickle.dumps(getattr(handle.callee, handle_method)(*pickle.loads(sent)))
                except Exception as error:
                    self.error = error
                self.done.set()

            def _to_object_ref_sync(self, timeout_s=None):
                if not handle.held.wait(timeout_s):
                    raise TimeoutError

            def result(self, timeout_s=None):
                if not self.done.wait(timeout_s):
                    raise TimeoutError
                if self.error is not None:
                    wrapped = RuntimeError("as Ray wraps it")
                    wrapped.cause = self.error
                    raise wrapped
                return pickle.loads(self.value)

            def cancel(self):
                pass

        handle_method = self.method
        return Response()


class Handle:
    def __init__(self, callee):
        self.callee, self.cut, self.delay, self.log = callee, False, 0.0, []
        self.held = threading.Event()  # cleared: calls wait, as in a queue without a process
        self.held.set()
        self.running = threading.Event()  # cleared: a process has taken them, and hangs
        self.running.set()

    @property
    def states(self):
        return Line(self, "states")

    @property
    def velocities(self):
        return Line(self, "velocities")

    def texts_sent(self):
        return [len(args[1]) for method, args in self.log if method == "velocities"]


@pytest.fixture(scope="module")
def files(model_path):
    return open_experts(model_path)


class Callee(RemoteCallee):
    def states(self):
        return [ExpertState(k, "ready") for k, here in enumerate(self.experts.available()) if here]


def callee(files, indices, **options):
    return Callee(LocalExperts(files, indices), files.device, **options)


def calls(files, experts=(0, 1, 2), rows=3, seed=0, texts=None, guidance=(1.0, 2.5, 4.0)):
    g = torch.Generator().manual_seed(seed)
    names = texts or [f"text{i}" for i in range(rows)]
    table = {name: torch.randn(12, files.text_width, generator=torch.Generator().manual_seed(hash(name) % 1000)) for name in [*names, "null"]}
    made = []
    for k in experts:
        cond = Conditioning(
            torch.stack([table[name] for name in names]), torch.zeros(rows, 4), table["null"].expand(rows, -1, -1), torch.tensor(guidance[:rows]),
            tuple(names), ("null",) * rows,
        )  # fmt: skip
        made.append(ExpertCall(k, torch.randn(rows, *files.latent_shape, generator=g), torch.rand(rows, generator=g), cond))
    return made


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def pair(files, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.05)
    handles = [Handle(callee(files, [0, 2])), Handle(callee(files, [1]))]
    experts = RemoteExperts([((0, 2), handles[0], 1), ((1,), handles[1], 1)], files.num_experts)
    wait_for(lambda: all(experts.available()))
    yield experts, handles
    experts.close()


def test_experts_alone_are_those_of_the_whole_model(model_path, files):
    whole = load_model(model_path)
    assert (files.num_experts, files.latent_shape, files.present) == (whole.num_experts, whole.latent_shape, whole.present)
    for k in range(3):
        (a, meaning), (b, other) = files.load_expert(k), whole.load_expert(k)
        assert meaning.name == other.name
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_same_bytes_as_local_experts(files, pair):
    experts, _ = pair
    local = LocalExperts(files)
    for seed in range(3):
        asked = calls(files, seed=seed)
        for near, far in zip(local.velocities(asked), experts.velocities(asked), strict=True):
            assert torch.equal(near, far)


def test_a_text_travels_once(files, pair):
    experts, handles = pair
    experts.velocities(calls(files))
    experts.velocities(calls(files, seed=1))
    # Two experts of one group share them: three texts and the null text; without guidance no null text is needed.
    assert handles[0].texts_sent() == [4, 0]
    handles[1].log.clear()
    experts.velocities(calls(files, experts=(1,), rows=1, texts=["new"]))
    assert handles[1].texts_sent() == [1]


def test_a_new_process_is_told_again(files, pair):
    experts, handles = pair
    asked = calls(files)
    first = experts.velocities(asked)
    handles[1].callee = callee(files, [1])
    handles[1].log.clear()
    assert all(torch.equal(a, b) for a, b in zip(first, experts.velocities(asked), strict=True))
    assert handles[1].texts_sent() == [0, 4]


def test_a_group_forgets_the_oldest_texts_and_asks_again(files):
    one = 12 * files.text_width * 4
    handle = Handle(callee(files, [0], limit=3 * one))
    experts = RemoteExperts([((0,), handle, 1)], files.num_experts)
    wait_for(lambda: experts.available()[0])
    local = LocalExperts(files)
    for names in (["a", "b"], ["c", "d"], ["a", "d"], ["a", "d"]):
        asked = calls(files, experts=(0,), rows=2, texts=names)
        assert torch.equal(experts.velocities(asked)[0], local.velocities(asked)[0])
    assert handle.callee._bytes <= 3 * one
    experts.close()


def test_a_dead_group_is_masked_and_comes_back(files, pair):
    experts, handles = pair
    handles[1].cut = True
    with pytest.raises(ExpertError) as caught:
        experts.velocities(calls(files))
    assert caught.value.expert == 1
    assert experts.available() == [True, False, True]
    assert len(experts.velocities(calls(files, experts=(0, 2)))) == 2
    time.sleep(0.2)
    assert experts.available() == [True, False, True]
    handles[1].cut = False
    wait_for(lambda: all(experts.available()))
    assert len(experts.velocities(calls(files))) == 3


@pytest.mark.parametrize(("gone", "waits"), [("held", "PLACE_SECONDS"), ("running", "PING_SECONDS")])
def test_a_call_to_a_process_that_is_gone_or_hangs_is_given_up(files, pair, monkeypatch, gone, waits):
    experts, handles = pair
    for name in ("PLACE_SECONDS", "PING_SECONDS"):
        monkeypatch.setattr(remote, name, 0.1 if name == waits else 30.0)
    getattr(handles[1], gone).clear()
    began = time.monotonic()
    with pytest.raises(ExpertError):
        experts.velocities(calls(files))
    assert time.monotonic() - began < 5
    assert experts.available() == [True, False, True]
    getattr(handles[1], gone).set()
    wait_for(lambda: all(experts.available()))


def test_a_slow_group_that_lives_is_waited_for(files, pair, monkeypatch):
    experts, handles = pair
    monkeypatch.setattr(remote, "PING_SECONDS", 0.1)
    handles[1].delay = 0.5
    assert len(experts.velocities(calls(files))) == 3
    monkeypatch.setattr(remote, "CALL_SECONDS", 0.2)
    with pytest.raises(ExpertError):
        experts.velocities(calls(files))


def test_a_death_between_calls_is_noticed(files, pair, monkeypatch):
    experts, handles = pair
    monkeypatch.setattr(remote, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(remote, "PLACE_SECONDS", 0.1)
    for group in experts._groups:
        group.asked.set()  # wakes the watcher, which now checks often
    handles[0].cut = True
    wait_for(lambda: experts.available() == [False, True, False])
    # Serve knows that the process is gone, and keeps the question for the next one.
    handles[1].held.clear()
    wait_for(lambda: experts.available() == [False, False, False], 3.0)


def test_an_answer_from_before_a_loss_does_not_undo_it(files, pair, monkeypatch):
    experts, handles = pair
    group, handle = experts._groups[1], handles[1]
    monkeypatch.setattr(remote, "RETRY_SECONDS", 2.0)  # only after that it is asked anew
    # The watcher has asked, and its answer is on the way when a call finds the group lost.
    asked = len(handle.log)
    handle.held.clear()
    group.asked.set()  # wakes the watcher
    wait_for(lambda: len(handle.log) > asked)
    experts._lose(group, ConnectionError("x"))
    handle.held.set()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        assert not experts.available()[1]
        time.sleep(0.001)
    wait_for(lambda: experts.available()[1])


def test_an_experts_own_error_comes_through_and_masks_nothing(files, pair):
    experts, handles = pair
    handles[0].callee.experts.unload(2)
    with pytest.raises(ExpertError, match="not loaded") as caught:
        experts.velocities(calls(files))
    assert caught.value.expert == 2
    assert experts.available()[1]


def test_states_say_why(files, pair):
    experts, handles = pair
    assert [state.state for state in experts.states()] == ["ready"] * 3
    handles[1].cut = True
    with pytest.raises(ExpertError):
        experts.velocities(calls(files))
    assert [state.state for state in experts.states()] == ["ready", "dead", "ready"]
    assert "does not answer" in experts.states()[1].reason
    never = Handle(callee(files, [0]))
    never.held.clear()
    starting = RemoteExperts([((0,), never, 1)], files.num_experts)
    assert starting.states()[0].state == "loading"
    starting.close()
    never.held.set()


def test_an_expert_that_has_gone_is_masked_at_once_and_its_siblings_are_not(files, pair):
    experts, handles = pair
    handles[0].callee.experts.unload(2)  # the watcher would find out seconds later
    assert experts.available() == [True, True, True]
    with pytest.raises(ExpertError, match="not loaded"):
        experts.velocities(calls(files))
    assert experts.available() == [True, True, False]


class Pair:
    """Two replicas behind one handle, asked in turn."""

    def __init__(self, *handles):
        self.handles, self.turn = handles, 0

    def _next(self):
        self.turn += 1
        return self.handles[self.turn % 2]

    velocities = property(lambda self: self._next().velocities)
    states = property(lambda self: self._next().states)


@pytest.mark.parametrize(("rows", "pieces"), [(5, [5]), (16, [8, 8]), (19, [16, 3]), (40, [24, 16])])
def test_several_replicas_share_the_rows_and_not_a_byte_changes(files, rows, pieces):
    """One call for each, however many rows there are, and whole eights but for the last."""
    handles = [Handle(callee(files, [0, 1, 2])) for _ in range(2)]
    experts = RemoteExperts([((0, 1, 2), Pair(*handles), 2)], files.num_experts)
    wait_for(lambda: all(experts.available()))
    asked = calls(files, rows=rows, guidance=(1.0, 2.5, 4.0) * rows)
    for near, far in zip(LocalExperts(files).velocities(asked), experts.velocities(asked), strict=True):
        assert torch.equal(near, far)
    first = {}  # by expert; what is sent again lacked texts
    for handle in handles:
        for method, arguments in handle.log:
            for call in arguments[0] if method == "velocities" else ():
                first.setdefault(call.expert, {})[call.text_keys] = len(call.x)
    assert [sorted(sizes.values(), reverse=True) for sizes in first.values()] == [pieces] * 3
    experts.close()


def test_pieces_for_several_replicas_each_bring_their_texts(files):
    """All rows have the same text: that one replica is told it says nothing of the other."""
    handles = [Handle(callee(files, [0])) for _ in range(2)]
    experts = RemoteExperts([((0,), Pair(*handles), 2)], files.num_experts)
    wait_for(lambda: experts.available()[0])
    asked = calls(files, experts=(0,), rows=16, texts=["a"] * 16, guidance=(2.0,) * 16)
    experts.velocities(asked)
    assert sorted(len(args[1]) for handle in handles for method, args in handle.log if method == "velocities") == [2, 2]
    for handle in handles:
        handle.log.clear()
    experts.velocities(asked)
    assert sorted(len(args[1]) for handle in handles for method, args in handle.log if method == "velocities") == [0, 0]
    experts.close()


def test_of_several_replicas_one_that_hangs_costs_time_and_no_expert(files, monkeypatch):
    """Another one says that the group lives, and makes what the first one was asked."""
    hung, good = (Handle(callee(files, [0])) for _ in range(2))

    class First:
        asked = 0
        states = property(lambda self: good.states)

        @property
        def velocities(self):
            self.asked += 1
            return (hung if self.asked == 1 else good).velocities

    monkeypatch.setattr(remote, "PING_SECONDS", 0.05)
    monkeypatch.setattr(remote, "CALL_SECONDS", 2.0)
    experts = RemoteExperts([((0,), First(), 2)], files.num_experts)
    wait_for(lambda: experts.available()[0])
    hung.running.clear()
    (velocities,) = experts.velocities(asked := calls(files, experts=(0,)))
    assert torch.equal(velocities, LocalExperts(files).velocities(asked)[0])
    assert experts.available()[0]
    hung.running.set()
    experts.close()


def test_replicas_of_different_weights_are_both_named(files):
    handles = [Handle(callee(files, [0])) for _ in range(2)]
    for handle, name in zip(handles, ("old", "new"), strict=True):
        handle.callee.experts.put(0, files.load_expert(0), name)
    experts = RemoteExperts([((0,), Pair(*handles), 2)], files.num_experts)
    wait_for(lambda: experts.available()[0])
    experts.velocities(calls(files, experts=(0,), rows=16, guidance=(1.0,) * 16))
    assert sorted(experts.versions[0]) == ["new", "old"]
    experts.close()


def test_an_expert_that_is_placed_nowhere(files):
    experts = RemoteExperts([((0,), Handle(callee(files, [0])), 1)], files.num_experts)
    assert [state.state for state in experts.states()][1:] == ["missing"] * 2
    with pytest.raises(ExpertError, match="not placed"):
        experts.velocities(calls(files, experts=(1,)))
    experts.close()


def test_the_engine_recovers_from_a_group_that_dies_between_two_steps(model_path, pair):
    """The picture is finished, says what was missing, and has the bytes of a run whose expert 1 was masked from that step on."""
    from paris_ray.inference.engine import Engine, ImageRequest

    experts, handles = pair
    model = load_model(model_path)
    engine = Engine(model, experts)
    future = engine.submit(ImageRequest("x", seed=1, steps=6, routing="full"))
    for _ in range(3):
        engine.tick()
    handles[1].cut = True
    while engine.tick():
        pass
    result = future.result(0)
    assert result.degraded == [1]
    weights = np.array([step["weights"] for step in result.routing])
    assert len(weights) == 6
    assert (weights[:3, 1] > 0).all()
    assert (weights[3:, 1] == 0).all()

    local = LocalExperts(model)
    other = Engine(model, local)
    expected = other.submit(ImageRequest("x", seed=1, steps=6, routing="full"))
    for _ in range(3):
        other.tick()
    local.unload(1)
    while other.tick():
        pass
    np.testing.assert_array_equal(result.image, expected.result(0).image)
