"""Tables of the programs that measure or count, for the pages that benchmarks/summarise.py writes."""
from __future__ import annotations

from collections.abc import Iterable

from benchmarks.page_format import commits_of, figure, machine_of, measured_on, table

UNITS = {"x": " ×", "%": " %", "s": " s", "MiB": " MiB"}
NOT_RUN = "not run"
# Programs with targets in docs/speed.md.
SPEED = ("train_throughput", "frozen_reuse", "inference", "generation")
# Programs that count: label, a function of the result to (held, tried), command.
COUNTED = {
    "tamper_test": ("flipped bits and cuts in every file of finished and unfinished runs, noticed / tried",
                    lambda result: (result["noticed"], result["tried"]), "python benchmarks/tamper_test.py --flips 100"),
    "fuzz": ("damaged files on every reader, answered by a result or one clear line / tried",
             lambda result: (result["tried"] - result["failed"], result["tried"]),
             "python benchmarks/fuzz.py --cases 12000"),
    "fuzz_service": ("bodies for the service, valid and not, answered as its schema says / tried",
                     lambda result: (result["tried"] - len(result["failed"]), result["tried"]),
                     "python benchmarks/fuzz_service.py http://127.0.0.1:8000 --cases 2500"),
    "kill_test": ("killed at random moments and resumed to the same bytes / tried",
                  lambda result: (result["survived"], result["tried"]), "python benchmarks/kill_test.py --kills 100"),
}


def shown(result: dict | None) -> str:
    """Returns a result's command without --json, which changes no figure."""
    return result["command"].removesuffix(" --json") if result else ""


def measured_row(row: dict) -> list[str]:
    unit = UNITS.get(row["unit"], f" {row['unit']}" if row["unit"] else "")
    target = row.get("target", "").replace(">=", "≥").replace("<=", "≤")
    return [row["what"], f"{figure(row['median'])}{unit}", f"{figure(row['min'])} to {figure(row['max'])}",
            f"{target + unit if target else ''}", {True: "yes", False: "no", None: ""}[row.get("met")]]


def measured(results: Iterable[dict], keys: tuple[str, ...]) -> list[str]:
    """Shows a table for each result, under its machine.

    Args:
        keys: the parts of a result whose rows are shown.
    """
    # Sorted by machine, so that each one has a single heading.
    lines, machine = [], None
    for result in sorted(results, key=machine_of):
        if machine != (machine := machine_of(result)):
            lines += [f"### {machine}", ""]
        rows = [row for key in keys for row in result[key]]
        # Without targets the two columns would be empty.
        head = ["measured", "median:", "smallest to largest:", "target", "met"]
        if not any("target" in row for row in rows):
            head, rows = head[:3], [measured_row(row)[:3] for row in rows]
        else:
            rows = [measured_row(row) for row in rows]
        lines += [f"`{shown(result)}` ({commits_of([result])}, load average at the start "
                  f"{result['machine']['load_average']:.1f})", "",
                  *table(head, rows), ""]
    return lines[:-1]


def of_program(name: str, results: dict[str, dict]) -> list[str]:
    """Shows all measurements of one program."""
    found = [result for result in results.values() if result.get("benchmark") == name]
    return measured(found, ("targets", "measurements")) if found else [f"`python benchmarks/{name}.py`: {NOT_RUN}."]


def speed(results: dict[str, dict]) -> list[str]:
    """Shows the targets of the programs of SPEED, and whether each was met."""
    found = [result for result in results.values() if result.get("benchmark") in SPEED]
    return measured(found, ("targets",)) if found else [f"{', '.join(SPEED)}: {NOT_RUN}."]


def measurements(results: dict[str, dict]) -> list[str]:
    """Shows the measurements of the programs of SPEED other than their targets."""
    return measured([result for result in results.values() if result.get("benchmark") in SPEED], ("measurements",))


def reliability(results: dict[str, dict]) -> list[str]:
    """Shows the counts of damage and kills survived, and the cost of a checkpoint."""
    rows, used = [], []
    for name, (label, counts, command) in COUNTED.items():
        result = results.get(name)
        rows.append([label, " / ".join(f"{count:,}" for count in counts(result)) if result else NOT_RUN,
                     f"`{shown(result) or command}`"])
        used += [result] if result else []
    for result in results.values():
        if result.get("benchmark") == "checkpoint_cost":
            rows += [[f"checkpoints' share of training time, {row['what'].split(': ')[0]} (target: at most 2 %)",
                      f"{row['median']:.2f} %", f"`{shown(result)}`"] for row in result["targets"]]
            used.append(result)
    return [*table(["trial", "figure:", "command"], rows), *measured_on(used)]
