"""The table against a server whose every answer is known."""

from __future__ import annotations

import dataclasses
import json

import fabricated
import numpy as np
import pytest

from paris_ray.evaluation import protocol
from paris_ray.evaluation.asking import Ask, Endpoint, EndpointError, ask_all
from paris_ray.evaluation.evaluate import evaluate, markdown
from paris_ray.manifest import StaleError
from paris_ray.storage import Folder

URL = "http://server:8000/v1"


def endpoint(server):
    return Endpoint(URL, server.transport())


def by_key(table):
    return {row["key"]: row for row in table["rows"]}


def test_captions_are_training_rows_of_each_cluster_and_held_out_rows_of_groups_seen(run):
    corpus = protocol.read_corpus(run)
    trained = protocol.trained_captions(run, corpus)
    assert [one.cluster for one in trained] == [0, 0, 1, 1, 2, 2]
    assert all(corpus.splits[one.row] == "train" for one in trained)
    held_out = protocol.held_out_captions(run, corpus)
    assert sorted(one.id for one in held_out) == ["8-blue", "9-blue"]  # not those of group 11, which training never saw
    assert len({one.seed for one in trained + held_out}) == 8
    again = protocol.trained_captions(run, protocol.read_corpus(run))
    assert again == trained


def test_latents_come_in_the_order_asked_from_whatever_file(run):
    corpus = protocol.read_corpus(run)
    expected = {row["id"]: row["latent"] for row in fabricated.rows()}
    found = corpus.latents([23, 0, 11])
    np.testing.assert_allclose(found, np.stack([expected[corpus.ids[row]] for row in (23, 0, 11)]), atol=2e-3)


def test_a_server_that_knows_everything_scores_as_the_ceiling_and_chance_is_what_it_must_be(run):
    server = fabricated.Server()
    table = evaluate(run, endpoint(server))
    rows = by_key(table)
    for key in ("top-2", "oracle", "top-1", "full", "caption", "held_out", "round_trip"):
        right = rows[key]["right"]
        assert right["share"] == 1.0, key
        assert rows[key]["exact"]["share"] == 1.0
        assert rows[key]["ground"] == {**rows[key]["ground"], "hits": right["of"], "of": right["of"]}
    assert rows["top-2"]["copies"]["hits"] == 6
    assert rows["top-2"]["pixel_copies"]["hits"] == 6
    assert rows["held_out"]["copies"]["hits"] == 0  # nearest is the held-out original itself, which is no training row
    groups = [record["group"] for record in Folder(run.run_dir).read_json("eval/rows/top-2.json")]
    assert rows["shuffled"]["right"]["share"] == pytest.approx(sum(a == b for a in groups for b in groups) / 36)
    assert rows["top-2"]["experts_per_step"] == 1.0
    assert rows["swapped"]["right"]["of"] == 6
    assert rows["blind"]["experts_per_step"] == 2.0
    asked = [body["routing"] for body in server.requests]
    assert {name: asked.count(name) for name in set(asked)} == {
        "top-2": 8,
        "expert-0": 2,
        "expert-1": 2,
        "expert-2": 2,
        "top-1": 6,
        "full": 6,
        "caption": 6,
    }
    assert {one["cluster"]: one["right"]["of"] for one in table["by_cluster"]} == {0: 2, 1: 2, 2: 2}
    assert set(table["router"]["accuracy"]) == {"pooled", "none"}
    assert table["router"]["rows"] == 6
    # Cluster 0 has seven training rows, more than the others; of the rows judged it has only 9-blue.
    assert table["router"]["prior"]["share"] == pytest.approx(1 / 6)
    assert len(table["router"]["accuracy"]["pooled"]) == len(table["router"]["t"]) == 6
    manifest = Folder(run.run_dir).read_json("eval/_manifest.json")
    assert manifest["counts"]["retrieval_top2"] == 1.0
    assert Folder(run.run_dir).read_json("events/evaluate.json")["state"] == "done"
    assert "| top-2: the deployed model | HTTP | 100% (6 of 6) |" in markdown(table)


def test_what_the_codec_changes_does_not_hide_a_copy(run):
    corpus = protocol.read_corpus(run)
    questions = protocol.trained_captions(run, corpus)
    pictures = fabricated.decode(corpus.latents([one.row for one in questions]))
    # Originals whose embeddings all lie in one direction from those of their decoded latents.
    moved = np.asarray(corpus.embeddings, np.float32) + np.linspace(10, 20, fabricated.WIDTH)
    corpus = dataclasses.replace(corpus, embeddings=moved.astype(np.float16))
    records = protocol.judge(corpus, questions, pictures, ["a.png"] * 6, [None] * 6, fabricated.decode, fabricated.Embedder())
    assert all(record.nearest == record.id and record.distance > corpus.copy_bound for record in records)
    assert all(record.copy and record.copy_distance < 1e-6 for record in records)


def test_pictures_of_another_group_are_wrong_and_nothing_else_is(run):
    corpus = protocol.read_corpus(run)
    wrong = {protocol.trained_captions(run, corpus)[0].group, "g8"}
    rows = by_key(evaluate(run, endpoint(fabricated.Server(wrong=wrong))))
    expected = sum(one.group not in wrong for one in protocol.trained_captions(run, corpus))
    assert rows["top-2"]["right"]["hits"] == expected < 6
    assert rows["held_out"]["right"]["hits"] == 1
    records = Folder(run.run_dir).read_json("eval/rows/held_out.json")
    assert {record["id"]: record["right"] for record in records} == {"8-blue": False, "9-blue": True}
    assert all(record["ground"] for record in records)  # another thing, but on the right ground


def test_what_is_there_is_not_asked_again(run):
    class Broken(fabricated.Server):
        def handle(self, request):
            return super().handle(request) if len(self.requests) < 10 else fabricated.httpx.Response(500, text="out of memory")

    first = Broken()
    with pytest.raises(EndpointError, match="answered 500: out of memory"):
        evaluate(run, endpoint(first))
    assert Folder(run.run_dir).read_json("events/evaluate.json")["state"] == "failed"
    second = fabricated.Server(busy=3)
    evaluate(run, endpoint(second))
    assert len(second.requests) == 6 * 5 + 2 - 10
    third = fabricated.Server()
    table = evaluate(run, endpoint(third))
    assert not third.requests
    assert by_key(table)["top-2"]["right"]["share"] == 1.0


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (fabricated.Server(fingerprint="other"), "serves 'tiny' with fingerprint other"),
        (fabricated.Server(degraded=[1]), r"answered without experts \[1\]"),
    ],
)
def test_an_answer_that_is_no_measurement_of_this_model_is_refused(run, server, message):
    with pytest.raises(EndpointError, match=message):
        evaluate(run, endpoint(server))


@pytest.mark.parametrize("url", [None, "", "127.0.0.1:8000", "file:///etc/passwd"])
def test_without_an_endpoint_the_message_says_what_to_do(run, url):
    with pytest.raises(EndpointError, match=r"--endpoint http://127\.0\.0\.1:8000"):
        evaluate(run, url)


def test_nobody_there(run):
    def refuse(request):
        raise fabricated.httpx.ConnectError("connection refused")

    with pytest.raises(EndpointError, match=r"does not answer .*is the model served there"):
        evaluate(run, Endpoint(URL, fabricated.httpx.MockTransport(refuse)))


def test_the_key_is_sent_and_its_lack_explained(monkeypatch):
    monkeypatch.setenv("PARIS_API_KEY", "k" * 8)
    seen = []

    def handle(request):
        seen.append(request.headers.get("authorization"))
        return fabricated.httpx.Response(401)

    with pytest.raises(EndpointError, match="PARIS_API_KEY"):
        Endpoint(URL, fabricated.httpx.MockTransport(handle)).model()
    assert seen == ["Bearer " + "k" * 8]


def test_another_model_makes_the_table_stale(run):
    evaluate(run, endpoint(fabricated.Server()))
    model = Folder(run.run_dir) / "model"
    manifest = json.loads(model.read_bytes("_manifest.json"))
    model.write_json("_manifest.json", {**manifest, "fingerprint": "0" * 32})
    with pytest.raises(StaleError, match=r"parents\.model"):
        evaluate(run, endpoint(fabricated.Server()))


def test_a_picture_without_its_answer_is_asked_for_again(tmp_path):
    server = fabricated.Server()
    folder = Folder(tmp_path)
    ask = Ask("pictures/a", {"prompt": "thing 4", "seed": 1, "routing": "top-2"})
    folder.write_json("pictures/a.json", {})  # cut off between the two files
    ask_all(endpoint(server), [ask], folder, lambda: None)
    ask_all(endpoint(server), [ask], folder, lambda: None)
    assert len(server.requests) == 1
    assert folder.read_json("pictures/a.json")["seed"] == 1


def test_exchanged_experts_answer_for_each_other():
    from paris_ray.diffusion.ensemble import ExpertCall
    from paris_ray.evaluation.in_process import Exchanged

    class Named:
        num_experts, versions = 3, {0: ("a",), 2: ("c",)}

        def available(self):
            return [True, False, True]

        def velocities(self, calls):
            return [call.expert for call in calls]

    exchanged = Exchanged(Named())
    assert exchanged.velocities([ExpertCall(k, None, None, None) for k in (0, 1, 2)]) == [1, 2, 0]
    assert exchanged.available() == [False, True, True]
    assert exchanged.versions == {2: ("a",), 1: ("c",)}
