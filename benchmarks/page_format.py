"""Formats figures, tables, commands and machines for the pages that benchmarks/summarise.py writes."""
from __future__ import annotations

import re
from collections.abc import Iterable


def figure(value: float) -> str:
    """Formats a number with three digits, whole numbers from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def mean(spread: dict, form: str = ".3f", factor: float = 1) -> str:
    """Formats the mean and, if there are several seeds, the sample standard deviation."""
    # Collected results say std, the studies' sd.
    std = spread.get("std", spread.get("sd"))
    return f"{factor * spread['mean']:{form}}" + ("" if std is None else f" ± {factor * std:{form}}")


def accuracy_and_mcc(scores: dict) -> str:
    return f"{mean(scores['accuracy'])} / {mean(scores['mcc'])}"


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Returns the lines of a Markdown table; a head that ends with a colon aligns its column to the right."""
    lines = ["| " + " | ".join(cell.rstrip(":") for cell in head) + " |",
             "| " + " | ".join("---:" if cell.endswith(":") else "---" for cell in head) + " |"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def seeds_of(result: dict) -> str:
    seeds = result["seeds"]
    return f"{len(seeds)} ({seeds[0]} to {seeds[-1]})" if len(seeds) > 1 else f"1 ({seeds[0]})"


def cpu_of(result: dict) -> str:
    """Returns the name of the GPU or the CPU, without trade marks, and the CPU's generation where it was recorded."""
    where = result.get("machine", result)
    if where.get("gpu"):
        return where["gpu"]
    name = re.sub(r"\((R|TM)\)", "", where["cpu"])
    return f"{name} {where['cpu_generation']}" if where.get("cpu_generation") else name


def machine_of(result: dict) -> str:
    """Returns the machine of a result in words: CPU or GPU, threads, libraries."""
    where = result.get("machine", result)
    versions = result.get("versions", where)
    threads = f"{where['threads']} of {where['cores']} cores" if "cores" in where else f"{where['threads']} thread(s)"
    library = f", matmuls by {where['matmul']}" if where.get("matmul") else ""
    return f"{cpu_of(result)}, {threads}{library}; torch {versions['torch']}, transformers {versions['transformers']}"


def commits_of(results: Iterable[dict]) -> str:
    """Returns the commits of results in words; "not recorded" for a result without one."""
    commits = set()
    for result in results:
        # A collected result has those of its runs, a measured one its machine's.
        commits.update(result.get("git_commits", [result.get("machine", {}).get("git_commit")]))
    return "commit " + ", ".join(sorted({commit[:7] if commit else "not recorded" for commit in commits}))


def measured_on(results: Iterable[dict]) -> list[str]:
    """Returns a line for each machine of the results."""
    by_machine: dict[str, list[dict]] = {}
    for result in results:
        by_machine.setdefault(machine_of(result), []).append(result)
    return ["", *(f"Measured on {machine}; {commits_of(found)}." for machine, found in by_machine.items())
            ] if by_machine else []


def wrapped(command: str, width: int = 118) -> list[str]:
    """Breaks a command into lines that a shell reads as one."""
    # At spaces alone: the commands of the pages have no quoted ones.
    lines = [""]
    for word in command.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + word
    return [line + " \\" for line in lines[:-1]] + lines[-1:]
