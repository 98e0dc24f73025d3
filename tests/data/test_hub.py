"""The Hugging Face Hub, played by a server on this machine: online, cached, gone, and never there.

`huggingface_hub` reads its endpoint and its cache folder when it is imported, so each case is a process of its own.
"""

import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

import data_utils
from record.files import UserError

HERE = Path(data_utils.__file__).parent
COMMIT = "0123456789abcdef" * 2 + "01234567"
GEN = ("run.py", "gen", "12345", "--model", "gpt2", "--prompt", "The cat", "--max-new-tokens", "3", "--greedy")


class Hub(http.server.ThreadingHTTPServer):
    """The Hub's file endpoints over a folder: `<repository>/<file>` is served as `/<repository>/resolve/main/<file>`."""

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

    do_GET = do_HEAD = answer

    def revision(self) -> str:
        return COMMIT if f"/resolve/{COMMIT}/" in self.path else "main"

    def log_message(self, *_):
        pass


def python(*arguments: str, home: Path, endpoint: str, offline: bool = False):
    """Runs Python in the repository with a Hub and a cache of its own; also gives the seconds it took."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
            and not name.lower().endswith("_proxy")}
    env = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1",
                  "HF_HUB_OFFLINE": "1" if offline else "0"}
    began = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], cwd=HERE, env=env, capture_output=True, text=True, timeout=120)
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
print("choice", inputs.choose(None, None, None, print))
for model, data in (("gpt2", None), (None, "some/folder")):
    print("named", inputs.choose(model, None, data, print))
try:
    data_utils.load_task("cola")
except data_utils.UserError as error:
    print("error", error)
sys.exit(run.main(sys.argv[1:]))
"""


def test_without_a_hub_the_embedded_default_is_announced_and_nothing_named_is_replaced(tmp_path):
    done, seconds = python("-c", UNREACHABLE, *GEN[1:], home=tmp_path, endpoint=refusing_endpoint())
    lines = done.stdout.splitlines()
    assert lines[0].startswith("NOTICE: the Hugging Face Hub cannot be reached")
    assert lines[0].endswith("using the embedded --model tiny --task tiny instead")
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


GLUE = """
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
        done, _ = python("-c", f"DIGESTS = {digests}" + GLUE, home=tmp_path, endpoint=hub.endpoint)
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
task = data_utils.load_task("rotten_tomatoes")
print(len(task.train), {name: (len(split), split.sentences[1]) for name, split in task.dev.items()}, task.classes)
print(sorted(task.files))
try:
    data_utils.load_task("imdb")
except data_utils.UserError as error:
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
