"""Collects finished runs into one result: the seeds of a command become mean and sample standard deviation.

    python benchmarks/collect.py --name cola_lora_bf16 runs/LoRA-12345 runs/LoRA-12346 runs/LoRA-12347

Reads the runs of one `LoRA` or `distil` command with several seeds and writes benchmarks/results/NAME.json; summarise.py
makes the pages' tables from it. Runs are one result only if they differ in nothing but the seed: the same command, data,
versions, CPU and threads. The results of the paper's steps reach the pages by `run.py paper --records`.
"""
from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine.errors import UserError  # noqa: E402
from metrics.problems import SINGLE_LABEL, Problem, problem_of  # noqa: E402
from record.files import make_folder, write_json  # noqa: E402 (needs the path above)
from record.folder import read_run  # noqa: E402

# Options of a run's place and of its start, which change no result, with the number of their values.
PLACE = {"--out": 1, "--plots": 1, "--cache": 1, "--save-every": 1, "--jobs": 1,
         "--resume": 0, "--overwrite": 0, "--no-plots": 0}
# Keys of config.json that are equal in all runs of one result.
SAME = ("versions", "cpu", "device", "threads", "matmul", "kernels", "data_files", "init_files")


def typed(command: str) -> str:
    """Returns a recorded command as the pages show it: without the run's place, with paths relative to the project.

    Raises:
        UserError: a path lies outside the project's folder and its neighbours, and would mean nothing on another machine.
    """
    words, shown = iter(shlex.split(command)), []
    for word in words:
        option, _, value = word.partition("=")
        if option in PLACE:
            for _ in range(0 if value else PLACE[option]):
                next(words, None)
            continue
        # Paths are shown as a reader in the project's folder types them.
        if os.path.isabs(value or word):
            path = os.path.relpath(value or word, ROOT)
            if path.startswith("../.."):
                raise UserError(f"{command}: {value or word} is a path of this machine; start the run with a relative one")
            word = f"{option}={path}" if value else path
        shown.append(word)
    return shlex.join(shown)


def of_any_seed(commands: list[str], seeds: list[str]) -> list[str]:
    """Returns the commands with SR in the place of the seed, also within a path."""
    words = [shlex.split(command) for command in commands]
    # A word that all commands share is no seed's own: one teacher for all students keeps its name.
    common = {at for at, same in enumerate(zip(*words, strict=False)) if len(set(same)) == 1} if len(words) > 1 else set()
    found = []
    for own, seed in zip(words, seeds, strict=True):
        found.append(shlex.join(word if at in common else word.replace(seed, "SR") for at, word in enumerate(own)))
    return found


def spread(values: Sequence[float]) -> dict:
    """Returns mean, sample standard deviation (n - 1; None for a single value) and the values."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
            "values": list(values)}


def scores(validations: list[dict], problem: Problem) -> dict:
    """Returns the spread of the problem's scores, such as accuracy and MCC, on each split over the seeds."""
    found = {}
    for split in validations[0]:
        found[split] = {}
        for key in problem.shown:
            found[split][key] = spread([validation[split][key] for validation in validations])
    return found


def row(name: str, parts: list[dict], problem: Problem = SINGLE_LABEL) -> dict:
    """Returns one model's figures over the seeds.

    Args:
        parts: the model's part of each seed's summary.json: `validation`, and for a trained model `last_validation`,
            `best_epoch` and `last_epoch`.
    """
    result = {"name": name, "best": scores([part["validation"] for part in parts], problem)}
    if "last_validation" in parts[0]:
        result["last"] = scores([part["last_validation"] for part in parts], problem)
        for key in ("best_epoch", "last_epoch"):
            result[key] = [part[key] for part in parts]
    # A student has one number: all of its parameters train.
    counts = parts[0]["parameters"]
    result["trainable"] = counts["trainable"] if isinstance(counts, dict) else counts
    if "sentences_per_second" in parts[0]:
        result["sentences_per_second"] = spread([part["sentences_per_second"] for part in parts])
    return result


def collect(folders: list[Path]) -> dict:
    """Returns one result of the runs of one command.

    Raises:
        UserError: a run is not finished or damaged; two runs differ in more than the seed, or have the same seed.
    """
    runs = [read_run(folder) for folder in folders]
    configs, summaries = [config for config, _ in runs], [summary for _, summary in runs]
    seeds = [summary["sr"] for summary in summaries]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{folders[0]} ...: two runs have the same seed ({', '.join(seeds)})")
    # Equal commands are not enough: the same command on other data or another machine is another result.
    commands = of_any_seed([typed(config["command"]) for config in configs], seeds)
    for folder, config, command in zip(folders, configs, commands, strict=True):
        if command != commands[0]:
            raise UserError(f"{folder}: another command than {folders[0]}: {command}, not {commands[0]}")
        for key in SAME:
            if config.get(key) != configs[0].get(key):
                raise UserError(f"{folder}: {key} is not that of {folders[0]}: {config.get(key)}, not "
                                f"{configs[0].get(key)}")
    first, problem = summaries[0], problem_of(summaries[0])
    if first["mode"] == "distil":
        # Its models by their recorded names; scratch is the baseline, which a run may have left out.
        names = [name for name in ("teacher", "student", "scratch") if name in first]
        rows = [row(name, list(map(itemgetter(name), summaries)), problem) for name in names]
    else:
        rows = [row(first.get("method", first["mode"]), summaries, problem)]
    train = {}
    for key in ("seconds", "peak_memory_bytes"):
        if key in first["train"]:
            train[key] = spread([summary["train"][key] for summary in summaries])
    validation = (first["teacher"] if first["mode"] == "distil" else first)["validation"]
    # The model that always says the same has one score of classes, and several of other problems.
    always = problem.baseline(validation)
    if problem is SINGLE_LABEL:
        always = {"majority_accuracy": {split: values["accuracy"] for split, values in always.items()}}
    else:
        always = {"problem": problem.name, "always_the_same": always}
    return {"collected": first["mode"], "command": commands[0], "seeds": seeds, **about(configs), "model": first["model"],
            "task": first["task"], "rows": rows, **always, "train": train}


def about(configs: list[dict]) -> dict:
    """Returns the runs' machine and versions, and their commits, which may differ."""
    return {"git_commits": list(dict.fromkeys(config.get("git_commit") for config in configs)),
            **{key: configs[0].get(key) for key in SAME if key != "data_files"}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a finished run, one for each seed")
    parser.add_argument("--name", required=True, help="of the result: benchmarks/results/NAME.json")
    args = parser.parse_args()
    try:
        result = collect(args.runs)
        write_json(make_folder(ROOT / "benchmarks" / "results") / f"{args.name}.json", result)
    except UserError as error:
        print(f"collect.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.name}: {len(args.runs)} run(s) of {result['command']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
