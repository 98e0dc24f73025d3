"""Searches a fine-tuning's options with Optuna: rank, roles, layers, learning rate ...

    python run.py sweep 12345 --search rank=1,2,4,8 --search targets=q+v,all --search lr=1e-4..1e-3 --trials 20

A trial is a fine-tuning in this process with the sweep's one seed; its score is its best epoch's MCC on the selection
split. All trials are queued in the study from the beginning, and each process takes the next one: several processes, on
several machines if `--storage` is a database server's, share one study and do no trial twice.
"""
from __future__ import annotations

import itertools
import re
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import filelock
import optuna
import sqlalchemy
import torch
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

import train_utils
from experiments import endings, finetune
from experiments.arguments import choose, finetune_options
from experiments.compare import same_settings
from experiments.variants import COMMON, Variant, settings
from machine import signals
from machine.errors import UserError
from machine.hardware import use_threads
from machine.progress import Bar
from metrics.problems import PROBLEMS, SHOWN
from options.schema import RunOptions
from record.files import make_folder, without_password, write_file, write_json
from record.folder import provenance
from record.ownership import check_out, remove_child, weights
from report import records, studies
from train_utils import Diverged

HEARTBEAT, GRACE = 60, 300  # seconds; after GRACE without a heartbeat a trial goes to another process
STRUCTURE = ("rank", "targets", "layers")  # options that may not fit the model, alone or together
LOCK = ".trial.lock"
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
OPTUNA_TABLES = re.compile("stud(y|ies)|trial|version_info|alembic_version")


@dataclass(frozen=True)
class Range:
    """Holds the numbers from low to high, whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = False


@dataclass(frozen=True)
class SweepOptions:
    """Holds the searched options, the way of searching, and the study's place."""

    sr: str
    search: dict[str, list | Range]  # option -> its choices, or a range
    make: Callable[[dict, Path], RunOptions]  # (option -> value, folder) -> a trial's run
    sampler: str  # tpe, random or grid
    trials: int | None  # of all processes together; 20, or the whole grid, if None
    prune: bool
    storage: str | None  # a database URL; study.db in the folder if None
    out: Path
    settings: dict  # every option as resolved: a study goes on only under the same ones
    overwrite: bool = False


class _Surplus(Exception):
    """Ends a trial that Optuna made up: another process took the last queued one."""


def run_sweep(options: SweepOptions, say: Callable[[str], None] = print) -> dict:
    """Runs the queued trials and writes sweep.json and sweep.tex.

    Returns:
        The content of sweep.json.

    Raises:
        UserError: bad input, before anything is written; a study that began under other options.
        signals.Interrupted: asked to stop; the trial at work is queued again.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    check_out(options.out, "sweep")
    task = check(options)
    record = provenance(options.settings, task.files)
    record["versions"]["optuna"] = version("optuna")
    with _storage_errors(options):
        study = open_study(options, record)
        # As many threads as the first process of the study had: another number rounds otherwise.
        use_threads(study.user_attrs["threads"])
        record["threads"] = torch.get_num_threads()
        requeue_dead(study, options.out)
        trial = Trial(options, study, train_utils.selection_split(task.dev), PROBLEMS[task.problem].chosen)
        with Bar(total=len(_slots(study)), initial=len(_done(study)), unit="trial", desc="sweep") as bar:
            while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                # One at a time, so that the folder is released after the study knows the outcome.
                try:
                    study.optimize(trial, n_trials=1, catch=(_Surplus,))
                finally:
                    trial.release()
                keep_best(study, options.out)
                bar.n = len(_done(study))
                best = max((t.value for t in _done(study) if t.value is not None), default=0)
                bar.set_postfix_str(f"best {SHOWN[trial.score]} {best:.3f}")
        result = {"mode": "sweep", "sr": options.sr, **{key: options.settings[key] for key in ("model", "task", "sampler")},
                  "search": {name: vars(s) if isinstance(s, Range) else s for name, s in options.search.items()},
                  "selection": {"split": train_utils.selection_split(task.dev), "score": PROBLEMS[task.problem].chosen},
                  **record,
                  **results(study, options)}
    write_json(options.out / "sweep.json", result)
    written = records.read_json(options.out / "sweep.json")
    write_file(options.out / "sweep.tex", studies.sweep_latex(written))
    say(studies.sweep_text(written))
    return result


def check(options: SweepOptions):
    """Returns the task, after checking that the ends of every searched range fit the model."""
    # All combinations of structure alone: a rank may fit one layer and not another, a learning rate fits any.
    ends = {name: [s.low, s.high] if isinstance(s, Range) else s for name, s in options.search.items()}
    first = {name: values[0] for name, values in ends.items()}
    for values in itertools.product(*(ends[name] for name in STRUCTURE if name in ends)):
        changed = dict(zip((name for name in STRUCTURE if name in ends), values, strict=True))
        task = finetune.check(options.make({**first, **changed}, options.out))
    return task


# ---------------------------------------------------------------- the study

@contextmanager
def _storage_errors(options: SweepOptions):
    """Turns a database's errors into a UserError, without the password of its URL."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(without_password(f"{_place(options)}: the database cannot be used ({reason})")) from None


def _place(options: SweepOptions) -> str:
    """Returns the study's database as messages name it."""
    return f"--storage {options.storage}" if options.storage else str(options.out / "study.db")


def _storage(options: SweepOptions) -> optuna.storages.RDBStorage:
    """Opens the database, a new one if there is none.

    Raises:
        UserError: its driver is missing, or it belongs to another program or another version of Optuna.
    """
    url = options.storage or f"sqlite:///{options.out / 'study.db'}"
    # Several attempts: another process may be creating the tables at this moment.
    for attempt in range(5):
        try:
            # A server's database may be shared with other programs, a file is one program's.
            if url.startswith("sqlite") and (foreign := _foreign_tables(url)):
                raise UserError(f"{_place(options)}: another program's database, with the table {foreign[0]}; expected a "
                                "sweep's, or a new file")
            return optuna.storages.RDBStorage(
                url, engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
                heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=requeue)
        except (IntegrityError, OperationalError):
            if attempt == 4:
                raise
            time.sleep(0.5)
        except ImportError as error:
            raise UserError(without_password(f"--storage {url}: its driver is not installed ({error})")) from None
        # Optuna's check of its tables' version.
        except (RuntimeError, AssertionError) as error:
            raise UserError(without_password(f"{_place(options)}: made by another version of Optuna than "
                                             f"{version('optuna')} ({error})")) from None


def _foreign_tables(url: str) -> list[str]:
    """Returns the tables of a database without a study that are not Optuna's; Optuna would add its own to them."""
    engine = sqlalchemy.create_engine(url)
    try:
        tables = sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()
    return [] if "version_info" in tables else [name for name in tables if not OPTUNA_TABLES.match(name)]


def open_study(options: SweepOptions, record: dict) -> optuna.Study:
    """Opens the study: a new one with all its trials waiting, or an existing one with the same options."""
    if options.storage is None:
        make_folder(options.out)
    storage = _storage(options)
    make_folder(options.out)
    name = f"sweep-{options.sr}"
    if options.overwrite:
        with suppress(KeyError):
            optuna.delete_study(study_name=name, storage=storage)
        for file in ("sweep.json", "sweep.tex"):
            (options.out / file).unlink(missing_ok=True)
        # The folders of trials, which all have a lock, and no other that somebody put next to them.
        for lock in options.out.glob(f"trial-*/{LOCK}"):
            remove_child(lock.parent)
    settings = {key: record[key] for key in ("options", "data_files")}
    pruner = optuna.pruners.MedianPruner() if options.prune else optuna.pruners.NopPruner()
    try:
        study = optuna.create_study(study_name=name, storage=storage, pruner=pruner, direction="maximize")
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage, pruner=pruner)
        # Another process may be making it at this moment: its settings come last.
        end = time.monotonic() + 10
        while "settings" not in study.user_attrs and time.monotonic() < end:
            time.sleep(0.1)
    if "settings" in study.user_attrs:
        same_settings(study.user_attrs["settings"], settings, f"study {name}")
    grid = [dict(zip(options.search, values, strict=True)) for values in itertools.product(*options.search.values())
            ] if options.sampler == "grid" else None
    # A slot is a trial's number in the plan: a trial done again after a kill has another number, but the same slot.
    trials, slots = options.trials or (len(grid) if grid else 20), _slots(study)
    if len(slots) > trials:
        raise UserError(f"--trials {trials}: the study has {len(slots)} already")
    for slot in range(trials):
        if slot not in slots:
            study.enqueue_trial(grid[slot] if grid else {}, user_attrs={"slot": slot})
    if "threads" not in study.user_attrs:
        study.set_user_attr("threads", record["threads"])
    # Last: a study with settings is whole.
    study.set_user_attr("settings", settings)
    return study


def _slots(study: optuna.Study) -> set[int]:
    return {trial.user_attrs["slot"] for trial in study.get_trials(deepcopy=False) if "slot" in trial.user_attrs}


def _done(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=DONE)


def requeue(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Queues an unfinished trial again, with the same values."""
    study.enqueue_trial(trial.params, user_attrs={"slot": trial.user_attrs["slot"]})


def requeue_dead(study: optuna.Study, out: Path) -> None:
    """Queues the trials of processes killed on this machine again; those of other machines follow after GRACE."""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        folder = trial_folder(out, trial.number)
        if not folder.is_dir():
            continue
        # A lock that is free belongs to no living process.
        with suppress(filelock.Timeout), filelock.FileLock(folder / LOCK, timeout=0):
            # Another process may have queued it meanwhile.
            if study.get_trials(deepcopy=False)[trial.number].state != TrialState.RUNNING:
                continue
            study.tell(trial.number, state=TrialState.FAIL)
            requeue(study, trial)
            remove_child(folder)


def trial_folder(out: Path, number: int) -> Path:
    return out / f"trial-{number:05d}"


def best_trial(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    """Returns the trial with the highest score; of equals, the one with the fewest trained parameters."""
    return max(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)), default=None, key=lambda trial: (
        trial.value, -trial.user_attrs["parameters"]["trainable"], -trial.number))


def keep_best(study: optuna.Study, out: Path) -> None:
    """Removes weights and tokenizer of every finished trial in this folder, except those of the best."""
    best = best_trial(study)
    chosen = best and best.user_attrs.get("same_as", best.number)
    for trial in _done(study):
        if trial.number != chosen:
            folder = trial_folder(out, trial.number)
            for file in (*weights(folder), folder / "tokenizer.json"):
                file.unlink(missing_ok=True)


# ---------------------------------------------------------------- one trial

class Trial:
    """Computes the objective: Optuna calls it with each trial."""

    def __init__(self, options: SweepOptions, study: optuna.Study, split: str, score: str):
        self.options, self.study, self.split, self.score = options, study, split, score
        self.lock: filelock.FileLock | None = None  # of the folder of the trial at work

    def release(self) -> None:
        """Releases the folder, once the study knows the outcome; earlier, another process would take the trial for dead."""
        if self.lock:
            self.lock.release()
            self.lock = None

    def __call__(self, trial: optuna.Trial) -> float:
        if "slot" not in trial.user_attrs:
            raise _Surplus
        values = self.suggest(trial)
        # The same options and seed are the same run: its outcome is copied.
        same = next((t for t in _done(self.study) if t.params == trial.params), None)
        if same:
            for key, value in {**same.user_attrs, "slot": trial.user_attrs["slot"], "same_as": same.number}.items():
                trial.set_user_attr(key, value)
            if same.state == TrialState.PRUNED:
                raise optuna.TrialPruned
            return same.value
        folder = trial_folder(self.options.out, trial.number)
        make_folder(folder)
        self.lock = filelock.FileLock(folder / LOCK, timeout=0)
        self.lock.acquire()
        try:
            return self.run(trial, self.options.make(values, folder))
        except optuna.TrialPruned:
            raise
        except BaseException:
            # A signal, a full disk: the next start does this trial again.
            requeue(self.study, self.study.trials[trial.number])
            remove_child(folder)
            raise

    def suggest(self, trial: optuna.Trial) -> dict:
        """Returns the trial's value of every searched option."""
        # Seeded with SR and the trial's number: two processes, or one started again, must not sample the same values twice.
        seed = (int(self.options.sr) * 100_003 + trial.number) % 2 ** 32
        self.study.sampler = (optuna.samplers.TPESampler(seed=seed, multivariate=False) if self.options.sampler == "tpe"
                              else optuna.samplers.RandomSampler(seed=seed))
        values = {}
        for name, s in self.options.search.items():
            if not isinstance(s, Range):
                values[name] = trial.suggest_categorical(name, s)
            elif isinstance(s.low, int):
                values[name] = trial.suggest_int(name, s.low, s.high, log=s.log)
            else:
                values[name] = trial.suggest_float(name, s.low, s.high, log=s.log)
        return values

    def run(self, trial: optuna.Trial, run: RunOptions) -> float:
        """Fine-tunes and returns the score."""
        def on_epoch(history: list[dict], counts: dict) -> None:
            epoch = history[-1]["epoch"]
            # At every epoch: a pruned trial has parameters too.
            trial.set_user_attr("parameters", counts)
            trial.report(history[-1]["validation"][self.split][self.score], epoch)
            if epoch < run.train.epochs and trial.should_prune():
                raise optuna.TrialPruned
        try:
            with open(run.out / "log.txt", "w") as log, redirect_stdout(log), redirect_stderr(log):
                summary = finetune.run_finetune(run, stop=signals.received, on_epoch=on_epoch)
        except Diverged as error:
            trial.set_user_attr("diverged", str(error))
            raise optuna.TrialPruned from None
        for key in ("parameters", "best_epoch", "validation"):
            trial.set_user_attr(key, summary[key])
        trial.set_user_attr("seconds", summary["train"]["seconds"])
        return summary["validation"][self.split][self.score]


# ---------------------------------------------------------------- all trials

def results(study: optuna.Study, options: SweepOptions) -> dict:
    """Collects every trial, the importance of each option, and the mean score of each choice."""
    trials = []
    for trial in study.trials:
        attributes = trial.user_attrs
        # A surplus trial, which never ran.
        if trial.state == TrialState.FAIL and "slot" not in attributes:
            continue
        state = "diverged" if "diverged" in attributes else trial.state.name.lower()
        reached = [value for value in trial.intermediate_values.values()]
        trials.append({
            "number": trial.number, "state": "interrupted" if state == "fail" else state, "params": trial.params,
            "score": trial.value if trial.state == TrialState.COMPLETE else max(reached, default=None),
            "epochs": len(reached), **{key: attributes.get(key) for key in (
                "parameters", "best_epoch", "validation", "seconds", "diverged", "same_as")}})
    complete = [trial for trial in trials if trial["state"] == "complete"]
    # Of choices alone: a range has no values that repeat.
    means = {name: mean_scores(complete, name, choices) for name, choices in options.search.items()
             if not isinstance(choices, Range)}
    best = best_trial(study)
    return {"trials": trials, "best": best and best.number, "means": means, "importance": importance(study, options)}


def mean_scores(trials: list[dict], name: str, choices: list) -> list[dict]:
    """Returns n, mean and sample standard deviation of the scores of each choice of an option."""
    found = []
    for value in choices:
        scores = [trial["score"] for trial in trials if trial["params"][name] == value]
        found.append({"value": value, "n": len(scores), "mean": statistics.fmean(scores) if scores else None,
                      "sd": statistics.stdev(scores) if len(scores) > 1 else None})
    return found


def importance(study: optuna.Study, options: SweepOptions) -> dict[str, float] | None:
    """Computes the share of the scores' variance that each option explains (fANOVA, Hutter et al. 2014), or None."""
    # Of fewer trials, or of equal scores, the regression trees of fANOVA can explain nothing.
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(options.search) < 2 or len(complete) < 4 or len({trial.value for trial in complete}) < 2:
        return None
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=int(options.sr))
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


# ---------------------------------------------------------------- the command line

def search(args) -> dict[str, list | Range]:
    """Returns --search as option -> its choices, or a range."""
    found = {}
    for text in args.search:
        name, equals, rest = text.partition("=")
        parser, name = Variant(f"--search {text}"), name.replace("-", "_")
        if not equals or not rest:
            raise UserError(f"--search {text}: expected OPTION=VALUES, such as rank=1,2,4 or lr=1e-4..1e-3")
        if name in (*COMMON, "model", "deterministic"):
            parser.error(f"{name} is the same for every trial")
        if name in found:
            parser.error(f"{name} is searched twice")
        option = parser.option(name)
        if match := re.fullmatch(r"([^,]+?)\.\.([^,]+?)(?::(log|linear))?", rest):
            low, high = (_value(parser, args, name, end) for end in match.groups()[:2])
            log = (match[3] or ("log" if name in ("lr", "head_lr") else "linear")) == "log"
            if option.kind is bool or not isinstance(low, (int, float)) or not low < high or (log and low <= 0):
                parser.error("expected a range LOW..HIGH of numbers, LOW below HIGH" + (" and above 0" if log else ""))
            if args.sampler == "grid":
                parser.error("a grid needs choices, such as 1,2,4, not a range")
            found[name] = Range(low, high, log)
        else:
            found[name] = [_value(parser, args, name, part) for part in rest.split(",")]
            if len(set(found[name])) < len(found[name]):
                parser.error("a value is given twice")
    return found


def _value(parser: Variant, args, name: str, text: str):
    """Returns a searched value as a number where the option is one, else as written.

    Raises:
        UserError: the option itself would refuse it.
    """
    if not text:
        parser.error("a value is empty")
    parsed = getattr(parser.parse([args.sr, *parser.words(args, {name: text})]), parser.option(name).name)
    return parsed if isinstance(parsed, (int, float)) and not isinstance(parsed, bool) else text


def trial_options(args, values: dict, folder: Path) -> RunOptions:
    """Returns the options of a sweep's trial: the common ones, its own values (option -> value), and its folder."""
    parser = Variant("sweep")
    parsed = parser.parse([args.sr, *parser.words(args, {name: str(value) for name, value in values.items()})])
    parsed.lr = values.get("lr") or args.lr
    return replace(finetune_options(parsed), out=folder, overwrite=True)


def main(args) -> int:
    """Runs the trials that are left, prints and draws the study; returns the exit status."""
    choose(args)
    options = SweepOptions(args.sr, search(args), lambda values, folder: trial_options(args, values, folder), args.sampler,
                           args.trials, not args.no_prune, args.storage, args.out or Path(f"runs/sweep-{args.sr}"),
                           settings(args, "trials", "storage"), args.overwrite)
    return endings.study(args, options.out, lambda: run_sweep(options), "sweep")
