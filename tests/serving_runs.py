"""Runs that the service's tests serve, and the answers of each model alone."""
import http.client
import json
import random
import socket
from pathlib import Path

import pytest
import toy

from benchmarks import load
from experiments import predict
from report import figures

TEXTS = [text for text, _ in toy.toy_rows(30, 7)]


def write_runs(folder: Path) -> Path:
    """Two LoRA runs and a distillation on one base, and a run on another base, below one folder."""
    toy.write_cola(folder / "cola")
    small = ("--plots", folder / "plots", "--epochs", 2, "--batch-size", 8, "--lr", 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_run", lambda *_: [])
        for name, model, more in (("lora", "model", ()), ("qv", "model", ("--rank", 3, "--targets", "q,v")),
                                  ("stranger", "other", ())):
            toy.write_model(folder / model, seed=int(model == "other"))
            assert toy.main("LoRA", "12345", "--model", folder / model, "--data", folder / "cola", "--out",
                            folder / "root" / name, *small, *more) == 0
        assert toy.main("distil", "12345", "--plain", "--teacher", folder / "root" / "lora", "--out", folder / "distil",
                        *small,
                        "--embedding-size", 6, "--hidden-size", 5) == 0
    return folder


def alone(runs: Path) -> dict[tuple[str, str], dict]:
    """By model and text, what each model alone says."""
    folders = {"cola": "root/lora", "qv": "root/qv", "small": "distil", "new": "root/qv"}
    return {(name, text): result for name, folder in folders.items()
            for text, result in zip(TEXTS, predict.predict_texts(predict.RunPredictor(runs / folder), TEXTS), strict=True)}


def call(port: int, method: str, path: str, body=None, headers=None) -> tuple[int, dict | bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    content = body if isinstance(body, bytes | None) else json.dumps(body)
    connection.request(method, path, content, {"content-type": "application/json"} if headers is None else headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(content) if is_json else content, response.headers


def classify(port: int, **body) -> tuple[int, dict]:
    return call(port, "POST", "/v1/classify", body)[:2]


def check(question: dict, answer: load.Answer, expected) -> None:
    """The answer is that of the model alone."""
    assert answer.status == 200, answer
    (kind, name), = [(key, question[key]) for key in ("adapter", "student") if key in question]
    assert set(answer.body) == {kind, "results"} and answer.body[kind] == name
    assert len(answer.body["results"]) == len(question["texts"])
    for text, result in zip(question["texts"], answer.body["results"], strict=True):
        alone = expected[name, text]
        # CoLA's classes have names next to the numbers of the files.
        assert result.get("name") == alone.get("name")
        assert set(result) - {"name"} == {"label", "probability", "probabilities"}
        assert result["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)
        assert result["probability"] == max(result["probabilities"].values()) == result["probabilities"][result["label"]]


def questions(count: int, names: tuple[str, ...], seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    return [{"adapter": draw.choice(names), "texts": draw.sample(TEXTS, draw.choice((1, 1, 1, 2, 5)))} for _ in range(count)]


def raw(port: int, *pieces: bytes, read: bool = True) -> bytes:
    """What a server answers to bytes."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            return connection.recv(4096) if read else b""
        except ConnectionError:  # it closed before everything was sent
            return connection.recv(4096)
