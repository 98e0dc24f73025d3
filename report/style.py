"""The look of every figure: colours, size, grid, names as they are; and its files.

    figure = new_figure(8, 4.5)
    save_figure(figure, Path("plots/LoRA-12345_loss"))
"""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from report.records import STUDENTS, replacing

# Okabe and Ito's palette: colour-blind readers can tell these apart.
BLACK, BLUE, VERMILLION, GREEN, PURPLE, GREY = "#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
SET_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, "#E69F00", "#56B4E9", BLACK)
STUDENT_LOOKS = dict(zip(STUDENTS, ((BLUE, "o"), (VERMILLION, "s")), strict=True))


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of `width` x `height` inches."""
    # Figure and canvas of its own: pyplot would keep every figure and may open a window.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes, grid: str = "both") -> None:
    """Draws a light grid, and no frame at the top and on the right."""
    axes.grid(alpha=0.25, axis=grid)
    axes.spines[["top", "right"]].set_visible(False)


def literal(text: object) -> str:
    """Returns a text that Matplotlib prints as it is. A pair of $ would make mathematics of the text between them."""
    return str(text).replace("$", r"\$")


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as `.png` (200 dpi) and `.pdf`, in this order; the same figure gives the same bytes."""
    written = []
    # By default, version of Matplotlib and time of creation would stand in the files.
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        written.append(stem.with_name(f"{stem.name}.{kind}"))
        with replacing(written[-1]) as temporary:
            figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)
    return written
