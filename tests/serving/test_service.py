"""The service over real sockets: right answers under load, and what bad input, bad clients and SIGTERM do to it."""
import asyncio
import contextlib
import json
import re
import shutil
import threading
import time

import pytest
import toy
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from serving_runs import TEXTS, alone, call, check, classify, questions, raw, write_runs

from benchmarks import load
from experiments.serve import listen, load_served_student
from serving.bank import AdapterBank
from serving.connections import ConnectionLimits, Server
from serving.guard import Limits
from serving.service import create_app
from serving.worker import Worker


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def expected(runs):
    return alone(runs)


@contextlib.contextmanager
def running(app, limits=ConnectionLimits()):  # noqa: B008
    """The port of a server in a thread of its own."""
    bound = listen("127.0.0.1", 0)
    server = Server(app, limits)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        toy.until(lambda: server.started or not thread.is_alive(), 30)
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def make(runs, max_queue=1024, **limits):
    """A worker and the application around it."""
    adapters = {"cola": runs / "root" / "lora", "qv": runs / "root" / "qv"}
    worker = Worker(AdapterBank.of(adapters), {"small": load_served_student(runs / "distil")}, max_queue)
    return worker, create_app(worker, Limits(adapters_root=runs / "root", **limits))


@pytest.fixture(scope="module")
def app(runs):
    return make(runs)[1]


@pytest.fixture(scope="module")
def port(app):
    with running(app) as port:
        yield port


# ---------------------------------------------------------------- answers

def test_adapters_and_students_answer_as_they_do_alone(port, expected):
    for name in ("cola", "qv", "small"):
        question = {"adapter": name, "texts": TEXTS}
        check(question, load.Answer(*classify(port, **question), 0.0), expected)
    question = {"student": "small", "texts": TEXTS[:1]}
    check(question, load.Answer(*classify(port, **question), 0.0), expected)
    assert expected["cola", TEXTS[0]]["probabilities"] != pytest.approx(expected["qv", TEXTS[0]]["probabilities"], abs=1e-3)


def metrics(port: int) -> dict[str, float]:
    families = text_string_to_metric_families(call(port, "GET", "/metrics")[1].decode())
    return {sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
            for family in families for sample in family.samples}


def test_many_clients_share_batches_and_each_gets_its_own_answer(port, expected):
    before, asked = metrics(port), questions(400, ("cola", "qv", "small"))
    for question, answer in zip(asked, asyncio.run(load.ask(port, asked, 32)), strict=True):
        check(question, answer, expected)
    after = metrics(port)
    assert after["requests_total /v1/classify 200"] - before.get("requests_total /v1/classify 200", 0) == 400
    assert after["batch_texts_count"] - before["batch_texts_count"] < 200  # so they were batched
    assert after["batch_texts_sum"] - before["batch_texts_sum"] == sum(len(q["texts"]) for q in asked)
    assert after["queue_texts"] == 0 and after["adapters"] == 2


def test_adapters_come_and_go_under_load(port, expected):
    """Requests for the one that comes and goes are answered right or are told that it is unknown; while there, right."""
    asked, there = questions(300, ("cola", "new", "qv")), questions(1, ("new",))[0]

    async def both():
        client, changes, between = load.Client(port), [], []
        answers = asyncio.create_task(load.ask(port, asked, 16))
        while not answers.done():
            changes.append(await client.call("POST", "/v1/adapters", {"name": "new", "folder": "qv"}))
            between.append(await client.call("POST", "/v1/classify", there))
            changes.append(await client.call("DELETE", "/v1/adapters/new"))
        client.close()
        return await answers, [change.status for change in changes], between
    answers, changes, between = asyncio.run(both())
    assert set(changes[::2]) == {201} and set(changes[1::2]) == {200}
    for question, answer in zip(asked, answers, strict=True):
        if question["adapter"] == "new" and answer.status == 404:
            assert answer.body["error"].startswith("unknown adapter 'new'; expected one of cola, qv")
        else:
            check(question, answer, expected)
    for answer in between:
        check(there, answer, expected)


def test_what_is_served_is_listed(port):
    listed = call(port, "GET", "/v1/adapters")[1]
    assert [(a["name"], a["task"], a["classes"]) for a in listed["adapters"]] == [
        ("cola", "cola", ["0", "1"]), ("qv", "cola", ["0", "1"])]
    assert [(s["name"], s["teacher"]) for s in listed["students"]] == [("small", "cola")]
    assert call(port, "GET", "/healthz")[:2] == (200, {"status": "ok"})


# ---------------------------------------------------------------- bad input

LONG = "the cat " * 3000
BAD = [({"adapter": "nobody", "texts": ["x"]}, 404, "unknown adapter 'nobody'; expected one of cola, qv, small"),
       ({"student": "cola", "texts": ["x"]}, 404, "unknown student 'cola'; expected one of small"),
       ({"texts": ["x"]}, 422, "expected either adapter or student"),
       ({"adapter": "cola", "student": "small", "texts": ["x"]}, 422, "expected either adapter or student"),
       ({"adapter": "cola"}, 422, "texts: Field required"),
       ({"adapter": "cola", "texts": []}, 422, "texts: List should have"),
       ({"adapter": "cola", "texts": ["x", " \n"]}, 422, "texts.1: the text is empty"),
       ({"adapter": "cola", "texts": ["x", 3]}, 422, "texts.1: Input should be a valid string"),
       ({"adapter": "cola", "texts": "x"}, 422, "texts: Input should be a valid list"),
       ({"adapter": "cola", "texts": ["x"], "more": 1}, 422, "more: Extra inputs are not permitted"),
       ({"adapter": "cola", "texts": ["\ud800"]}, 422, "texts.0: the text is no valid Unicode"),
       ({"adapter": "\ud800", "texts": ["x"]}, 404, "unknown adapter"),
       ({"adapter": "cola", "texts": [LONG]}, 413, "24,000 "),
       ({"adapter": "cola", "texts": ["x"] * 257}, 413, "257 texts; expected at most 256"), ([], 422, "the body: "),
       (b"{", 400, "not JSON"), (b"", 422, "the body: "), (b"[" * 100000, 400, ""),
       (b"\xff\xfe", 400, ""), (b"9" * 5000, 400, ""),
       (b'{"adapter": "cola", "texts": [NaN]}', 422, "texts.0"), (b" " * (2 << 20), 413, "larger than 1,048,576 bytes")]


@pytest.mark.parametrize("body, status, says", BAD)
def test_bad_requests_are_told_what_is_wrong(port, expected, body, status, says):
    got, answer, _ = call(port, "POST", "/v1/classify", body)
    assert got == status and says in answer["error"] and set(answer) == {"error"} and len(answer["error"]) <= 1000
    assert classify(port, adapter="cola", texts=TEXTS[:1])[0] == 200


@pytest.mark.parametrize("body, status, says", [
    ({"name": "cola", "folder": "qv"}, 409, "the name is taken"),
    ({"name": "small", "folder": "qv"}, 409, "the name is taken"),
    ({"name": "x", "folder": "../distil"}, 403, "outside"), ({"name": "x", "folder": "/etc"}, 403, "outside"),
    ({"name": "x", "folder": "out"}, 403, "outside"), ({"name": "x", "folder": "nowhere"}, 404, "no such folder"),
    ({"name": "x", "folder": "\0"}, 404, "no such folder"), ({"name": "x", "folder": "a" * 5000}, 404, "no such folder"),
    ({"name": "x", "folder": "."}, 400, "not a run's folder"),
    ({"name": "x", "folder": "stranger"}, 400, "for another base"),
    ({"name": "x", "folder": "damaged"}, 400, "damaged"),
    ({"name": "x/y", "folder": "qv"}, 422, "name: String should match"),
    ({"name": "x", "folder": "targets"}, 400, "for another base: transformer.h.0.attn.c_nowhere does not exist")])
def test_what_cannot_be_added_is_refused(port, runs, body, status, says):
    root = runs / "root"
    if not (root / "out").exists():
        (root / "out").symlink_to(runs / "distil")
        for name in ("damaged", "targets"):
            shutil.copytree(root / "qv", root / name)
        (root / "damaged" / "adapter_model.safetensors").write_bytes(b"x")
        weights = root / "targets" / "adapter_model.safetensors"
        save_file({name.replace(".c_attn.", ".c_nowhere."): tensor for name, tensor in load_file(weights).items()}, weights)
        toy.reseal(root / "targets")
    got, answer, _ = call(port, "POST", "/v1/adapters", body)
    assert (got, says in answer["error"]) == (status, True), answer
    assert [a["name"] for a in call(port, "GET", "/v1/adapters")[1]["adapters"]] == ["cola", "qv"]


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/adapters"])
@pytest.mark.parametrize("given, says", [
    (None, "is missing"), ("text/plain", "is 'text/plain'"), ("", "is ''"), ("json", "is 'json'"),
    ("application/x-www-form-urlencoded", "is 'application/x-www-form-urlencoded'"),
    ("multipart/form-data; boundary=x", "is 'multipart/form-data; boundary=x'"),
    ("application/jsonp", "is 'application/jsonp'"),
    ("x" * 5000, f"is '{'x' * 80}'")])
def test_a_content_type_that_is_not_json_is_named(port, path, given, says):
    got, answer, _ = call(port, "POST", path, {"adapter": "cola", "texts": ["x"]},
                          {} if given is None else {"content-type": given})
    assert (got, answer) == (415, {"error": f"the header Content-Type {says}; expected application/json"})


@pytest.mark.parametrize("given", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON",
                                   "application/vnd.api+json"])
def test_any_content_type_of_json_is_read(port, given):
    body = json.dumps({"adapter": "cola", "texts": ["the cat"]}).encode()
    assert call(port, "POST", "/v1/classify", body, {"content-type": given})[0] == 200


@pytest.mark.parametrize("method, path, body", [
    ("POST", "/v1/adapters", {"name": "rebound", "folder": "qv"}), ("DELETE", "/v1/adapters/qv", None),
    ("POST", "/v1/classify", {"adapter": "cola", "texts": ["x"]}), ("GET", "/v1/adapters", None), ("GET", "/", None),
    ("GET", "/metrics", None), ("GET", "/nowhere", None)])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "192.168.1.7", "localhost.evil.example", ""])
def test_a_request_to_a_foreign_host_name_changes_and_tells_nothing(port, method, path, body, host):
    got, answer, headers = call(port, method, path, body, {"content-type": "application/json", "host": host})
    assert got == 400 and set(answer) == {"error"} and f"the Host header names {host!r}" in answer["error"]
    assert headers["x-content-type-options"] == "nosniff"
    assert [a["name"] for a in call(port, "GET", "/v1/adapters")[1]["adapters"]] == ["cola", "qv"]


@pytest.mark.filterwarnings("ignore:.*were truncated")
def test_an_answer_says_which_texts_were_cut(port):
    texts = ["the cat", "the cat saw a dog " * 40, "a dog", "red bird " * 400]  # 64 tokens at most
    for name in ("cola", "qv", "small"):
        status, answer = classify(port, adapter=name, texts=texts)
        assert status == 200
        assert [result.get("truncated") for result in answer["results"]] == [None, True, None, True]
        assert all(("truncated" in result) == (result.get("truncated") is True) for result in answer["results"])


def series(port: int) -> set[str]:
    """The series of metrics, but for the histograms' own."""
    return {name for name in metrics(port) if "_bucket" not in name}


def test_series_of_metrics_do_not_grow_with_words_of_clients(port):
    def ask(word: str) -> None:
        call(port, "GET", f"/{word}")
        call(port, "DELETE", f"/v1/adapters/{word}")
        call(port, "PUT", "/v1/classify")
        assert classify(port, adapter=word, texts=["x"])[0] == classify(port, student=word, texts=["x"])[0] == 404
        assert call(port, "POST", "/v1/adapters", {"name": word, "folder": "qv"})[0] == 201
        assert classify(port, adapter=word, texts=["x"])[0] == 200
        assert f"texts_total adapter {word}" in metrics(port)
        assert call(port, "DELETE", f"/v1/adapters/{word}")[0] == 200
        call(port, "GET", "/v1/adapters", None, {"host": f"{word}.example"})
    ask("word")
    before = series(port)
    for number in range(8):
        ask(f"word{number}")
    assert series(port) == before and not any("word" in name for name in before)


def test_a_request_that_is_answered_after_its_adapter_is_gone_makes_no_series(runs, monkeypatch):
    worker, app = make(runs)
    go, slow = threading.Event(), worker.bank.classify
    monkeypatch.setattr(worker.bank, "classify", lambda rows: (go.wait(20), slow(rows))[1])
    with running(app) as port:
        asked = threading.Thread(target=classify, args=(port,), kwargs={"adapter": "qv", "texts": ["x"]})
        asked.start()
        toy.until(lambda: worker.waiting == 1, 10)
        removed = threading.Thread(target=call, args=(port, "DELETE", "/v1/adapters/qv"))
        removed.start()
        toy.until(lambda: worker.waiting == 2, 10)
        go.set()
        asked.join(20)
        removed.join(20)
        assert classify(port, adapter="cola", texts=["x"])[0] == 200
        assert [name for name in series(port) if name.startswith("texts_total")] == ["texts_total adapter cola"]


def test_no_more_adapters_than_the_limit(runs):
    _, app = make(runs, adapters=3)
    with running(app) as port:
        assert call(port, "POST", "/v1/adapters", {"name": "third", "folder": "qv"})[0] == 201
        got, answer, _ = call(port, "POST", "/v1/adapters", {"name": "fourth", "folder": "qv"})
        assert got == 409 and answer["error"].startswith("3 adapters are loaded")
        assert call(port, "DELETE", "/v1/adapters/third")[0] == 200
        assert call(port, "POST", "/v1/adapters", {"name": "fourth", "folder": "qv"})[0] == 201


def test_unknown_paths_and_methods_are_json_too(port):
    assert call(port, "GET", "/nowhere")[0] == 404 and call(port, "PUT", "/v1/classify", {})[0] == 405
    assert "error" in call(port, "DELETE", "/v1/adapters/nobody")[1]


def test_a_service_without_a_root_adds_nothing(runs):
    worker = Worker(None, {"small": load_served_student(runs / "distil")})
    with running(create_app(worker, Limits())) as port:
        assert call(port, "POST", "/v1/adapters", {"name": "x", "folder": "qv"})[0] == 403
        assert call(port, "DELETE", "/v1/adapters/small")[0] == 404
        assert classify(port, adapter="small", texts=["x"])[0] == 200


def test_clients_that_go_away_or_never_end_disturb_nobody(runs, expected):
    _, app = make(runs, body_seconds=0.5)
    head = b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    body = json.dumps({"adapter": "cola", "texts": TEXTS}).encode()
    with running(app) as port:
        for _ in range(20):
            raw(port, head + b"content-length: %d\r\n\r\n" % len(body), body, read=False)
            raw(port, head + b"content-length: %d\r\n\r\n" % len(body), body[:9], read=False)
        start = time.monotonic()
        assert raw(port, head + b"content-length: 1000\r\n\r\n", b"{").startswith(b"HTTP/1.1 408")
        assert time.monotonic() - start < 5
        head, chunk = head + b"transfer-encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"
        assert raw(port, head, *[chunk] * 17, b"0\r\n\r\n").startswith(b"HTTP/1.1 413")
        assert raw(port, head, *[chunk] * 130).startswith(b"HTTP/1.1 413")  # without an end
        assert raw(port, b"\x16\x03\x01 no http\r\n\r\n").startswith(b"HTTP/1.1 400")
        check({"adapter": "cola", "texts": TEXTS}, load.Answer(*classify(port, adapter="cola", texts=TEXTS), 0.0), expected)


def test_a_full_queue_and_a_slow_answer_are_told(runs, monkeypatch):
    worker, app = make(runs, max_queue=10, seconds=1.0)
    go, slow = threading.Event(), worker.bank.classify
    monkeypatch.setattr(worker.bank, "classify", lambda rows: (go.wait(20), slow(rows))[1])
    with running(app) as port:
        async def statuses() -> list[int]:
            asked = [{"adapter": "cola", "texts": TEXTS[:4]}] * 4
            return [answer.status for answer in await load.ask(port, asked, 4)]
        assert asyncio.run(statuses()).count(504) == 2  # eight texts wait and get no answer in time ...
        answered = asyncio.run(statuses())
        assert answered.count(429) == 2 and answered.count(504) == 2  # ... and there is no room for four more
        go.set()
        assert classify(port, adapter="cola", texts=TEXTS[:4])[0] == 200
        assert worker.waiting == 0
        assert classify(port, adapter="cola", texts=TEXTS[:11]) == (
            413, {"error": "11 texts; expected at most 10 in a request"})  # which no wait would help


def test_a_failure_of_one_request_leaves_the_others_of_its_batch(runs, monkeypatch):
    worker, app = make(runs)
    whole = worker.bank.classify

    def failing(rows):
        if any(text == "fail" for _, text in rows):
            raise RuntimeError("out of memory")
        return whole(rows)
    monkeypatch.setattr(worker.bank, "classify", failing)
    with running(app) as port:
        asked = [{"adapter": "cola", "texts": ["fail" if i == 5 else TEXTS[i]]} for i in range(12)]
        answers = asyncio.run(load.ask(port, asked, 12))
    assert [answer.status for answer in answers] == [500 if i == 5 else 200 for i in range(12)]
    assert answers[5].body == {"error": "the service failed (RuntimeError)"}


def test_any_body_that_the_schema_allows_or_does_not(app, port):
    """A few hundred; benchmarks/fuzz_service.py sends them in thousands."""
    from benchmarks import fuzz_service

    result = fuzz_service.fuzz(f"http://127.0.0.1:{port}", cases=30)
    assert result["failed"] == [] and result["tried"] >= 150 and result["classified"] >= 5
    assert {a["name"] for a in call(port, "GET", "/v1/adapters")[1]["adapters"]} >= {"cola", "qv"}


def test_slow_connections_of_every_kind_keep_nobody_out(runs):
    """A few dozen; benchmarks/fuzz_service.py holds hundreds."""
    from benchmarks import fuzz_service

    _, app = make(runs, body_seconds=2.0)
    with running(app, ConnectionLimits(connections=30, header_seconds=2.0, answer_seconds=2.0)) as port:
        result = fuzz_service.hold(f"http://127.0.0.1:{port}", connections=60, seconds=30)
    # The connections, and at least one question of each kind while they were held.
    assert result["failed"] == [] and result["tried"] >= 62


def test_slow_connections_are_for_this_machine_alone():
    from benchmarks import fuzz_service

    with pytest.raises(SystemExit, match="http://192.0.2.1: slow connections are for a service on this machine"):
        fuzz_service.hold("http://192.0.2.1", 1, 1)


# ---------------------------------------------------------------- the page

def test_the_page_loads_nothing_from_elsewhere(port):
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/style.css", "text/css"),
                       ("/favicon.svg", "image/svg+xml")):
        status, content, headers = call(port, "GET", path)
        assert status == 200 and headers.get_content_type() == kind
        content = content.replace(b'xmlns="http://www.w3.org/2000/svg"', b"")  # a name, never loaded
        assert not re.search(rb"https?:|//[a-z]|url\(|@import|<script(?! src=)|style=|\son\w+=", content)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy and "*" not in policy
