"""Declares the runs that the paper cites: a plain list of steps for each profile. To change the paper's runs, edit here.

    python run.py paper 12345 --profile full --data-root ../shared/data --dry-run
"""
from __future__ import annotations

from pathlib import Path

from experiments.step import PEFT, RUN, Step, to
from experiments.variant_steps import loss_steps, variant_steps

PROFILES = ("quick", "full")
CHOSEN = "CHOSEN"  # in a command line: the learning rate that the step `grid` chose
SWEPT = "rank/best"  # no run's checksums are checked: a sweep removes the weights of all trials but the best
LOGISTIC = "benchmarks/features_reference.py"
COLA_RATES, TINY_RATES = "2e-4,4e-4", "1e-3,2e-3"  # of LoRA and of PEFT alike
# Full fine-tuning and LoRA need learning rates far apart; the head has one of its own, the same for all methods.
METHOD_RATES = ["--lr-grid", "1e-4,5e-4", "--head-lr", "5e-3"]
FEATURES = "Gpr_confidence,Length_char,Length_word,Length_ftp,Length_guess,Frequency_guess"  # of the quiz-bowl guesses
# The students' teacher need not keep to the budget of PEFT's reference. It labels 300,000 sentences: in bfloat16.
SIZE = ["--rank", "16", "--alpha", "32", "--precision", "bf16"]
INTERMEDIATE = ["--limit", "48000", *SIZE, "--lr", "4e-4", "--epochs", "1"]  # real and edited sentences, before the task
TEACHER = [*SIZE, "--lr", "3e-4", "--epochs", "3", "--label-smoothing", "0.1", "--ema", "0.995"]
# The student's ablations: name -> options of `distil` in addition to those of the paper's student.
ABLATIONS = {"plain": ["--plain"], "no-transfer-set": ["--augment", "0"],
             "no-matching": ["--match", "none", "--no-control"],
             "hard-labels": ["--match", "none", "--kd-loss", "hard", "--no-control"],
             "language-model": ["--pretrain", "4", "--augment", "0", "--match", "none"]}


def steps(profile: str, sr: str, seeds: int, data: Path | None, out: Path) -> list[Step]:
    """Returns the steps of a profile in the order in which they begin, several at a time.

    Args:
        profile: quick (the built-in task and model) or full.
        sr: the first seed.
        seeds: the number of seeds.
        data: folder with the data sets; the Hub's GPT-2 and CoLA if None. Not used by quick.
        out: the paper's folder.
    """
    if profile == "quick":
        return _quick(sr, str(seeds), out)
    return [*_cola(["--model", "smollm2", "--data", f"{data}/cola"], sr, str(seeds), out, data),
            *_other_tasks(sr, str(seeds), data, out), *variant_steps(sr, data, out),
            *loss_steps(sr, str(seeds), f"{out}/teacher/LoRA-{sr}", _text(data), out)] if data else _cola(
                ["--model", "gpt2", "--task", "cola"], sr, str(seeds), out, None)


def _quick(sr: str, seeds: str, out: Path) -> list[Step]:
    task = ["--model", "tiny", "--task", "tiny"]
    return [
        *_lora(task, sr, seeds, out, TINY_RATES, ["--epochs", "6"], (2, 0.2, 3)),
        *_distil(sr, seeds, out, "lora", f"{out}/cola/LoRA-{sr}", [], {"distil": 4, "distil-plain": 2}),
        Step("rank", 1, [RUN, "sweep", sr, *task, "--sampler", "grid", "--no-prune", "--search", "rank=1,8", "--search",
                         "targets=q+v,all", "--limit", "600", "--epochs", "4", *to(out, "rank")], "rank/sweep.json",
             runs=SWEPT),
        Step("methods", 2, [RUN, "compare", sr, *task, "--methods", "none,head,lora,full", "--against", "lora", "--seeds",
                            seeds, "--limit", "600", "--epochs", "4", *to(out, "methods")], "methods/compare.json"),
        Step("diagnose", 0.5, [RUN, "diagnose", f"{out}/cola/distil-{sr}", "--out", f"{out}/diagnose"],
             "diagnose/diagnose.json", ("distil",))]


def _cola(task: list[str], sr: str, seeds: str, out: Path, data: Path | None) -> list[Step]:
    """Returns the steps on CoLA: with SmolLM2 and the public files, or with GPT-2 and CoLA from the Hub."""
    pairs = ["--pairs", f"{data}/blimp/pairs.tsv", "--limit", "100"] if data else []
    text = _text(data) if data else []
    # The Hub's variant has no plain text, and so no intermediate task.
    before = [Step("intermediate", 20, [RUN, "LoRA", sr, *task[:2], "--task", "edits", "--data", f"{data}/plain_text",
                                       *INTERMEDIATE, *to(out, "intermediate")], "intermediate/summary.json",
                   runs="intermediate")] if data else []
    start = ["--init", f"{out}/intermediate"] if data else []
    found = [
        *_lora(task, sr, seeds, out, COLA_RATES, ["--epochs", "3"], (57, 1, 125)),
        *before,
        Step("teacher", 33, [RUN, "LoRA", sr, *task, *start, *TEACHER, "--seeds", seeds, *to(out, "teacher")],
             f"teacher/LoRA-{sr}-seeds/seeds.json", tuple(step.name for step in before), runs="teacher/LoRA-*"),
        *_distil(sr, seeds, out, "teacher", f"{out}/teacher/LoRA-{sr}", text, {
            "distil": 125, "distil-plain": 15, "distil-no-transfer-set": 14, "distil-no-matching": 28,
            "distil-hard-labels": 28, "distil-language-model": 46}),
        Step("diagnose", 11, [RUN, "diagnose", f"{out}/cola/distil-{sr}", *pairs, "--out", f"{out}/diagnose"],
             "diagnose/diagnose.json", ("distil",))]
    # Without data sets, methods and ranks are compared on CoLA too: it is the only task.
    if data is None:
        found += [
            Step("rank", 60, [RUN, "sweep", sr, *task, "--sampler", "grid", "--no-prune", "--search", "rank=1,2,4,8,16",
                              "--search", "targets=q+v,q+k+v+o,all", "--limit", "2000", "--epochs", "1",
                              *to(out, "rank")], "rank/sweep.json", runs=SWEPT),
            Step("methods", 180, [RUN, "compare", sr, *task, "--methods", "none,head,lora,full", "--against", "lora",
                                 "--seeds", seeds, *METHOD_RATES, "--epochs", "3", *to(out, "methods")],
                 "methods/compare.json")]
    return found


def _lora(task: list[str], sr: str, seeds: str, out: Path, rates: str, budget: list[str],
          minutes: tuple[float, float, float]) -> list[Step]:
    """Returns LoRA and PEFT's reference with the same seeds, budget and learning rates to choose from."""
    return [
        Step("grid", minutes[0], [RUN, "compare", sr, *task, "--methods", "lora", "--lr-grid", rates, "--seeds", seeds,
                                  *budget, *to(out, "grid")], "grid/compare.json"),
        # The grid's runs at the chosen rate are those of this command: linked into its folder, they are not run again.
        Step("lora", minutes[1], [RUN, "LoRA", sr, *task, "--lr", CHOSEN, "--seeds", seeds, *budget, *to(out, "cola")],
             f"cola/LoRA-{sr}-seeds/seeds.json", ("grid",), runs="cola/LoRA-*"),
        Step("peft", minutes[2], [PEFT, "--seed", sr, *task, "--lr-grid", rates, "--seeds", seeds, *budget,
                                  "--out", f"{out}/peft"], "peft/compare.json")]


def _distil(sr: str, seeds: str, out: Path, needs: str, teacher: str, text: list[str], minutes: dict[str, float]
            ) -> list[Step]:
    """Returns the student with its baseline, and its ablations, all with one teacher.

    Args:
        needs: the step that trains the teacher.
        teacher: the teacher's folder.
        minutes: of each step, by name; "distil" is the student.
    """
    # The student runs first: its labels of the transfer set, kept by --cache, serve every ablation.
    def step(name: str) -> Step:
        flags, folder = ABLATIONS.get(name.removeprefix("distil-"), []), "cola" if name == "distil" else name
        stages = [] if "--plain" in flags else [*text, "--cache", str(out)]
        return Step(name, minutes[name], [RUN, "distil", sr, "--seeds", seeds, "--teacher", teacher, *stages, *flags,
                                          *to(out, folder)], f"{folder}/distil-{sr}-seeds/seeds.json", (needs,),
                    ("distil",) if name.startswith("distil-") else (), f"{folder}/distil-*")
    return [step(name) for name in minutes]


def _text(data: Path) -> list[str]:
    return [word for name in ("edited", "tatoeba") for word in ("--text", f"{data}/plain_text/{name}.txt")]


def _other_tasks(sr: str, seeds: str, data: Path, out: Path) -> list[Step]:
    """Returns the steps with MiniLM: sentence polarity (a student, ranks, methods), long reviews, quiz-bowl guesses."""
    polarity = ["--model", "minilm", "--task", "rotten_tomatoes", "--data", f"{data}/rotten_tomatoes"]
    return [
        # The longest step begins first: begun last, it would run alone at the end.
        Step("long", 150, [RUN, "compare", sr, "--model", "minilm", "--data", f"{data}/movie_reviews", "--text-column",
                           "review", "--max-length", "256", "--truncate", "head", "--batch-tokens", "4096", "--methods",
                           "none,head,lora,full", "--against", "lora", "--seeds", seeds, *METHOD_RATES, "--epochs", "5",
                           "--patience", "2", *to(out, "long")], "long/compare.json"),
        Step("polarity-teacher", 4, [RUN, "LoRA", sr, *polarity, "--lr", "5e-4", "--head-lr", "5e-3", "--epochs", "3",
                                     *to(out, "polarity-teacher")], "polarity-teacher/summary.json",
             runs="polarity-teacher"),
        *_distil(sr, seeds, out, "polarity-teacher", f"{out}/polarity-teacher", _text(data), {"polarity": 60}),
        Step("methods", 41, [RUN, "compare", sr, *polarity, "--methods", "none,head,lora,full", "--against", "lora",
                             "--seeds", seeds, *METHOD_RATES, "--epochs", "3",
                             *to(out, "methods")], "methods/compare.json"),
        Step("buzzer", 22, [RUN, "compare", sr, "--model", "minilm", "--task", "buzzer", "--data", f"{data}/buzzer",
                            "--methods", "none", "--set", "text:method=head", "--set", "text-lora:method=lora", "--set",
                            f"features:method=features,feature-columns={FEATURES}", "--set",
                            f"both:method=head,feature-columns={FEATURES}", "--set",
                            f"both-lora:method=lora,feature-columns={FEATURES}", "--against", "features", "--seeds", seeds,
                            "--lr-grid", "3e-4,3e-3", "--epochs", "3", *to(out, "buzzer")], "buzzer/compare.json"),
        Step("rank", 9, [RUN, "sweep", sr, *polarity, "--limit", "4000", "--sampler", "grid", "--no-prune", "--search",
                        "rank=1,2,4,8,16", "--search", "targets=q+v,q+k+v+o,all", "--lr", "5e-4", "--head-lr", "5e-3",
                        "--epochs", "1", *to(out, "rank")], "rank/sweep.json", runs=SWEPT),
        Step("logistic", 0.2, [LOGISTIC, "--task", "buzzer", "--data", f"{data}/buzzer", "--feature-columns", FEATURES,
                               "--out", f"{out}/logistic.json"], "logistic.json")]
