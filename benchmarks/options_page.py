"""Writes docs/options.md, a table of every option of each mode, and of every preset.

    python -m benchmarks.options_page
"""
from __future__ import annotations

import tomllib

from options.declare import ROOT, Option, options_of
from options.modes import MODES
from options.schema import FREE

PAGE = ROOT / "docs" / "options.md"
HEAD = """# Options

Made by `python -m benchmarks.options_page` from the fields in `options/`; do not edit. `run.py MODE --help` shows the most
used options, `--help all` every one. Precedence: default, preset, `--config FILE` (JSON or TOML, such as a run's
`config.json`), flag. Options marked with \\* change no result: a run may be resumed with others.
"""


def row(option: Option) -> str:
    """Returns an option as a row of a Markdown table."""
    value = option.default
    # As it is written on the command line.
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    default = "" if value in (None, "") or option.kind is bool else f"`{value}`"
    if option.preset:
        default = f"{default or 'none'}, or the preset's"
    allowed = option.expected if option.kind in (int, float) or option.choices or option.pattern else ""
    flag = f"`{option.flag}`" + (" \\*" if option.name in FREE else "")
    # A bar inside a cell would end it.
    cells = (flag, option.help, allowed, default)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """Returns docs/options.md."""
    parts = [HEAD]
    for name, mode in MODES.items():
        declared = [option for cls in mode.options for option in options_of(cls, name)]
        flags = [option for option in declared if not option.positional and not option.hidden]
        parts += [f"\n## {name}\n\n{mode.help[0].upper()}{mode.help[1:]}: `python run.py {mode.example}`.\n",
                  "\n| option | meaning | allowed | default |\n| --- | --- | --- | --- |\n",
                  "".join(row(option) + "\n" for option in flags)]
    parts.append("\n## Presets\n\nA run takes the preset of its mode, task and `--plain`, or that of `--preset`.\n")
    for path in sorted((ROOT / "options" / "presets").glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        # A preset that cannot be read is found early.
        tomllib.loads(text)
        parts.append(f"\n`{path.stem}`:\n\n```toml\n{text}```\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
