"""Writes text, numbers and tables as LaTeX."""

import math
import re
from collections.abc import Iterator

from report.records import spoken

# Brackets and the asterisk have no meaning of their own, but after \\ a row that starts with one is read as its argument.
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
    '"': r"\textquotedbl{}", "[": "{[}", "]": "{]}", "*": "{*}",
}


# Letters of names beyond Latin-1 that T1 fonts have, as ranges of a character class.
LETTERS = ("\u0102-\u0107\u010c-\u0111\u0118-\u011b\u011e\u011f\u0130\u0131\u0141-\u0144\u0147\u0148"
           "\u0150-\u0153\u0158-\u015b\u015e-\u0161\u0164\u0165\u016e-\u0171\u0178-\u017e")


def escape(text: object) -> str:
    """Returns LaTeX that prints a text: specials escaped, ligatures broken, characters that T1 fonts lack as [U+XXXX]."""
    safe = re.sub(r"\s", " ", str(text)).translate(str.maketrans(LATEX))
    safe = re.sub(f"[^ -~\u00a1-\u00ff{LETTERS}]", lambda match: f"{{[}}U+{ord(match[0]):04X}{{]}}", safe)
    return re.sub(r"([-<>,])(?=\1)", r"\1{}", safe)


def breakable(text: object) -> str:
    """Returns a text as LaTeX that may break lines after / , = : _ and within long words."""
    # 32 characters: a SHA-256 breaks in the middle.
    words = [re.findall("[^/,=:_]{1,32}[/,=:_]*|[/,=:_]+", word) for word in re.split(r"\s", str(text))]
    return " ".join(r"\allowbreak{}".join(map(escape, pieces)) for pieces in words)


def shown(key: str, value: object) -> str:
    """Returns a result as LaTeX: accuracies in percent, losses and MCC with 3 decimals, counts as 124,439,808."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return breakable(plain(value))
    if key.endswith(("accuracy", "percent")):
        text = f"{value * (100 if key.endswith('accuracy') else 1):.2f}"
    elif key in ("loss", "cross_entropy", "mcc"):
        text = f"{value:.3f}"
    else:
        text = f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", "$-$")


def plain(value: object) -> str:
    """Returns an option as text, as the user gave it: no rounding, no thousands separators."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def flatten(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    """Yields each number of nested objects as (key, LaTeX), with the keys joined by dots: lora.train.seconds."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(f"{prefix}.{key}", inner)
    else:
        # The key becomes the name of a LaTeX command; names of splits and classes may hold anything.
        yield re.sub(r"[^\w.-]", "-", prefix, flags=re.ASCII), shown(prefix.rpartition(".")[2], value)


def tabular(columns: str, head: str, rows: list[list[str]], environment: str = "tabular") -> str:
    """Returns a booktabs table. `head` and `rows` are LaTeX already; a longtable* repeats its head on every page."""
    repeat = "\\endhead\n" if environment == "longtable*" else ""
    body = "".join(" & ".join(row) + " \\\\\n" for row in rows)
    return (f"\\begin{{{environment}}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{repeat}{body}\\bottomrule\n"
            f"\\end{{{environment}}}\n")


def cell(text: str) -> str:
    """Returns a plain cell as LaTeX, with a minus sign before negative numbers in place of a hyphen."""
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", escape(text))


def plain_table(columns: str, head: list[str], rows: list[list[str]]) -> str:
    """Returns a booktabs table of plain text, with every cell escaped."""
    return tabular(columns, " & ".join(map(escape, head)), [list(map(cell, row)) for row in rows])


def grouped(before: list[str], groups: dict[str, list[str]], after: list[str] | None = None) -> str:
    """Returns a table head of two lines: the names of the groups, each with a rule below, and the names of the columns."""
    above, rules, column = [""] * len(before), "", len(before) + 1
    for name, names in groups.items():
        above.append(rf"\multicolumn{{{len(names)}}}{{c}}{{{escape(spoken(name))}}}")
        rules += rf"\cmidrule(lr){{{column}-{column + len(names) - 1}}}"
        column += len(names)
    above += [""] * len(after or [])
    return " & ".join(above) + f" \\\\ {rules}\n" + " & ".join(before + sum(groups.values(), []) + (after or []))
