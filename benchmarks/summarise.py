"""Writes the results of benchmarks/README.md from results/*.json: no figure there is typed by hand.

    python benchmarks/train_throughput.py --data DIR --json > benchmarks/results/train_throughput_NAME.json
    python benchmarks/summarise.py
"""
from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
START, END = "<!-- results, by summarise.py -->\n", "<!-- end of results -->\n"
UNITS = {"x": " ×", "%": " %", "s": " s", "MiB": " MiB"}


def figure(value: float) -> str:
    """Three digits, whole numbers from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def tables(results: list[dict]) -> str:
    """One table for each machine: targets first, then what else was measured."""
    text = []
    by_machine: dict[str, list[dict]] = {}
    for result in results:
        machine = result["machine"]
        kind = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
        by_machine.setdefault(f"{kind}; torch {machine['torch']}, transformers {machine['transformers']}, peft "
                              f"{machine['peft']}", []).append(result)
    for machine, measured in by_machine.items():
        text += [f"### {machine}", ""]
        for result in measured:
            text += [f"`{result['command']}` (load average at the start {result['machine']['load_average']:.1f})", "",
                     "| what | median | smallest - largest | target | met |", "| --- | ---: | ---: | --- | --- |"]
            for row in [*result["targets"], *result["measurements"]]:
                unit = UNITS.get(row["unit"], f" {row['unit']}")
                target = row.get("target", "").replace(">=", "≥").replace("<=", "≤")
                met = {True: "yes", False: "no", None: ""}[row.get("met")]
                spread = f"{figure(row['min'])} - {figure(row['max'])}"
                text.append(f"| {row['what']} | {figure(row['median'])}{unit} | {spread} | "
                            f"{target + unit if target else ''} | {met} |")
            text.append("")
    return "\n".join(text)


def read_results() -> list[dict]:
    """Every result, by the name of its file."""
    return [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]


def filled(readme: str, results: list[dict]) -> str:
    """The page with its results replaced."""
    before, _, rest = readme.partition(START)
    return before + START + "\n" + tables(results) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    page = HERE / "README.md"
    page.write_text(filled(page.read_text(), read_results()))
