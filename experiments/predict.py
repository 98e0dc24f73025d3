"""Predicts classes with a finished run: name and probability of each sentence's class, in order, in constant memory.

    python run.py predict runs/LoRA-12345 "The teachers thanked him." "The princes encouraged she."
    python run.py predict runs/distil-12345 --file FILE.csv --out ANSWERS.parquet
    python run.py predict --adapter cola=runs/LoRA-1 --adapter reviews=runs/LoRA-2 --file FILE.jsonl --json
"""
from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

import data_utils
import speed
from data import columns as cells
from data import stream, tables
from data.segments import separator_of
from data.tables import Table
from data_utils import Batch
from experiments import predict_ray, predict_shards
from experiments.arguments import named
from experiments.evaluate import load_finetuned, load_student
from experiments.inputs import columns_of
from experiments.predict_file import EXAMPLES, Counts, check_out, decided, line_of, print_answers, write_answers
from experiments.predict_shards import Shards
from machine import hardware
from machine.errors import UserError
from machine.hardware import device
from options.schema import TableOptions
from record.calibration import calibration_of
from record.files import SUMS, sha256
from record.folder import read_run
from record.ownership import weights
from serving import texts
from serving.bank import AdapterBank
from serving.texts import Encoded, Reading


class RunPredictor:
    """Answers with the model of one run.

    Args:
        folder: of a finished run of any mode.
        baseline: of a distillation, answer with its baseline instead of its student.
        delimiter, encoding: of the files; the recorded ones if None.
        calibrated: answer by the run's calibration.json.

    Raises:
        UserError: no such run, or damaged; no calibration.
    """

    def __init__(self, folder: Path, baseline: bool = False, delimiter: str | None = None, encoding: str | None = None,
                 calibrated: bool = False):
        config, summary = read_run(folder)
        if baseline and summary["mode"] != "distil":
            raise UserError(f"--control: {folder} is a {summary['mode']} run; only a distillation has a baseline")
        if summary["mode"] == "distil":
            self.model, self.tokenizer, options = load_student(folder, "scratch" if baseline else "student")
            # The student reads text alone, whatever columns its teacher read.
            options = {**options, "feature_columns": []}
        else:
            self.model, self.tokenizer, options = load_finetuned(folder)
        if baseline and calibrated:
            raise UserError("--calibrated: calibration.json is the student's; leave out --control")
        self.reading = Reading.of(config, calibration_of(folder, calibrated))
        self.task = options["task"]
        self.columns = columns_of(options, delimiter, encoding)
        # The quiz-bowl task has a template of its own, which its options do not record.
        if self.task == "buzzer" and self.columns.template is None and not self.columns.text_column:
            self.columns = replace(self.columns, template=data_utils.BUZZER_TEMPLATE)
        self.separator = separator_of(self.tokenizer)
        # CoLA's own files have no header, and sentences in their last column.
        self.standard_kind = None  # of standard input, where --format does not say: its first line decides
        self.headless = None if self.task in ("cola", "tiny") else False

    @property
    def readings(self) -> list[Reading]:
        """Returns the way that the run reads texts."""
        return [self.reading]

    def check(self, rows: stream.Rows) -> None:
        """Checks the file's header, once.

        Raises:
            UserError: the run's columns are missing.
        """
        if rows.names is not None and self.task != "buzzer":
            # A made-up row: training's own parser names the column that is missing.
            self.parse(Table(rows.path, {name: ["1"] for name in rows.names}))
        elif rows.kind == "text" and self.columns.feature_columns:
            raise UserError(f"{rows.path}: the run reads feature columns ({', '.join(self.columns.feature_columns)}); "
                            "expected a CSV, TSV, JSON Lines or Parquet file")

    def parse(self, table: Table) -> tuple[str, list[float]]:
        """Returns text and features of a table of one row."""
        return (cells.texts_of(table, self.columns, self.separator)[0],
                (cells.features_of(table, self.columns.feature_columns) or [[]])[0])

    def rows(self, path: Path, kind: str, rows: list[stream.Row]) -> list[tuple[str, list[float]] | UserError]:
        """Returns text and features of each row of a file, or its error."""
        good = [row.columns for row in rows if row.error is None]
        if kind != "text" and good and self.task != "buzzer" and all(good[0].keys() == row.keys() for row in good):
            table = Table(path, dict(zip(good[0], map(list, zip(*map(dict.values, good), strict=True)), strict=True)))
            # Together, which is several times as fast. If one of them is bad, each is looked at alone.
            with contextlib.suppress(UserError):
                texts = cells.texts_of(table, self.columns, self.separator)
                found = cells.features_of(table, self.columns.feature_columns) or itertools.repeat([])
                parsed = iter(list(zip(texts, found)))  # noqa: B905 (no features: [] without end)
                return [UserError(row.error) if row.error else next(parsed) for row in rows]
        return by_row(self, path, kind, rows)

    def row(self, path: Path, kind: str, columns: dict) -> tuple[str, list[float]]:
        """Returns text and features of a file's row.

        Raises:
            UserError: a column is missing, the text is empty, or a feature is no number.
        """
        if kind == "text":
            return columns["text"], []
        if kind == "jsonl":
            # An absent key is a missing value, as in training.
            columns = {**dict.fromkeys(self.columns.feature_columns), **columns}
        table = Table(path, {name: [value] for name, value in columns.items()})
        if self.task == "buzzer":
            table = tables.one_hot_columns(path, [columns])
        try:
            return self.parse(table)
        except UserError as error:
            # The table had one row; the caller knows the line of the file.
            raise UserError(str(error).removeprefix(f"{path}, row 1: ")) from None

    def encode(self, rows: list[tuple[str, list[float]]]) -> list[Encoded | UserError]:
        """Returns the token ids of each text, or its error."""
        return texts.encode(self.tokenizer, self.reading, [text for text, _ in rows])

    def classify(self, rows: list[tuple[str, list[float]]], encoded: list[Encoded | UserError] | None = None
                 ) -> list[dict | UserError]:
        """Returns label, probability and probabilities of each text, or its error.

        Args:
            encoded: `encode` of the same rows, if it was called before.
        """
        def logits(batch: Batch, _) -> Tensor:
            return self.model(*batch.to(device()).inputs())

        features = [numbers for _, numbers in rows] if self.columns.feature_columns else None
        return texts.classify(self.tokenizer, [(self.reading, text) for text, _ in rows], logits, features, encoded)


class BankPredictor:
    """Answers with many adapters on one base: each row names its own.

    Args:
        adapters: name -> folder of a LoRA run.
        base: answer a row that names no adapter with the base under its own head, which nothing trained.
        columns: delimiter and encoding of the files.
        calibrated: answer by each run's calibration.json.
    """

    def __init__(self, adapters: dict[str, Path], base: bool = False, columns: TableOptions = stream.DEFAULT_COLUMNS,
                 calibrated: bool = False):
        self.bank, self.names, self.base = AdapterBank.of(adapters, calibrated), list(adapters), base
        self.columns = columns
        self.headless, self.standard_kind = False, "jsonl"

    @property
    def readings(self) -> list[Reading]:
        """Returns the way that each adapter reads texts, and the base where it answers."""
        return [*(entry.reading for entry in self.bank.entries.values()), *[self.bank.own] * self.base]

    def check(self, rows: stream.Rows) -> None:
        """Checks the file's header, once.

        Raises:
            UserError: it has no column "text", or none called "adapter" where every row must name one.
        """
        needed = {"text"} if self.base else {"adapter", "text"}
        if rows.kind == "text" or rows.names is not None and not needed <= set(rows.names):
            raise UserError(f'{rows.path}: with --adapter, expected JSON Lines such as {{"adapter": "NAME", "text": "..."}}')

    def row(self, path: Path, kind: str, columns: dict) -> tuple[str, str | None]:
        """Returns text and adapter's name of a file's row, None for the base.

        Raises:
            UserError: a text or name is missing or no string.
        """
        name, text = columns.get("adapter"), columns.get("text")
        if not isinstance(text, str):
            raise UserError("text is missing or no string")
        if not isinstance(name, str | None):
            raise UserError("adapter is no string")
        # A forgotten or misspelt key would be answered by an untrained head, and nobody would see it.
        if not name and not self.base:
            raise UserError(f"adapter is missing; expected one of {', '.join(self.names)}, or --base for the base alone")
        return text, name or None

    def rows(self, path: Path, kind: str, rows: list[stream.Row]) -> list[tuple[str, str | None] | UserError]:
        """Returns text and adapter's name of each row of a file, or its error."""
        return by_row(self, path, kind, rows)

    def encode(self, rows: list[tuple[str, str | None]]) -> None:
        """Returns nothing: the bank tokenises by adapter, together with its answers."""

    def classify(self, rows: list[tuple[str, str | None]], encoded: None = None) -> list[dict | UserError]:
        """Returns label, probability and probabilities of each text, or its error."""
        return self.bank.classify([(name, text) for text, name in rows])


def by_row(predictor: RunPredictor | BankPredictor, path: Path, kind: str, rows: list[stream.Row]) -> list:
    """Returns the parsed content of each row, or its error: a bad row keeps its place, and the rest goes on."""
    parsed: list = []
    for row in rows:
        try:
            parsed.append(UserError(row.error) if row.error else predictor.row(path, kind, row.columns))
        except UserError as error:
            parsed.append(error)
    return parsed


def predict_texts(predictor: RunPredictor, sentences: list[str]) -> list[dict]:
    """Answers the sentences of a command line.

    Raises:
        UserError: one of them cannot be read, or the run reads feature columns too.
    """
    if predictor.columns.feature_columns:
        raise UserError(f"the run reads feature columns ({', '.join(predictor.columns.feature_columns)}) next to the text; "
                        "give --file with them")
    answers = predictor.classify([(text, []) for text in sentences])
    for number, answer in enumerate(answers, 1):
        if isinstance(answer, UserError):
            raise UserError(f"sentence {number}: {answer}")
    return [{"text": text, **answer} for text, answer in zip(sentences, answers, strict=True)]


def warn_of_unknown_words(texts: int, words: list[str]) -> None:
    """Warns that the built-in model never saw some of the words that it was asked about.

    Args:
        texts: number of texts with such words.
        words: a few of them.
    """
    if texts:
        which = "a text has" if texts == 1 else f"{texts:,} texts have"
        warnings.warn(f"{which} words that the built-in model never saw ({', '.join(words)}): its answers about them say "
                      "nothing; data/grammar.py has its words", stacklevel=2)


# ---------------------------------------------------------------- the command line


def about(args) -> dict:
    """Returns the models and options that the answers to a file depend on."""
    models = {}
    for name, folder in [("", args.run)] if args.run else named(args.adapter, "--adapter").items():
        # The checksums stand for all files of a run; one of an early version has none.
        sums = [Path(folder) / SUMS]
        models[name] = [sha256(path) for path in (sums if sums[0].exists() else weights(folder))]
    options = {name: getattr(args, name) for name in ("format", "delimiter", "encoding", "control", "base", "calibrated",
                                                      "at_least")}
    return {"model": models, **options}


def predictor_of(args) -> RunPredictor | BankPredictor:
    """Loads the run, or the adapters on one base.

    Raises:
        UserError: see both classes; or an option is not for their problem.
    """
    if args.adapter:
        columns = columns_of({}, args.delimiter, args.encoding)
        predictor = BankPredictor(named(args.adapter, "--adapter"), args.base, columns, args.calibrated)
    else:
        predictor = RunPredictor(args.run, args.control, args.delimiter, args.encoding, args.calibrated)
    # Only one of several classes has a probability of being right.
    for reading in predictor.readings:
        reading.problem.check("--at-least", args.at_least is not None)
    return predictor


def answer_shards(predictor: RunPredictor | BankPredictor, args) -> Counts:
    """Answers a folder of shards, in this process or in Ray's.

    Raises:
        UserError: see `predict_shards.Shards`, and `predict_ray.connected`.
    """
    shards = Shards.of(args.file, args.out, about(args), args.at_least, args.format)
    shards.check_columns(predictor)
    if args.engine != "ray":
        return shards.write(lambda names: (shards.answer(predictor, name) for name in names))
    with predict_ray.connected(args.address, args.workers) as workers:
        return shards.write(lambda names: predict_ray.answers(partial(load_worker, args, shards), names, workers))


def load_worker(args, shards: Shards) -> Callable[[str], Counts]:
    """Loads the model in another process; returns the function that answers a shard there."""
    hardware.use_device(args.device)
    speed.choose(args.fast)
    return partial(shards.answer, predictor_of(args))


def main(args) -> None:
    """Prints class and probability of sentences.

    Raises:
        UserError: no model or no sentences, or options that exclude each other.
    """
    if bool(args.run) == bool(args.adapter) or args.adapter and (args.control or args.texts or not args.file):
        raise UserError("predict: expected RUN_DIR, or --adapter NAME=DIR (several times) with --file")
    if args.base and not args.adapter:
        raise UserError("predict: --base is for --adapter")
    if bool(args.texts) == bool(args.file):
        raise UserError("predict: expected sentences, or --file FILE" + (", not both" if args.file else ""))
    folder = args.file is not None and args.file.is_dir()
    if args.engine != "ray" and (args.address or args.workers):
        raise UserError("predict: --address and --workers are for --engine ray")
    if (folder or args.engine == "ray") and not (folder and args.out):
        raise UserError("predict: a folder of shards is answered into a folder; expected --file FOLDER --out FOLDER")
    if args.out:
        (predict_shards.check_out if folder else check_out)(args.file, args.out)
    predictor = predictor_of(args)
    if args.texts:
        results = predict_texts(predictor, args.texts)
        print("\n".join(line_of(decided(result, args.at_least), args.json) for result in results))
        unknown = [result["unknown_words"] for result in results if "unknown_words" in result]
        return warn_of_unknown_words(len(unknown), list(dict.fromkeys(itertools.chain(*unknown)))[:EXAMPLES])
    if folder:
        counts = answer_shards(predictor, args)
    elif args.out:
        counts = write_answers(predictor, args.file, args.out, about(args), args.at_least, args.format)
    else:
        counts = print_answers(predictor, args.file, args.format, args.at_least, args.json)
    # The answers may have gone to a file, where nobody sees the errors among them.
    if counts.errors:
        warnings.warn(f"{args.file}: {counts.errors:,} of {counts.rows:,} rows have an error in place of an answer",
                      stacklevel=2)
    warn_of_unknown_words(counts.unknown, list(counts.words))
