"""A distillation in stages: the transfer set, its cache, equal budgets, and a stopped one that ends in the same bytes."""
import json
import shutil
from collections import Counter

import pytest
import torch
import toy
from conftest import toy_net
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_utils
from benchmarks import collect
from data_utils import load_task
from distillation import recipe, sentences, transfer_set
from distillation.labels import Labeller
from distillation.transfer_set import letters_and_digits
from distillation.writer import Writer
from experiments import evaluate, seeds
from experiments.distil import options_from
from experiments.parser import Parser
from record.files import read_json
from record.folder import without_times
from report import figures, records, tables
from report.runs import Run

SIZES = ("--embedding-size", 6, "--hidden-size", 5)
SMALL = (*SIZES, "--epochs", 2, "--batch-size", 8, "--augment", 40, "--pretrain", 2, "--transfer", 2, "--match-size", 4,
         "--stage-tokens", 64, "--no-plots")


def distil(work, out, *more):
    return toy.main("distil", "12345", "--teacher", work / "LoRA", "--text", work / "plain.txt", "--out", out, *SMALL, *more)


@pytest.fixture(scope="module")
def staged(work, tmp_path_factory):
    """A run in stages in a folder of its own, with plain sentences some of which are the task's."""
    dev = [sentence for sentence, _ in toy.toy_rows(12, 1)]
    (work / "plain.txt").write_text("\n".join([*dev[:6], *(one.upper() + "!" for one in dev[6:]),
                                               *(one for one, _ in toy.toy_rows(60, 9))]))
    folder = tmp_path_factory.mktemp("staged")
    assert distil(work, folder / "run") == 0
    return folder


def cache(folder):
    (found,) = folder.glob("transfer-*")
    return found


def new_sentences(folder) -> list[list[str]]:
    """Returns kind and text of each sentence of the transfer set; other tests make smaller ones in the same cache."""
    tables = [path.read_text().splitlines() for path in cache(folder).glob("sentences-*.tsv")]
    return [line.split("\t")[:2] for line in next(lines for lines in tables if len(lines) == 40)]


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
    known = sentences.known_sentences(limited)
    assert known >= {letters_and_digits(one) for one in dev}
    assert set(transfer_set.plain_sentences([*dev, *new], known, 20)) == set(new)
    # A task that is limited twice still knows them.
    assert sentences.known_sentences(task.limit(8).limit(4)) >= {letters_and_digits(one) for one in dev}


def test_a_student_past_a_tenth_of_the_teacher_is_warned_of(work, tmp_path, capsys):
    small = ("distil", "12345", "--plain", "--teacher", work / "LoRA", "--epochs", 1, "--batch-size", 8, "--no-plots",
             "--no-control", "--embedding-size", 4)
    for hidden, warned in ((4, False), (64, True)):
        assert toy.main(*small, "--hidden-size", hidden, "--out", tmp_path / str(hidden)) == 0
        out, err = capsys.readouterr()
        summary = read_json(tmp_path / str(hidden) / "summary.json")
        assert (10 * summary["student"]["parameters"] > summary["teacher"]["parameters"]) == warned
        assert ("% of the teacher's parameters, more than 10 %" in err) == warned


def test_a_student_fills_the_parameters_that_it_is_given(work, tmp_path, capsys):
    small = ("distil", "12345", "--plain", "--teacher", work / "LoRA", "--epochs", 1, "--batch-size", 8, "--no-plots",
             "--no-control", "--vocabulary", 32, "--student-parameters")
    assert toy.main(*small, 4000, "--out", tmp_path / "run") == 0
    summary, sizes = (read_json(tmp_path / "run" / name) for name in ("summary.json", "student_config.json"))
    assert 3000 < summary["student"]["parameters"] <= 4000 and sizes["hidden_size"] >= sizes["embedding_size"] == 8
    capsys.readouterr()
    assert toy.main(*small, 400, "--out", tmp_path / "none") == 2
    assert "--student-parameters 400: a student with embeddings of 8 and a state of 8 has " in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_development_rows_that_stand_in_the_training_split_are_counted_said_and_recorded(work, tmp_path, capsys):
    shutil.copytree(work / "cola", tmp_path / "cola")
    train = (tmp_path / "cola" / "in_domain_train.tsv").read_text().splitlines()
    dev = tmp_path / "cola" / "in_domain_dev.tsv"
    # Seven rows of training, four of them with other case and punctuation; none of the second development file.
    rows = [line.split("\t") for line in train[:7]]
    repeated = [[*row[:3], row[3].upper() + "!" if number < 4 else row[3]] for number, row in enumerate(rows)]
    new = [["s", str(number % 2), "", f"Brand new sentence {number}"] for number in range(5)]
    dev.write_text("".join("\t".join(row) + "\n" for row in [*repeated, *new]))
    other = tmp_path / "cola" / "out_of_domain_dev.tsv"
    other.write_text("".join(f"s\t{number % 2}\t\tAnother new sentence {number}\n" for number in range(5)))
    line = ("LoRA", "12345", "--model", work / "model", "--data", tmp_path / "cola", "--epochs", 1, "--no-plots")
    assert toy.main(*line, "--out", tmp_path / "LoRA") == 0
    assert toy.main("distil", "12345", "--plain", "--teacher", tmp_path / "LoRA", "--out", tmp_path / "distil", *SIZES,
                    "--epochs", 1, "--no-control", "--no-plots") == 0
    said = "in_domain: 7 of 12 rows stand in the training split too"
    assert capsys.readouterr().out.count(said) == 2
    for run in ("LoRA", "distil"):
        assert read_json(tmp_path / run / "config.json")["rows_in_training"] == {"in_domain": 7, "out_of_domain": 0}


def test_sentences_are_the_same_but_for_case_and_punctuation():
    one, same, other = map(letters_and_digits, ("The cat, it seems, Sat!", "the cat it seems sat.", "the cat sat"))
    assert one == same != other


def test_every_stage_has_its_lines_and_both_students_the_same_steps(staged):
    summary, lines = read_json(staged / "run" / "summary.json"), toy.lines_of(staged / "run")
    student, scratch = summary["student"]["stages"], summary["scratch"]["stages"]
    assert [stage["stage"] for stage in student] == [stage["stage"] for stage in scratch] == ["pretrain", "transfer", "gold"]
    assert [stage["steps"] for stage in student] == [stage["steps"] for stage in scratch]
    for phase, its_stages in (("student", student), ("scratch", scratch)):
        for stage in its_stages:
            own = [line for line in lines if (line["phase"], line["stage"]) == (phase, stage["stage"])]
            assert [line["epoch"] for line in own] == list(range(1, stage["epochs"] + 1))
            assert ("mcc" in own[0]["train"]) == (stage["stage"] != "pretrain")


def test_what_is_kept_is_the_student_alone(staged):
    state = load_file(staged / "run" / "student.safetensors")
    assert {name.split(".")[0] for name in state} == {"embedding", "rnn", "attention", "classifier"}
    assert sum(value.numel() for value in state.values()) == (
        read_json(staged / "run" / "summary.json")["student"]["parameters"])


def test_a_second_run_computes_no_sentence_again(work, staged, monkeypatch):
    for owner, name in ((Labeller, "compute"), (Writer, "language_model"), (sentences, "transfer_set")):
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


def test_a_stage_without_a_teacher_is_trained_once_for_student_and_control(work, staged, tmp_path, monkeypatch):
    words, backward = ("--augment", 0, "--match", "none"), torch.Tensor.backward
    taken, passes = recipe.take_over, {}
    for name, take_over in (("twice", lambda *_: None), ("once", taken)):
        monkeypatch.setattr(recipe, "take_over", take_over)
        monkeypatch.setattr(torch.Tensor, "backward", lambda self, name=name: passes.update(
            {name: passes.get(name, 0) + 1}) or backward(self))
        assert distil(work, tmp_path / name, *words) == 0
    one, other = toy.tree(tmp_path / "twice"), toy.tree(tmp_path / "once")
    for name in ("student.safetensors", "scratch.safetensors"):
        assert one[name] == other[name]
    assert without_times(toy.lines_of(tmp_path / "twice")) == without_times(toy.lines_of(tmp_path / "once"))
    pretraining = json.loads(other["summary.json"])["scratch"]["stages"][0]
    assert pretraining["stage"] == "pretrain" and passes["twice"] - passes["once"] == pretraining["steps"] > 0


def test_a_smaller_set_is_the_beginning_of_a_larger_one(work, staged, monkeypatch):
    drawn, make = [], sentences.make_transfer_set
    monkeypatch.setattr(sentences, "make_transfer_set", lambda *args: drawn.append(
        (make(*args[:-1], args[-1] // 2), make(*args))) or drawn[0][1])
    assert distil(work, staged / "half") == 0
    assert drawn[0][0] == drawn[0][1][:20]


@pytest.mark.parametrize(("fast", "words", "precision"), [
    (True, (), "bf16"), (False, (), "teacher"), (True, ("--label-precision", "teacher"), "teacher")])
def test_a_teacher_labels_in_bfloat16_where_that_is_fast_or_as_it_is_told(work, staged, monkeypatch, fast, words, precision):
    asked, as_labeller = [], sentences.as_labeller
    monkeypatch.setattr("experiments.distil.bf16_is_fast", lambda: fast)
    monkeypatch.setattr(sentences, "as_labeller", lambda *args: asked.append(args[1]) or as_labeller(*args))
    out = staged / f"{fast}-{len(words)}"
    assert distil(work, out, "--no-control", "--pretrain", 0, *words) == 0
    assert asked == [precision] and read_json(out / "config.json")["options"]["label_precision"] == precision


# The writer takes one step; each later stage of the student two to twenty.
@pytest.mark.parametrize("stops", [2, 9, 25, 60])
def test_a_run_stopped_in_any_stage_and_resumed_ends_in_the_same_bytes(work, staged, tmp_path, monkeypatch, stops):
    calls = []
    monkeypatch.setattr("machine.signals.received", lambda: calls.append(1) or (15 if len(calls) == stops else None))
    assert distil(work, tmp_path / "run") == 143
    monkeypatch.undo()
    assert distil(work, tmp_path / "run", "--resume") == 0
    after, whole = toy.tree(tmp_path / "run"), toy.tree(staged / "run")
    for name in ("student.safetensors", "scratch.safetensors"):
        assert after[name] == whole[name]
    assert without_times(toy.lines_of(tmp_path / "run")) == without_times(toy.lines_of(staged / "run"))
    for name in ("student", "scratch"):
        one, other = (json.loads(tree["summary.json"])[name] for tree in (after, whole))
        assert without_times(one) == without_times(other)


def test_the_ablations_leave_their_stage_out(work, staged, tmp_path):
    for more, expected in ((("--pretrain", 0), ["transfer", "gold"]), (("--augment", 0), ["pretrain", "gold"]),
                           (("--match", "none", "--kd-loss", "hard", "--student-embeddings", "random"), None)):
        out = tmp_path / "-".join(map(str, more))
        assert distil(work, out, *more) == 0
        found = [stage["stage"] for stage in read_json(out / "summary.json")["student"]["stages"]]
        assert found == (expected or ["pretrain", "transfer", "gold"])


@pytest.fixture(scope="module")
def encoder(work, tmp_path_factory):
    """A LoRA run of a toy BERT that reads the toy model's tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    toy_net("bert", vocab_size=len(AutoTokenizer.from_pretrained(work / "model")), pad_token_id=0,
            max_position_embeddings=64).save_pretrained(folder / "model")
    for file in (work / "model").glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    assert toy.lora(work, folder / "LoRA", "--model", folder / "model", "--no-plots") == 0
    return folder / "LoRA"


@pytest.mark.parametrize(("kind", "words", "directions"), [
    ("decoder", (), 1), ("encoder", (), 2), ("decoder", ("--directions", 2), 2), ("encoder", ("--directions", 1), 1),
    ("decoder", ("--plain",), 2)])
def test_a_student_reads_as_its_teacher_does_unless_told_otherwise(work, staged, encoder, tmp_path, kind, words, directions):
    stages_of = () if "--plain" in words else ("--augment", 12, "--transfer", 1, "--text", work / "plain.txt")
    teacher = {"decoder": work / "LoRA", "encoder": encoder}[kind]
    assert toy.main("distil", "12345", "--teacher", teacher, "--out", tmp_path / "run", *SIZES, "--epochs", 1,
                    "--no-control", "--no-plots", *stages_of, *words) == 0
    names = load_file(tmp_path / "run" / "student.safetensors").keys()
    assert ("rnn.weight_hh_l0_reverse" in names) == (directions == 2)
    assert read_json(tmp_path / "run" / "student_config.json")["directions"] == directions
    assert evaluate.load_student(tmp_path / "run")[0].config.directions == directions


@pytest.mark.parametrize(("words", "epochs", "lr"), [((), 6, 5e-4), (("--augment", "0"), 15, 3e-3), (("--plain",), 15, 3e-3),
                                                     (("--transfer", "0", "--lr", "1e-3"), 15, 1e-3)])
def test_without_a_transfer_set_the_training_set_has_the_epochs_of_the_plain_recipe(work, words, epochs, lr):
    args = Parser("distil").parse(["12345", "--teacher", str(work / "LoRA"), "--task", "cola", *words])
    train = options_from(args)[0].train
    assert (train.epochs, train.lr) == (epochs, lr)


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


def test_both_students_are_asked_about_edited_tokens_and_the_baseline_by_no_teacher(work, staged, tmp_path, monkeypatch,
                                                                                    capsys):
    """The baseline has the steps of the student, on sentences that nothing of a teacher's has made."""
    plans, stages_of = [], recipe.baseline_stages
    monkeypatch.setattr(recipe, "baseline_stages", lambda *args: plans.append((*args, stages_of(*args))) or plans[-1][-1])
    run = tmp_path / "run"
    assert distil(work, run, "--edit-weight", 1, "--cache", staged, "--pretrain", 0) == 0
    (plan, (student,), (baseline,)), = plans
    found, used = plan.sentences, {int(row) for one in baseline.data.batches for row in one.rows}
    kinds = [kind for kind, _ in new_sentences(staged)]
    # Written sentences need a teacher, and so do edits of these.
    assert used == {*found.free, *found.rows_of_training_set()}
    assert {kinds[row] for row in found.free} <= {"edit of training", "plain", "edit of others"}
    assert {row for row, kind in enumerate(kinds) if kind in ("edit of training", "plain")} <= set(found.free)
    assert student.steps == baseline.steps
    marked = [bool(found.edits.of(torch.tensor([row])).any()) for row in range(found.targeted)]
    assert all(marked[row] == kind.startswith("edit") for row, kind in enumerate(kinds))
    assert not any(marked[row] for row in found.rows_of_training_set())
    # The heads are for training alone, and the loss made a difference to both students.
    plain = tmp_path / "plain"
    assert distil(work, plain, "--cache", staged, "--pretrain", 0) == 0
    for name in ("student.safetensors", "scratch.safetensors"):
        one, other = load_file(run / name), load_file(plain / name)
        assert one.keys() == other.keys() and not one["rnn.weight_hh_l0"].equal(other["rnn.weight_hh_l0"])
    capsys.readouterr()
    for more in (("--augment", 0), ("--plain",)):
        words = ("--teacher", work / "LoRA", "--out", tmp_path / "x", "--edit-weight", 1, *more)
        assert toy.main("distil", "12345", *words) == 2
        assert "--edit-weight: " in capsys.readouterr().err


def test_plots_show_the_stages(work, staged, tmp_path):
    assert {path.name for path in figures.plot_run(staged / "run", tmp_path)} >= {
        "distil-12345_pretrain.png", "distil-12345_loss.png"}
    run = figures.Run(staged / "run")
    figure = figures.pretraining_figure(run.metrics, run.summary)
    names = [f"{name}: {what}" for name in ("student with KD", "baseline") for what in ("train", "held out")]
    assert [line.get_label() for line in figure.axes[0].get_lines()] == names
    axes = figures.curves(run.metrics, run.summary, "mcc").axes[0]
    assert {text.get_text() for text in axes.texts} == {"transfer set", "training set"}


def test_bad_text_and_options_are_one_line(work, tmp_path, capsys):
    for more, said in ((("--text", tmp_path / "none.txt"), "none.txt: cannot be read"), (("--plain",), "not with --plain")):
        assert distil(work, tmp_path / "x", *more) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in error
    assert not (tmp_path / "x" / "summary.json").exists()


def test_without_a_control_the_student_is_the_same_and_all_that_follows_does_without(work, staged, tmp_path, monkeypatch,
                                                                                     capsys, quick):
    run = tmp_path / "run"
    assert toy.main("distil", "12345", "--teacher", work / "LoRA", "--text", work / "plain.txt", "--out", run, *SMALL[:-1],
                    "--no-plots", "--cache", staged, "--no-control") == 0
    assert "baseline" not in capsys.readouterr().out
    assert (run / "student.safetensors").read_bytes() == (staged / "run" / "student.safetensors").read_bytes()
    summary = records.read_json(run / "summary.json")
    assert "scratch" not in summary and not list(run.glob("scratch*"))
    assert {line["phase"] for line in toy.lines_of(run)} == {"student"}
    study = seeds.results("distil", {12345: summary})
    assert [row["entry"] for row in study["entries"]] == ["teacher", "student"]
    assert [(row["entry"], row["minus"]) for row in study["differences"]] == [("student", "teacher")]
    tables_of_run, numbers = tables.tables_of(Run(run))
    assert tables_of_run and "gain" not in numbers and "scratch" not in numbers
    monkeypatch.setattr(collect, "typed", lambda command: command)  # it has paths of this machine
    assert [row["name"] for row in collect.collect([run])["rows"]] == ["teacher", "student"]
    for mode, *more in (("predict", "A cat sat.", "--control"), ("export", "--control", "--out", tmp_path / "onnx")):
        assert toy.main(mode, run, *more) == 2
        error = capsys.readouterr().err
        assert error.endswith(f"run.py: {run}: has no baseline (it was run with --no-control)\n")
    assert toy.main("diagnose", run, "--limit", 2, "--out", tmp_path / "diagnosis") == 0
    assert list(read_json(tmp_path / "diagnosis" / "diagnose.json")["models"]) == ["teacher", "student", "language_model"]


# ---------------------------------------------------------------- a vocabulary of the student's own

def first_table(staged):
    """The transfer set of `staged`, the oldest in the cache: other tests add sets from other sources."""
    return min(cache(staged).glob("sentences-*.tsv"), key=lambda path: path.stat().st_mtime_ns)


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
