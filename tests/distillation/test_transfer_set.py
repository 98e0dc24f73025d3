"""The transfer set and its cache: files made together are made once; a teacher's targets, and their order."""
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import filelock
import pytest
import torch
from conftest import PAD, adapted

from data_utils import Batch
from distillation import labels, writer
from distillation.batching import neighbour_batches
from distillation.cache import Cache
from distillation.labels import Labeller, as_labeller, hidden_states
from distillation.pca import Reduction
from distillation.sharing import share
from distillation.transfer_set import New
from distillation.writer import Writer
from machine.errors import UserError
from machine.signals import Interrupted
from model import lora_layers
from options.schema import DistilOptions


def labeller_of(folder, teacher, monkeypatch) -> Labeller:
    """Returns a teacher with its cache in a folder; the first four dimensions are the principal components."""
    scores = teacher.net.config.num_labels * teacher.decoder
    monkeypatch.setattr(Labeller, "components", lambda *_: (
        Reduction(torch.zeros(32), torch.eye(32)[:, :4], torch.ones(4)), torch.ones(scores)))
    return Labeller(Cache(folder, lambda: None), teacher, "key", SimpleNamespace(pad_token_id=PAD), [],
                    DistilOptions(folder, match_size=4))


def ids_of(count: int) -> list[list[int]]:
    """Returns token ids of sentences of different lengths, of which some begin alike."""
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 90, (2 + row % 7,), generator=rng).tolist() for row in range(count)]
    return [[*rows[row // 3 * 3][:3], *ids] if row % 3 else ids for row, ids in enumerate(rows)]


def test_several_processes_make_each_file_once_and_all_of_them_get_every_file(tmp_path):
    """Locks of files exclude threads as they do processes, for each lock opens the file anew."""
    wanted, made = [tmp_path / f"{number}.json" for number in range(20)], []

    def make(path) -> None:
        made.append(path)
        time.sleep(0.01)
        path.write_text("{}")

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(share, dict.fromkeys(wanted, 1), make, lambda: None) for _ in range(3)]:
            done.result()
    assert sorted(made) == sorted(wanted)
    assert sorted(tmp_path.iterdir()) == sorted(wanted)


def test_a_stop_ends_the_wait_for_another_process(tmp_path):
    def check_stop() -> None:
        raise Interrupted(15)

    with filelock.FileLock(tmp_path / "one.lock"), pytest.raises(Interrupted):
        share({tmp_path / "one": 1}, pytest.fail, check_stop)


def test_threads_make_files_at_a_time_with_one_core_each(tmp_path):
    """The first two meet in `make`: neither goes on alone."""
    wanted, made = [tmp_path / f"{number}" for number in range(20)], []
    both, calls, before = threading.Barrier(2), itertools.count(), torch.get_num_threads()

    def make(path) -> None:
        if next(calls) < 2:
            both.wait(timeout=20)
        made.append((path, torch.get_num_threads()))
        path.write_text("")

    torch.set_num_threads(3)
    try:
        share(dict.fromkeys(wanted, 1), make, lambda: None, threads=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert sorted(made) == [(path, 1) for path in sorted(wanted)] and sorted(tmp_path.iterdir()) == sorted(wanted)


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_in_one_thread_ends_the_others_after_their_files(tmp_path, bad):
    wanted = [tmp_path / f"{number}" for number in range(1000)]

    def make(path) -> None:
        time.sleep(0.01)
        if path == wanted[bad]:
            raise UserError("disk full")
        path.write_text("")

    with pytest.raises(UserError, match="disk full"):
        share(dict.fromkeys(wanted, 1), make, lambda: None, threads=2)
    assert len(list(tmp_path.iterdir())) < 20


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_what_a_teacher_says_is_the_same_whatever_the_number_of_threads(tmp_path, monkeypatch, architecture):
    """Threads are at other sentences in the same model at the same time."""
    teacher, ids = adapted(architecture), ids_of(60)
    teacher.net.base_model.register_forward_pre_hook(lambda *_: time.sleep(0.002))
    monkeypatch.setattr(labels, "LABELLED", 3)
    found = []
    for number in (1, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        labeller = labeller_of(folder, teacher, monkeypatch)
        monkeypatch.setattr(labels, "cores", lambda number=number: number)
        logits, states = labeller.targets(ids, match=True)
        found.append((logits, states.of(torch.arange(60))))
    (logits, states), others = found
    torch.testing.assert_close(others[0], logits, atol=2e-6, rtol=2e-6)
    # Stored in float16: where another number of threads rounds a sum in another order, the last place may differ.
    torch.testing.assert_close(others[1], states, atol=2e-6, rtol=2 ** -10)
    assert logits.std(0).min() > 0.01 and states.std(0).min() > 0.01


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_each_sentence_has_what_the_library_says_of_it_in_the_order_given(tmp_path, monkeypatch, architecture):
    teacher, ids = adapted(architecture), ids_of(40)
    monkeypatch.setattr(labels, "LABELLED", 4)
    monkeypatch.setattr(labels, "SORTED", 12)
    monkeypatch.setattr(labels, "TOKENS", 24)
    labeller = labeller_of(tmp_path, teacher, monkeypatch)
    logits, states = labeller.targets(ids, match=True)
    assert len(states) == 40
    for row, one in enumerate(ids):
        with torch.no_grad():
            out = teacher.net(input_ids=torch.tensor([one]), output_hidden_states=True)
        torch.testing.assert_close(logits[row], out.logits[0].float(), atol=2e-5, rtol=1e-5)
        own = states.of(torch.tensor([row]))
        assert len(own) == len(one)
        torch.testing.assert_close(own[:, :4], out.hidden_states[-1][0, :, :4], atol=2e-3, rtol=2e-3)  # kept in float16


def test_labels_of_a_larger_set_are_taken_over_from_a_smaller_one(tmp_path, monkeypatch):
    teacher, ids, made = adapted("gpt2"), ids_of(40), []
    monkeypatch.setattr(labels, "LABELLED", 4)
    monkeypatch.setattr(labels, "SORTED", 12)
    labeller = labeller_of(tmp_path, teacher, monkeypatch)
    first, _ = labeller.targets(ids[:24], match=True)
    monkeypatch.setattr(Labeller, "compute", lambda self, chunk, *_, compute=Labeller.compute: (
        made.extend(chunk) or compute(self, chunk, *_)))
    assert labeller.targets(ids, match=True)[0][:24].equal(first)
    assert sorted(made) == sorted(ids[24:])


def test_tokens_with_the_same_beginning_are_computed_once():
    teacher, computed = adapted("llama"), []
    teacher.net.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True)
    (batch,) = neighbour_batches([[5, 6, 7], [5, 6, 8, 9], [5, 6, 7]], [0] * 3, [0, 1, 2], 100, SimpleNamespace(
        pad_token_id=PAD))
    assert len(hidden_states(teacher, batch)) == 10 and computed == [5]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_a_labeller_in_bfloat16_is_a_copy_near_its_teacher(architecture):
    teacher, ids = adapted(architecture), torch.randint(5, 90, (8, 9), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), torch.zeros(8, dtype=torch.int64)
    assert as_labeller(teacher, "teacher") is teacher
    labeller, before = as_labeller(teacher, "bf16"), {name: value.clone() for name, value in teacher.state_dict().items()}
    batch = Batch(ids, mask, labels, labels, 72)
    with torch.no_grad():
        exact, rounded = (torch.cat([one(ids, mask).flatten(), hidden_states(one, batch).flatten()])
                          for one in (teacher, labeller))
        for layer in lora_layers(teacher.net).values():
            layer.lora_B.zero_()
        alone = torch.cat([teacher(ids, mask).flatten(), hidden_states(teacher, batch).flatten()])
    distance, update = (exact - rounded).norm() / exact.norm(), (exact - alone).norm() / exact.norm()
    assert 0 < distance < 5 * 2**-8 < update  # a product rounds to eight bits, and two blocks follow each other
    assert all(layer.merged and layer.base.weight.dtype == torch.bfloat16 for layer in lora_layers(labeller.net).values())
    assert all(value.equal(before[name]) for name, value in teacher.state_dict().items() if "lora_B" not in name)


@pytest.mark.parametrize("least", [0, 5, 30])
def test_sentences_are_written_in_threads_as_many_as_will_be_taken(tmp_path, monkeypatch, least):
    made = []

    def sample(lm, tokenizer, count, length, seed, check_stop) -> list[str]:
        made.append((seed, torch.get_num_threads()))
        return [f"{seed} {number}" for number in range(count)]

    monkeypatch.setattr(writer, "sample_sentences", sample)
    monkeypatch.setattr(writer.speed, "samples_together", lambda lm: True)
    monkeypatch.setattr(writer, "cores", lambda: 2)
    monkeypatch.setattr(writer, "max_length_of", lambda lm: 512)
    source = Writer(Cache(tmp_path, lambda: None), "", None, ["a b c d e f g h i"], 4)
    monkeypatch.setattr(source, "language_model", lambda: "a language model")
    found = list(itertools.islice(source.written(least), 1))
    at_once = max(1, -(-least // 4))
    assert found == ["0 0"] and sorted(seed for seed, _ in made) == list(range(at_once))
    assert at_once == 1 or {threads for _, threads in made} == {1}
    more = list(itertools.islice(source.written(least), least + 9))
    assert more == [f"{number // 4} {number % 4}" for number in range(least + 9)]
    assert len(made) == len({seed for seed, _ in made}) == len(list(tmp_path.iterdir()))
    assert len(made) <= -(-(least + 9) // 4) + at_once // 16


def test_chunks_of_another_size_are_other_files(tmp_path, monkeypatch):
    """A chunk of early runs is never taken for one of today's, nor the other way round."""
    monkeypatch.setattr(writer, "sample_sentences", lambda lm, tokenizer, count, *_: [f"of {count}"] * count)
    monkeypatch.setattr(writer, "max_length_of", lambda lm: 512)
    monkeypatch.setattr(writer.speed, "samples_together", lambda lm: False)
    monkeypatch.setattr(Writer, "language_model", lambda self: "a language model")
    for _ in range(2):
        for size in writer.CHUNKS.values():
            source = Writer(Cache(tmp_path, lambda: None), "", None, ["a b c d e f g h i"], size)
            assert {*itertools.islice(source.written(0), size)} == {f"of {size}"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["written-00000.json", "written-512-00000.json"]


def test_a_transfer_set_is_read_back_as_it_was_written_unless_it_was_changed(tmp_path):
    cache = Cache(tmp_path, lambda: None)
    new = [New("plain", "The cat sat – here."), New("edit of others", "The cat here.", "The cat sat – here.")]
    assert cache.read_sentences("0" * 64) is None
    cache.write_sentences("0" * 64, new)
    cache.write_sentences("1" * 64, new[:1])
    assert cache.read_sentences("0" * 64) == new and cache.read_sentences("1" * 64) == new[:1]
    (path,) = tmp_path.glob("sentences-0*.tsv")
    path.write_text(path.read_text().replace("sat", "ran"))
    assert cache.read_sentences("0" * 64) is None and cache.read_sentences("1" * 64) == new[:1]
