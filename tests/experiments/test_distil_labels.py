"""The transfer set of a distillation in stages, its labels and their cache, several teachers, the student's vocabulary."""
from collections import Counter

import pytest
import torch
import toy
from conftest import toy_net
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_stages import SIZES, distil, first_table, new_sentences
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_utils
from data_utils import load_task
from distillation import labels, recipe, sentences, sources
from distillation.labels import Labeller
from distillation.transfer_set import letters_and_digits
from distillation.writer import Writer
from experiments import evaluate
from record.files import read_json


def test_the_transfer_set_has_no_duplicate_and_no_sentence_of_the_task(work, staged):
    names, sentences = zip(*new_sentences(staged), strict=True)
    task = load_task("cola", work / "cola")
    known = {letters_and_digits(one) for split in (task.train, *task.dev.values()) for one in split.sentences}
    found = [letters_and_digits(one) for one in sentences]
    assert len(found) == len(set(found)) == 40 and not known.intersection(found)
    assert set(names) == {"edit of training", "plain", "edit of others", "written"}


def test_no_development_sentence_that_limit_left_out_comes_into_the_transfer_set(work, tmp_path):
    """With two rows of each split the run reads few development sentences; the text has all of them."""
    task = load_task("cola", work / "cola")
    dev = [sentence for split in task.dev.values() for sentence in split.sentences]
    new = [f"A brand new sentence of number {number}" for number in range(9)]
    limited = task.limit(4)
    assert not set(dev) <= {one for split in limited.dev.values() for one in split.sentences}
    known = sources.known_sentences(limited)
    assert known >= {letters_and_digits(one) for one in dev}
    assert set(sources.plain_sentences([*dev, *new], known, 20)) == set(new)
    # A task that is limited twice still knows them.
    assert sources.known_sentences(task.limit(8).limit(4)) >= {letters_and_digits(one) for one in dev}


def test_sentences_are_the_same_but_for_case_and_punctuation():
    one, same, other = map(letters_and_digits, ("The cat, it seems, Sat!", "the cat it seems sat.", "the cat sat"))
    assert one == same != other


def test_a_second_run_computes_no_sentence_again(work, staged, monkeypatch):
    for owner, name in ((Labeller, "compute"), (Writer, "language_model"), (sources, "transfer_set")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("computed again"))
    assert distil(work, staged / "again") == 0
    first, second = (toy.tree(staged / name) for name in ("run", "again"))
    assert first["student.safetensors"] == second["student.safetensors"]


def test_without_matching_a_student_takes_the_logits_that_came_with_hidden_states(work, staged, tmp_path, monkeypatch):
    assert distil(work, tmp_path / "alone", "--match", "none") == 0
    monkeypatch.setattr(Labeller, "compute", lambda *_: pytest.fail("computed again"))
    assert distil(work, staged / "beside", "--match", "none") == 0
    one, other = toy.tree(tmp_path / "alone"), toy.tree(staged / "beside")
    assert one["student.safetensors"] == other["student.safetensors"]


def test_a_smaller_set_is_the_beginning_of_a_larger_one(work, staged, monkeypatch):
    drawn, make = [], sentences.make_transfer_set
    monkeypatch.setattr(sentences, "make_transfer_set", lambda inputs, cache, count, version: drawn.append(
        (make(inputs, cache, count // 2, version), make(inputs, cache, count, version))) or drawn[0][1])
    assert distil(work, staged / "half") == 0
    assert drawn[0][0] == drawn[0][1][:20]


@pytest.mark.parametrize(("fast", "words", "precision"), [
    (True, (), "bf16"), (False, (), "teacher"), (True, ("--label-precision", "teacher"), "teacher")])
def test_a_teacher_labels_in_bfloat16_where_that_is_fast_or_as_it_is_told(work, staged, monkeypatch, fast, words, precision):
    asked, as_labeller = [], labels.as_labeller
    monkeypatch.setattr("experiments.distil_inputs.bf16_is_fast", lambda: fast)
    monkeypatch.setattr(labels, "as_labeller", lambda *args: asked.append(args[1]) or as_labeller(*args))
    out = staged / f"{fast}-{len(words)}"
    assert distil(work, out, "--no-control", "--pretrain", 0, *words) == 0
    assert asked == [precision] and read_json(out / "config.json")["options"]["label_precision"] == precision


def test_several_teachers_are_averaged(work, tmp_path, quick):
    assert toy.lora(work, tmp_path / "other", "--rank", 2) == 0
    seen, compute = [], train_utils.compute_logits
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(train_utils, "compute_logits", lambda *args: seen.append(compute(*args)) or seen[-1])
        assert toy.main("distil", "12345", "--plain", "--teacher", work / "LoRA", "--teacher", tmp_path / "other", "--out",
                        tmp_path / "run", "--epochs", 1, *SIZES, "--no-plots") == 0
    kept = load_file(tmp_path / "run" / "teacher_logits.safetensors")["logits"]
    assert kept.equal((seen[0] + seen[1]) / 2) and not seen[0].equal(seen[1])
    assert read_json(tmp_path / "run" / "summary.json")["teacher"]["more_runs"] == [str(tmp_path / "other")]
    assert len(read_json(tmp_path / "run" / "config.json")["teacher_files"]) == 2


@pytest.fixture(scope="module")
def stranger(work, tmp_path_factory):
    """A LoRA run of a toy BERT with a tokenizer of its own, which knows whole words alone."""
    folder = tmp_path_factory.mktemp("stranger")
    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *toy.WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder / "model")
    net = toy_net("bert", vocab_size=len(vocabulary), pad_token_id=0, max_position_embeddings=64)
    net.save_pretrained(folder / "model")
    assert toy.lora(work, folder / "LoRA", "--model", folder / "model", "--no-plots") == 0
    return folder / "LoRA"


def logits_by_text(run, texts: list[str]) -> torch.Tensor:
    """Returns a finished run's logits, each text on its own."""
    model, tokenizer, _ = evaluate.load_finetuned(run)
    with torch.no_grad():
        rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
        return torch.cat([model(ids, torch.ones_like(ids)) for ids in rows])


def test_teachers_of_different_tokenizers_meet_in_their_logits(work, staged, stranger, tmp_path, monkeypatch, capsys):
    kept, prepare = [], recipe.prepare_sentences
    monkeypatch.setattr(recipe, "prepare_sentences", lambda *args: kept.append(prepare(*args)) or kept[-1])
    run, second = tmp_path / "run", ("--teacher", stranger, "--label-precision", "teacher", "--no-control")
    assert distil(work, run, *second) == 0
    texts = [text for _, text in new_sentences(tmp_path)]
    texts += load_task("cola", work / "cola").train.sentences
    parts = [logits_by_text(teacher, texts) for teacher in (work / "LoRA", stranger)]
    torch.testing.assert_close(kept[0].logits, (parts[0] + parts[1]) / 2, atol=1e-5, rtol=1e-5)
    assert (parts[0] - parts[1]).abs().mean() > 0.01
    # The hidden states and the vocabulary are the first teacher's.
    assert kept[0].hidden.ends[0] - kept[0].hidden.starts[0] == len(kept[0].ids[0])
    tokens = len(AutoTokenizer.from_pretrained(work / "model"))
    assert len(load_file(run / "student.safetensors")["embedding.weight"]) == tokens

    # Each member's scores are its own run's, and the ensemble's those of the mean logits.
    teacher = read_json(run / "summary.json")["teacher"]
    for member, path in zip(teacher["members"], (work / "LoRA", stranger), strict=True):
        own = read_json(path / "summary.json")["validation"]
        assert member["run"] == str(path)
        for split, scores in own.items():
            assert member["validation"][split] == pytest.approx(scores, rel=1e-5)
    dev = load_task("cola", work / "cola").dev["in_domain"]
    parts = [logits_by_text(path, dev.sentences) for path in (work / "LoRA", stranger)]
    loss = torch.nn.functional.cross_entropy((parts[0] + parts[1]) / 2, torch.tensor(dev.labels))
    assert teacher["validation"]["in_domain"]["loss"] == pytest.approx(float(loss), rel=1e-4)
    out = capsys.readouterr().out
    assert "teacher 1" in out and "teacher 2" in out

    # Labels of both are cached: a second run computes none.
    monkeypatch.setattr(Labeller, "compute", lambda *_: pytest.fail("computed again"))
    assert distil(work, tmp_path / "again", *second) == 0
    assert (run / "student.safetensors").read_bytes() == (tmp_path / "again" / "student.safetensors").read_bytes()
    assert toy.main("diagnose", run, "--limit", 2, "--out", tmp_path / "diagnosis") == 0
    diagnosed = read_json(tmp_path / "diagnosis" / "diagnose.json")["scores"]["teacher"]
    assert diagnosed["in_domain"] == pytest.approx(teacher["validation"]["in_domain"], rel=1e-5)


def test_teachers_of_different_tokenizers_teach_the_training_set_alone_too(work, stranger, tmp_path):
    assert toy.main("distil", "12345", "--plain", "--teacher", stranger, "--teacher", work / "LoRA", "--out",
                    tmp_path / "run", "--epochs", 1, *SIZES, "--no-plots", "--no-control") == 0
    texts = load_task("cola", work / "cola").train.sentences
    parts = [logits_by_text(teacher, texts) for teacher in (stranger, work / "LoRA")]
    found = load_file(tmp_path / "run" / "teacher_logits.safetensors")["logits"]
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2, atol=1e-5, rtol=1e-5)
    assert len(load_file(tmp_path / "run" / "student.safetensors")["embedding.weight"]) == 2 + len(toy.WORDS)


def test_a_file_of_soft_labels_stands_for_the_teacher_that_wrote_it(work, staged, tmp_path, monkeypatch, capsys):
    """Every sentence of the transfer set but five, and the training set, by another run's `predict`."""
    assert toy.lora(work, tmp_path / "other", "--rank", 2, "--no-plots") == 0
    texts = [text for _, text in new_sentences(staged)]
    (tmp_path / "texts.txt").write_text("\n".join([*texts[5:], *load_task("cola", work / "cola").train.sentences]))
    capsys.readouterr()
    assert toy.main("predict", tmp_path / "other", "--file", tmp_path / "texts.txt", "--json") == 0
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(line + "\n" for line in capsys.readouterr().out.splitlines() if line.startswith("{")))

    kept, prepare = [], recipe.prepare_sentences
    monkeypatch.setattr(recipe, "prepare_sentences", lambda *args: kept.append(prepare(*args)) or kept[-1])
    quick = ("--cache", staged, "--no-control", "--pretrain", 0, "--transfer", 1, "--epochs", 1, "--label-precision",
             "teacher")
    for name, more in (("alone", ("--labels-alone",)), ("beside", ())):
        assert distil(work, tmp_path / name, "--labels", labels, *more, *quick) == 0
    assert "labels.jsonl: 5 of 80 sentences" in capsys.readouterr().err
    texts += load_task("cola", work / "cola").train.sentences
    own, other = (logits_by_text(teacher, texts).softmax(-1) for teacher in (work / "LoRA", tmp_path / "other"))
    alone, beside = (one.logits.softmax(-1) for one in kept)
    torch.testing.assert_close(alone, torch.cat([own[:5], other[5:]]), atol=1e-5, rtol=1e-4)
    both = (own * other).sqrt()
    torch.testing.assert_close(beside[5:], (both / both.sum(-1, keepdim=True))[5:], atol=1e-5, rtol=1e-4)
    assert (own - other).abs().mean() > 0.01

    # The file is a part of the run: repeated with the same one, refused with another.
    assert toy.main("repeat", tmp_path / "beside") == 0
    labels.write_text(labels.read_text().replace("0.", "0.0", 1))
    capsys.readouterr()
    assert toy.main("repeat", tmp_path / "beside") == 2
    assert "labels.jsonl" in capsys.readouterr().err


# ---------------------------------------------------------------- a vocabulary of the student's own

@pytest.fixture(scope="module")
def small_vocabulary(work, staged):
    """A run in stages with a table of 40 rows and its frozen copy, on the cache of `staged`."""
    assert distil(work, staged / "small", "--vocabulary", 40, "--rare-tokens", "pieces", "--frozen-embeddings",
                  "--pretrain", 0) == 0
    return staged / "small"


def test_frequent_tokens_of_the_sentences_that_train_have_a_row_each(work, staged, small_vocabulary):
    student, tokenizer, _ = evaluate.load_student(small_vocabulary)
    table = first_table(staged)
    trained = [line.split("\t")[1] for line in table.read_text().splitlines()]
    trained += load_task("cola", work / "cola").train.sentences
    count = Counter(token for sentence in trained for token in tokenizer(sentence)["input_ids"])
    frequent = sorted(range(len(tokenizer)), key=lambda token: (-count[token], token))[:38]
    assert student.embedding.rows[frequent].tolist() == [[row, row] for row in range(38)]
    assert student.embedding.weight.shape == (40, 6) and student.embedding.rows.dtype == torch.int32


def test_a_vocabulary_is_in_the_files_and_in_the_count_of_parameters(small_vocabulary):
    sizes, summary = (read_json(small_vocabulary / name) for name in ("student_config.json", "summary.json"))
    weights = load_file(small_vocabulary / "student.safetensors")
    assert (sizes["vocabulary"], sizes["rare_tokens"]) == (40, "pieces")
    assert summary["student"]["parameters"] == sum(
        value.numel() for name, value in weights.items() if name != "embedding.rows")
    # The baseline has the same rows and the same frozen vectors.
    for name in ("embedding.rows", "embedding.frozen"):
        assert torch.equal(weights[name], load_file(small_vocabulary / "scratch.safetensors")[name])
    assert sizes["frozen_embeddings"] and not torch.equal(weights["embedding.frozen"], weights["embedding.weight"])


def test_without_a_vocabulary_the_files_are_those_of_earlier_runs(staged):
    assert set(read_json(staged / "run" / "student_config.json")) == {
        "vocab_size", "num_labels", "embedding_size", "hidden_size", "directions", "rnn_layers", "cell", "pooling",
        "dropout"}
    assert "embedding.rows" not in load_file(staged / "run" / "student.safetensors")


def test_a_student_with_a_vocabulary_is_repeated(small_vocabulary, capsys):
    assert toy.main("repeat", small_vocabulary) == 0
    assert "identical" in capsys.readouterr().out


@pytest.mark.parametrize("rows, expected", [(8, "expected a whole number of at least 16"),
                                            (10 ** 6, "expected at most ")])
def test_an_impossible_vocabulary_is_one_line(work, tmp_path, capsys, rows, expected):
    assert toy.main("distil", "12345", "--teacher", work / "LoRA", "--out", tmp_path / "run", "--vocabulary", rows) == 2
    err = capsys.readouterr().err.strip()
    assert expected in err and f"{rows}" in err and not (tmp_path / "run").exists()


def test_contextual_embeddings_are_the_means_of_the_teachers_states(work, staged):
    """As many components as channels, and as many embeddings: distances are those of the means, in one scale."""
    assert distil(work, staged / "contextual", "--student-embeddings", "contextual", "--frozen-embeddings",
                  "--match-size", 32, "--embedding-size", 32, "--pretrain", 0, "--transfer", 1, "--no-control") == 0
    first = load_file(staged / "contextual" / "student.safetensors")["embedding.frozen"]
    teacher, tokenizer, _ = evaluate.load_finetuned(work / "LoRA")
    table = first_table(staged)
    trained = [line.split("\t")[1] for line in table.read_text().splitlines()]
    trained += load_task("cola", work / "cola").train.sentences
    states = {}
    for sentence in trained:
        ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = teacher.net.base_model(input_ids=ids).last_hidden_state[0]
        for token, state in zip(ids[0].tolist(), last, strict=True):
            states.setdefault(token, []).append(state)
    means = torch.stack([torch.stack(its_states).mean(0) for its_states in states.values()])
    distances = [torch.pdist(vectors) for vectors in (first[list(states)], means)]
    assert len(states) > 10 and distances[0].std() > 0.1
    torch.testing.assert_close(distances[0] / distances[0].mean(), distances[1] / distances[1].mean(), atol=2e-2, rtol=0)


@pytest.mark.parametrize("more", [("--match", "none"), ("--plain",)])
def test_contextual_embeddings_need_hidden_states(work, tmp_path, capsys, more):
    assert toy.main("distil", "12345", "--teacher", work / "LoRA", "--out", tmp_path / "run", "--student-embeddings",
                    "contextual", *more) == 2
    err = capsys.readouterr().err.strip()
    assert "--student-embeddings contextual: means of the hidden states" in err and "\n" not in err
    assert not (tmp_path / "run").exists()
