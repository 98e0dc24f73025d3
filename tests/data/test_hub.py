"""The Hugging Face Hub, played by a server on this machine: online, cached, gone, and never there.

`huggingface_hub` reads its endpoint and its cache folder when it is imported, so each case is a process of its own.
"""

import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import warm

import data_utils
from data.glue import GLUE, glue_scores
from machine.errors import UserError

pytestmark = pytest.mark.slow
HERE = Path(data_utils.__file__).parent
COMMIT = "0123456789abcdef" * 2 + "01234567"
GEN = ("gen", "12345", "--model", "gpt2", "--prompt", "The cat", "--max-new-tokens", "3", "--greedy")


class Hub(http.server.ThreadingHTTPServer):
    """The Hub's file endpoints over a folder: `<repository>/<file>` is served as `/<repository>/resolve/main/<file>`.

    Of a data set also what `datasets` asks before: which commit it is of, and which files it has.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.downloads = folder, []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        repository, resolve, file = self.path.split("?")[0].lstrip("/").partition(f"/resolve/{self.revision()}/")
        path = self.server.folder / repository / file
        found = bool(resolve) and path.is_file()
        data = path.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        if found:
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET" and found:
            self.server.downloads.append(f"{repository}/{file}")
            self.wfile.write(data)

    def about(self):
        """`/api/datasets/<repository>`, its `tree` of files, and its `paths-info` of files that are named."""
        path = unquote(self.path.split("?")[0]).removeprefix("/api/")
        repository, folder = "/".join(path.split("/")[:3]), self.server.folder / "/".join(path.split("/")[:3])
        sent = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        rest = path.removeprefix(repository).strip("/").split("/", 2)
        if not folder.is_dir():
            return self.send(404, b"", ("X-Error-Code", "RepoNotFound"))
        if rest[0] not in ("tree", "paths-info"):
            return self.send_json({"id": repository.removeprefix("datasets/"), "sha": COMMIT, "siblings": []})
        if rest[0] == "tree":
            below = folder / (rest[2] if len(rest) > 2 else "")
            found = sorted(below.rglob("*") if "recursive=true" in self.path.lower() else below.glob("*"))
        else:
            found = [folder / name for name in sent["paths"] if (folder / name).exists()]
        self.send_json([{"type": "directory" if file.is_dir() else "file", "path": str(file.relative_to(folder)),
                         "oid": hashlib.sha1(str(file).encode()).hexdigest(),
                         "size": 0 if file.is_dir() else file.stat().st_size} for file in found])

    def send_json(self, value):
        self.send(200, json.dumps(value).encode(), ("Content-Type", "application/json"))

    def send(self, status: int, data: bytes, *headers: tuple[str, str]):
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.about() if self.path.startswith("/api/datasets/") else self.answer()

    do_HEAD, do_POST = answer, about

    def revision(self) -> str:
        return COMMIT if f"/resolve/{COMMIT}/" in self.path else "main"

    def log_message(self, *_):
        pass


def python(*arguments: str, home: Path, endpoint: str, offline: bool = False, cwd: Path = HERE):
    """Runs run.py, or a program after -c, with a Hub and a cache of its own; also gives the seconds it took."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
            and not name.lower().endswith("_proxy")}
    env = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1",
                  "HF_HUB_OFFLINE": "1" if offline else "0"}
    began = time.monotonic()
    done = subprocess.run([*warm.command(hub=True), *arguments], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=300)
    return done, time.monotonic() - began


def refusing_endpoint() -> str:
    """An address on this machine at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def parquet(path: Path, rows: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"sentence": [f"Sentence {row}." for row in range(rows)], "label": [
        row % 2 for row in range(rows)], "idx": list(range(rows))}), path)
    return path


@pytest.fixture(scope="module")
def hub_folder(gpt2_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "gpt2").symlink_to(gpt2_folder)
    for split, rows in (("train", 20), ("validation", 1043)):
        parquet(folder / f"datasets/nyu-mll/glue/cola/{split}-00000-of-00001.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def downloaded(hub_folder, tmp_path_factory):
    """A cache that one run by name has filled: its folder, the run, what was fetched, and the address, now dead."""
    home = tmp_path_factory.mktemp("hf-home")
    with Hub(hub_folder) as hub:
        done, _ = python(*GEN, home=home, endpoint=hub.endpoint)
    return home, done, hub.downloads, hub.endpoint


def test_gpt2_by_name_is_fetched_from_the_hub_into_its_cache(downloaded, gpt2_folder):
    home, done, fetched, _ = downloaded
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The cat") and len(done.stdout) > len("The cat\n")
    assert {"gpt2/config.json", "gpt2/model.safetensors", "gpt2/tokenizer.json"} <= set(fetched)
    assert len(fetched) == len(set(fetched))  # nothing twice
    weights = home / "hub/models--gpt2/snapshots" / COMMIT / "model.safetensors"
    assert weights.read_bytes() == (gpt2_folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "server gone"])
def test_a_cached_model_needs_no_hub(downloaded, offline):
    home, online, _, endpoint = downloaded
    done, seconds = python(*GEN, home=home, endpoint=endpoint, offline=offline)
    assert (done.returncode, done.stdout) == (0, online.stdout), done.stderr
    assert "retry" not in done.stderr.lower() and "Traceback" not in done.stderr
    assert seconds < 60  # left to its retries, the library takes a minute longer


UNREACHABLE = """
import sys
from experiments import inputs
import data_utils, run
from machine.errors import UserError
print("choice", inputs.choose(None, None, None, print))
for model, data in (("gpt2", None), (None, "some/folder")):
    print("named", inputs.choose(model, None, data, print))
try:
    data_utils.load_task("cola")
except UserError as error:
    print("error", error)
sys.exit(run.main(sys.argv[1:]))
"""


def test_without_a_hub_the_built_in_default_is_announced_and_nothing_named_is_replaced(tmp_path):
    done, seconds = python("-c", UNREACHABLE, *GEN, home=tmp_path, endpoint=refusing_endpoint())
    lines = done.stdout.splitlines()
    assert lines[0].startswith("NOTICE: the Hugging Face Hub cannot be reached")
    assert lines[0].endswith("using the built-in --model tiny --task tiny instead")
    assert lines[1:4] == ["choice ('tiny', 'tiny', None)", "named ('gpt2', 'cola', None)",
                          "named ('gpt2', 'cola', 'some/folder')"]
    assert lines[4].startswith("error --task cola: nyu-mll/glue is not cached and the Hugging Face Hub cannot be reached")
    assert "give --data DIR with in_domain_train.tsv, in_domain_dev.tsv, out_of_domain_dev.tsv" in lines[4]
    assert len(lines) == 5
    # The command itself, with gpt2 asked for by name: one line that says how to get it.
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("run.py: --model gpt2: not a local folder, not cached")
    assert "connect and try again, pass a local folder, or use --model tiny" in done.stderr
    assert seconds < 60


GLUE_COLA = """
from experiments import inputs
import data_utils
task = data_utils.load_task("cola")
print(len(task.train), {name: (len(split), split.sentences[0]) for name, split in task.dev.items()})
print(task.files == {f"nyu-mll/glue/cola/{s}-00000-of-00001.parquet": d for s, d in zip(("train", "validation"), DIGESTS)})
print(inputs.choose(None, None, None, print))
"""


def test_cola_comes_from_the_hub_and_is_split_where_the_public_files_meet(hub_folder, tmp_path):
    digests = [hashlib.sha256((hub_folder / f"datasets/nyu-mll/glue/cola/{split}-00000-of-00001.parquet").read_bytes())
               .hexdigest() for split in ("train", "validation")]
    with Hub(hub_folder) as hub:
        done, _ = python("-c", f"DIGESTS = {digests}" + GLUE_COLA, home=tmp_path, endpoint=hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "20 {'in_domain': (527, 'Sentence 0.'), 'out_of_domain': (516, 'Sentence 527.')}", "True", "('gpt2', 'cola', None)"]


@pytest.mark.parametrize("rows", [1042, 1044, 527])
def test_a_glue_validation_set_of_another_size_is_refused(tmp_path, monkeypatch, rows):
    files = {"train": parquet(tmp_path / "train.parquet", 20), "validation": parquet(tmp_path / "validation.parquet", rows)}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda repository, file, **_: str(files[file.split("/")[1].split("-")[0]]))
    with pytest.raises(UserError, match=f"^nyu-mll/glue: {rows} validation rows; expected 1043, of which the first 527 are"):
        data_utils.load_task("cola")


REVIEWS = """
import data_utils
from machine.errors import UserError
task = data_utils.load_task("rotten_tomatoes")
print(len(task.train), {name: (len(split), split.sentences[1]) for name, split in task.dev.items()}, task.classes)
print(sorted(task.files))
try:
    data_utils.load_task("imdb")
except UserError as error:
    print("error", error)
"""


def test_reviews_come_from_the_hub_and_what_it_lacks_is_one_line(tmp_path):
    folder = tmp_path / "hub/datasets/cornell-movie-review-data/rotten_tomatoes"
    folder.mkdir(parents=True)
    for split, rows in (("train", 12), ("validation", 6)):
        table = pyarrow.table({"text": [f"{split} review {row}" for row in range(rows)], "label": [
            row % 2 for row in range(rows)]})
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    with Hub(tmp_path / "hub") as hub:
        done, _ = python("-c", REVIEWS, home=tmp_path / "home", endpoint=hub.endpoint)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "12 {'validation': (6, 'validation review 1')} ('0', '1')"
    repository = "cornell-movie-review-data/rotten_tomatoes"
    assert lines[1] == str([f"{repository}/{split}.parquet" for split in ("train", "validation")])
    assert lines[2].startswith("error --task imdb: stanfordnlp/imdb") and len(lines) == 3


GLUE_TASKS = """
import json
import data_utils
from data.glue import GLUE
for name in GLUE:
    task = data_utils.load_task(name, separator=" [SEP] ")
    print(json.dumps([name, task.problem, len(task.train), {split: [len(rows), rows.sentences[0], rows.labels[:2]]
                                                            for split, rows in task.dev.items()}, task.classes]))
"""
# Names of classes as the Hub's files have them; the score of STS-B is a number.
GLUE_CLASSES = {"sst2": ["negative", "positive"], "mrpc": ["not_equivalent", "equivalent"], "stsb": None,
                "qqp": ["not_duplicate", "duplicate"], "mnli": ["entailment", "neutral", "contradiction"],
                "qnli": ["entailment", "not_entailment"], "rte": ["entailment", "not_entailment"],
                "wnli": ["not_entailment", "entailment"]}


def test_glues_tasks_come_from_the_hub_with_their_columns_classes_and_splits(tmp_path):
    for name, classes in GLUE_CLASSES.items():
        task = GLUE[name]
        kind = datasets.Value("float32") if classes is None else datasets.ClassLabel(names=classes)
        features = datasets.Features({**{column: datasets.Value("string") for column in task.columns}, "label": kind})
        for split, file in task.files(name).items():
            path = tmp_path / "hub/datasets/nyu-mll/glue" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            labels = [row % len(classes) if classes else 0.5 + row for row in range(6)]
            datasets.Dataset.from_dict({**{column: [f"{split} {column} {row}" for row in range(6)]
                                           for column in task.columns}, "label": labels}, features=features).to_parquet(path)
    with Hub(tmp_path / "hub") as hub:
        done, _ = python("-c", GLUE_TASKS, home=tmp_path / "home", endpoint=hub.endpoint)
    assert done.returncode == 0, done.stderr
    found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == GLUE.keys() == GLUE_CLASSES.keys()
    assert all(task.positive in (GLUE_CLASSES[name] or []) for name, task in GLUE.items() if "f1" in task.metrics)
    for name, (problem, rows, dev, classes) in found.items():
        assert rows == 6 and list(dev) == list(GLUE[name].dev) and classes == sorted(GLUE_CLASSES[name] or ["label"])
        assert problem == ("regression" if name == "stsb" else "single-label")
        for split, (count, text, labels) in dev.items():
            assert count == 6 and text == " [SEP] ".join(f"{split} {column} 0" for column in GLUE[name].columns)
            expected = [0.5, 1.5] if name == "stsb" else [classes.index(one) for one in GLUE_CLASSES[name][:2]]
            assert labels == expected


def test_glues_scores_are_accuracy_f1_of_paraphrases_or_correlations():
    validation = {"validation": {"accuracy": 0.75, "mcc": 0.5, "pearson": 0.9, "spearman": 0.8}}
    by_class = {"validation": {"per_class": {"equivalent": {"f1": 0.6}, "not_equivalent": {"f1": 0.1}}}}
    assert glue_scores("mrpc", validation, by_class) == {"validation": {"accuracy": 0.75, "f1": 0.6}}
    assert glue_scores("qqp", validation, {"validation": {"per_class": {"0": {"f1": 0.1}, "1": {"f1": 0.2}}}}) == {
        "validation": {"accuracy": 0.75, "f1": 0.2}}
    assert glue_scores("rte", validation, by_class) == {"validation": {"accuracy": 0.75}}
    assert glue_scores("stsb", validation, {}) == {"validation": {"pearson": 0.9, "spearman": 0.8}}
    assert glue_scores("cola", validation, by_class) is None


# ---------------------------------------------------------------- data sets by name

SST2 = """
import json, os, sys, tempfile
from pathlib import Path
import data_utils
from machine.errors import UserError
from data import cache, tasks
from options.schema import TableOptions
for options in (TableOptions(), TableOptions(eval_split="0.5"), TableOptions(text_column=("sentence", "sentence"))):
    task = data_utils.load_task("csv", "stanfordnlp/sst2", options)
    print(json.dumps([len(task.train), {name: [len(split), split.sentences[1], split.labels[:2]] for name, split in
                                        task.dev.items()}, task.classes, task.files]))
whole = data_utils.load_task("csv", "stanfordnlp/sst2")
tasks.LARGE_ROWS = 10
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
print(json.dumps([data_utils.load_task("csv", "stanfordnlp/sst2") == whole for _ in range(2)] +
                 [len(list(cache.cache_folder().glob("rows-*/"))), list(whole.train.sentences)]))
for task, data, options in (("csv", "stanfordnlp/sst2", TableOptions(eval_split="test")),
                            ("csv", "stanfordnlp/sst2", TableOptions(eval_split="dev")),
                            ("csv", "stanfordnlp/sst2", TableOptions(text_column=("idx", "sentence"))),
                            ("csv", "stanfordnlp/sst2", TableOptions(label_column="sentiment")),
                            ("cola", "stanfordnlp/sst2", TableOptions()), ("csv", "nobody/nothing", TableOptions())):
    try:
        data_utils.load_task(task, data, options)
    except UserError as error:
        print("error", error)
"""


@pytest.fixture(scope="module")
def sst2(tmp_path_factory):
    """A Hub with a data set of three splits, of which the test split has no labels."""
    folder = tmp_path_factory.mktemp("sst2-hub")
    features = datasets.Features({"idx": datasets.Value("int32"), "sentence": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=["negative", "positive"])})
    # The training split stands in two files.
    for split, number, of, rows in (("train", 0, 2, range(12)), ("train", 1, 2, range(12, 20)),
                                    ("validation", 0, 1, range(8)), ("test", 0, 1, range(6))):
        path = folder / f"datasets/stanfordnlp/sst2/data/{split}-{number:05d}-of-{of:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(
            {"idx": list(rows), "sentence": [f"{split} sentence {row}." for row in rows],
             "label": [-1 if split == "test" else row % 2 for row in rows]}, features=features).to_parquet(path)
    return folder


@pytest.fixture(scope="module")
def sst2_home(sst2, tmp_path_factory):
    """A cache that one use of the data set has filled, and what was printed, fetched and where."""
    home = tmp_path_factory.mktemp("sst2-home")
    with Hub(sst2) as hub:
        done, _ = python("-c", SST2, home=home, endpoint=hub.endpoint)
    return home, done, hub.downloads, hub.endpoint


def test_a_data_set_by_name_has_the_columns_and_class_names_of_its_features(sst2_home):
    _, done, fetched, _ = sst2_home
    assert done.returncode == 0, done.stderr
    whole, half, joined, large, *errors = done.stdout.splitlines()
    train, dev, classes, files = json.loads(whole)
    assert (train, dev, classes) == (20, {"validation": [8, "validation sentence 1.", [0, 1]]}, ["negative", "positive"])
    assert list(files) == ["stanfordnlp/sst2/train", "stanfordnlp/sst2/validation"] and len(set(files.values())) == 2
    # As a large split, from the cache the second time, it is the same.
    assert json.loads(large) == [True, True, 1, [f"train sentence {row}." for row in range(20)]]
    assert json.loads(half)[:2][0] == 10 and json.loads(half)[1]["held_out"][0] == 10
    assert json.loads(joined)[1]["validation"][1] == "validation sentence 1. validation sentence 1."
    assert [error.partition("error ")[2].partition(";")[0] for error in errors[:3]] == [
        "stanfordnlp/sst2/test, row 1: the label (label) is missing",
        "--eval-split dev: --data stanfordnlp/sst2 has no such split",
        "stanfordnlp/sst2/train, row 1: the text (idx) is a number"]
    assert "has no column 'sentiment'" in errors[3] and "for --task csv" in errors[4]
    assert errors[5].startswith("error --data nobody/nothing: no such file or folder here, and as a data set of the")
    assert len(fetched) == len(set(fetched))  # nothing twice


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "server gone"])
def test_a_cached_data_set_needs_no_hub(sst2_home, offline):
    home, online, _, endpoint = sst2_home
    done, seconds = python("-c", SST2, home=home, endpoint=endpoint, offline=offline)
    assert done.returncode == 0 and done.stdout.splitlines()[:-1] == online.stdout.splitlines()[:-1], done.stderr
    assert "it is not cached, and the Hub cannot be reached" in done.stdout.splitlines()[-1]
    assert seconds < 60


RUNS = """
import os, sys
sys.path.insert(0, os.getcwd())
import run
lora = ["LoRA", "12345", "--model", sys.argv[1], "--epochs", "1", "--no-plots", "--out"]
os.chdir(sys.argv[2])
print("status", run.main([*lora, "hub", "--data", "stanfordnlp/sst2"]))
print("status", run.main([*lora, "none", "--data", "some/thing"]))
os.makedirs("stanfordnlp/sst2")
open("stanfordnlp/sst2/train.csv", "w").write("text,label\\n" + "a,x\\nb,y\\n" * 10)
print("status", run.main([*lora, "local", "--data", "stanfordnlp/sst2"]))
"""


def test_a_run_reads_a_data_set_by_name_and_a_local_path_wins(sst2, gpt2_folder, tmp_path):
    with Hub(sst2) as hub:
        done, _ = python("-c", RUNS, str(gpt2_folder), str(tmp_path), home=tmp_path / "home", endpoint=hub.endpoint)
    assert re.findall(r"status (\d)", done.stdout) == ["0", "2", "0"], done.stderr
    config = json.loads((tmp_path / "hub/config.json").read_text())
    assert (config["options"]["task"], config["options"]["data"]) == ("csv", "stanfordnlp/sst2")
    card = (tmp_path / "hub/README.md").read_text()
    assert "- stanfordnlp/sst2" in card and "`stanfordnlp/sst2/train`" in card and "(negative, positive)" in card
    assert "run.py: --data some/thing: no such file or folder here, and as a data set of the Hugging" in done.stderr
    assert not (tmp_path / "none").exists()
    assert json.loads((tmp_path / "local/config.json").read_text())["classes"] == ["x", "y"]


PAPER = """
import pathlib, sys
from experiments import compare
from report import build
import run
compare.RUN = pathlib.Path(sys.argv.pop(1))
build.build_paper = lambda folder, report, author="": report / "main.pdf"  # the project's own PDF is not to be written
sys.exit(run.main(sys.argv[1:]))
"""


def test_the_paper_is_gpt2_on_cola_where_the_hub_is_in_reach(hub_folder, tmp_path):
    words = ("paper", "12345", "--profile", "full", "--seeds", "1", "--only", "grid", "--out", str(tmp_path / "paper"))
    program = warm.program(tmp_path, hub=True)
    with Hub(hub_folder) as hub:
        done, _ = python("-c", PAPER, str(program), *words, home=tmp_path / "home", endpoint=hub.endpoint)
    assert done.returncode == 0, done.stderr
    grid = json.loads((tmp_path / "paper/grid/compare.json").read_text())
    assert (grid["model"], grid["task"], len(grid["runs"])) == ("gpt2", "cola", 2)
    assert all(name.startswith("nyu-mll/glue/cola/") for name in grid["data_files"]) and grid["entries"][0]["learning_rate"]
