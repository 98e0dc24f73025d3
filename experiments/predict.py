"""Predicts classes with a finished run: name and probability of each sentence's class, in order, in constant memory.

    python run.py predict runs/LoRA-12345 "Anna repaired the clock." "Anna arrived the clock."
    python run.py predict runs/distil-12345 --file FILE.csv --json
    python run.py predict --adapter cola=runs/LoRA-1 --adapter reviews=runs/LoRA-2 --file FILE.jsonl --json
"""
from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

import data_utils
from data import columns as cells
from data import stream, tables
from data.segments import separator_of
from data.tables import Table
from data_utils import Batch
from experiments.arguments import named
from experiments.evaluate import load_finetuned, load_student
from experiments.inputs import columns_of
from machine.errors import UserError
from machine.hardware import device
from machine.progress import Bar
from options.schema import TableOptions
from record.calibration import calibration_of
from record.folder import read_run
from serving import texts
from serving.bank import AdapterBank
from serving.texts import Reading

EXAMPLES = 5  # unknown words that a warning names
WINDOW = 256  # rows read, batched by length and answered at a time


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

    def classify(self, rows: list[tuple[str, list[float]]]) -> list[dict | UserError]:
        """Returns label, probability and probabilities of each text, or its error."""
        def logits(batch: Batch, _) -> Tensor:
            return self.model(*batch.to(device()).inputs())

        features = [numbers for _, numbers in rows] if self.columns.feature_columns else None
        return texts.classify(self.tokenizer, [(self.reading, text) for text, _ in rows], logits, features)


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

    @property
    def readings(self) -> list[Reading]:
        """Returns the way that each adapter reads texts."""
        return [entry.reading for entry in self.bank.entries.values()]

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

    def classify(self, rows: list[tuple[str, str | None]]) -> list[dict | UserError]:
        return self.bank.classify([(name, text) for text, name in rows])


def predict_file(predictor: RunPredictor | BankPredictor, path: Path, kind: str | None = None,
                 progress: Callable[[int, stream.Rows], None] = lambda rows, file: None) -> Iterator[dict]:
    """Answers a file's rows in order, a window at a time.

    Args:
        kind: one of `stream.FORMATS`; by the file's ending if None.
        progress: called after each window with its number of rows and the file.

    Yields:
        text, label, probability and probabilities of each row, and `truncated` where the text was cut; or error and line of
        a bad one.

    Raises:
        UserError: the file cannot be read at all.
    """
    # CoLA's own files have no header, and sentences in their last column.
    of_run = isinstance(predictor, RunPredictor)
    if isinstance(predictor, BankPredictor) and str(path) == "-":
        kind = kind or "jsonl"
    headless = None if of_run and predictor.task in ("cola", "tiny") else False
    rows = stream.open_rows(path, kind, headless, predictor.columns)
    predictor.check(rows)
    while window := list(itertools.islice(rows.rows, WINDOW)):
        # A bad row keeps its place: errors stand between the answers, and the rest goes on.
        parsed: list = []
        for row in window:
            try:
                parsed.append(UserError(row.error) if row.error else predictor.row(path, rows.kind, row.columns))
            except UserError as error:
                parsed.append(error)
        # Good rows are answered together, in batches by length, and dealt out again in the file's order.
        good = [row for row in parsed if not isinstance(row, UserError)]
        answers = iter(predictor.classify(good))
        for row, given in zip(window, parsed, strict=True):
            answer = given if isinstance(given, UserError) else next(answers)
            yield ({"error": str(answer), "line": row.line} if isinstance(answer, UserError) else
                   {"text": given[0], **answer})
        progress(len(window), rows)


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


def decided(result: dict, at_least: float | None) -> dict:
    """Returns a result; without a label where its probability is below `at_least`."""
    unsure = at_least is not None and result.get("probability", 1) < at_least
    undecided = {key: None for key in ("label", "name") if key in result}
    return {**result, **undecided} if unsure else result


def line_of(result: dict, as_json: bool) -> str:
    """Formats a result as a line: JSON, or label, probability (a number has none) and text between tabs."""
    if as_json:
        return json.dumps(result, ensure_ascii=False)
    if "error" in result:
        return f"error\tline {result['line']}\t{result['error']}"
    label = "undecided" if result["label"] is None else result.get("name", result["label"])
    probability = [f"{result['probability']:.4f}"] if "probability" in result else []
    return "\t".join([label, *probability, " ".join(result["text"].split())])


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
    if args.adapter:
        columns = columns_of({}, args.delimiter, args.encoding)
        predictor = BankPredictor(named(args.adapter, "--adapter"), args.base, columns, args.calibrated)
    else:
        predictor = RunPredictor(args.run, args.control, args.delimiter, args.encoding, args.calibrated)
    # Only one of several classes has a probability of being right.
    for reading in predictor.readings:
        reading.problem.check("--at-least", args.at_least is not None)

    def line(result: dict) -> str:
        return line_of(decided(result, args.at_least), args.json)

    if args.texts:
        results = predict_texts(predictor, args.texts)
        print("\n".join(line(result) for result in results))
        unknown = [result["unknown_words"] for result in results if "unknown_words" in result]
        return warn_of_unknown_words(len(unknown), list(dict.fromkeys(itertools.chain(*unknown)))[:EXAMPLES])
    count = errors = strange = 0
    examples: dict[str, None] = {}
    with Bar(unit="rows", delay=2) as bar:
        def progress(rows: int, file: stream.Rows) -> None:
            # Bytes of a file, whose rows nobody has counted; rows of standard input.
            if file.size:
                bar.unit, bar.unit_scale, bar.total = "B", True, file.size
            bar.update(file.file.tell() - bar.n if file.size else rows)
            # The next program of a pipe has its rows at once.
            sys.stdout.flush()

        for result in predict_file(predictor, args.file, args.format, progress):
            # To stdout, with the bar out of the way.
            Bar.write(line(result))
            count, errors = count + 1, errors + ("error" in result)
            strange += "unknown_words" in result
            # A few are enough, and a long file has thousands.
            if len(examples) < EXAMPLES:
                examples.update(dict.fromkeys(result.get("unknown_words", ())))
    # The answers may have gone to a file, where nobody sees the errors among them.
    if errors:
        warnings.warn(f"{args.file}: {errors:,} of {count:,} rows have an error in place of an answer", stacklevel=2)
    warn_of_unknown_words(strange, list(examples)[:EXAMPLES])
