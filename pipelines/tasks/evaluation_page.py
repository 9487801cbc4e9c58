"""The page of a machine evaluation: our table beside the printed one of the paper, and what each number depends on.

In: rows of scores. Out: `report.html`, `scores.csv`, `distances.png` and a sheet of pictures side by side. The rows of
CogView's Table 1 are printed as that: as the paper's, measured by others, on other pictures than these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cogview.evaluation.features import ExtractorFacts
from cogview.evaluation.grids import Tile, draw_sheet
from cogview.shards.manifest import atomic_file
from pipelines.runtime.csv_file import write_csv
from pipelines.runtime.html import image_url, write_html
from pipelines.tasks.caption_choice import CaptionRow
from pipelines.tasks.picture_measures import SHOWN, picture_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "machine_evaluation.html"
# CogView, Table 1. FID-k: both sides under a Gaussian filter of radius k. The captions of CogView were translated.
PAPER_COLUMNS = ("FID-0", "FID-1", "FID-2", "FID-4", "FID-8", "IS", "CapLoss")
PAPER_ROWS: Mapping[str, tuple[float | None, ...]] = {
    "AttnGAN": (35.2, 44.0, 72.0, 108.0, 100.0, 23.3, 3.01),
    "DM-GAN": (26.5, 39.0, 73.0, 119.0, 112.3, 32.2, 2.87),
    "DF-GAN": (26.5, 33.8, 55.9, 91.0, 97.0, 18.7, 3.09),
    "DALL-E": (27.5, 28.0, 45.5, 83.5, 85.0, 17.9, None),
    "CogView": (27.1, 19.4, 13.9, 19.4, 23.6, 18.2, 2.43),
}
PAPER_CAPTIONS = 30_000
COLOURS = ("#d1495b", "#3b6ea5", "#2c7a5b", "#d98e04", "#7a5195", "#8a909c")
NOTHING = "–"
ORDER = ("F", "IS", "CapLoss", "K", "precision", "recall", "CLIP")  # the paper's columns, then others


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What the page tells of. sides: names in their order; rejected: side -> why rows have no picture."""

    rows: Sequence[Mapping[str, Any]]
    sides: Sequence[str]
    captions: Sequence[CaptionRow]
    captions_digest: str
    facts: ExtractorFacts
    radii: Sequence[int]
    settings: Mapping[str, str]
    rejected: Mapping[str, Mapping[str, int]]


def write_evaluation(evaluated: Evaluated, output: Path) -> tuple["Figure", Image.Image]:
    """Write the page and what stands in it; the plot and the sheet, for whoever else wants them."""
    write_csv([{**row, "warnings": "; ".join(row["warnings"])} for row in evaluated.rows], output / "scores.csv")
    figure = plot_distances(evaluated)
    with atomic_file(output / "distances.png") as file:
        figure.savefig(file, dpi=120, format="png")
    sheet = draw_sides(evaluated, output)
    with atomic_file(output / "pictures.png") as file:
        sheet.save(file, format="PNG")
    columns, table = pivot(evaluated)
    values = {
        "lead": _lead(evaluated),
        "columns": columns,
        "table": table,
        "paper_columns": PAPER_COLUMNS,
        "paper": [
            (name, [NOTHING if cell is None else f"{cell:g}" for cell in cells]) for name, cells in PAPER_ROWS.items()
        ],
        "is_fid": evaluated.facts.is_published,
        "caution": _caution(evaluated),
        "warnings": warning_lines(evaluated),
        "settings": evaluated.settings,
        "rejected": {side: reasons for side, reasons in evaluated.rejected.items() if reasons},
        "rows": evaluated.rows,
        "figures": [
            ("Distance by blur radius", image_url((output / "distances.png").read_bytes())),
            ("The first pictures of each side", image_url((output / "pictures.png").read_bytes())),
        ],
    }
    write_html(output / "report.html", template=TEMPLATE, values=values)
    return figure, sheet


def pivot(evaluated: Evaluated) -> tuple[list[str], list[tuple[str, list[tuple[str, str]]]]]:
    """(columns in the paper's order, for each side its cells: the value, and its interval)."""
    names = dict.fromkeys(row["score"] for row in evaluated.rows)
    columns = sorted(
        names, key=lambda name: next((n for n, start in enumerate(ORDER) if name.startswith(start)), len(ORDER))
    )
    found = {(row["side"], row["score"]): row for row in evaluated.rows}
    table = []
    for side in evaluated.sides:
        cells = [found.get((side, column)) for column in columns]
        table.append((side, [(NOTHING, "") if row is None else cell(row) for row in cells]))
    return columns, table


def warning_lines(evaluated: Evaluated) -> list[str]:
    """What keeps scores from being believed, each once, with the scores that it is about."""
    about: dict[str, list[str]] = {}
    for row in evaluated.rows:
        for text in row["warnings"]:
            about.setdefault(text, []).append(f"{row['side']} {row['score']}")
    return [f"{text} (of {', '.join(names)})" for text, names in about.items()]


def cell(row: Mapping[str, Any]) -> tuple[str, str]:
    """`27.1` and `26.8 to 27.4`."""
    return f"{row['value']:.4g}", f"{row['low']:.4g} to {row['high']:.4g}"


def plot_distances(evaluated: Evaluated) -> "Figure":
    """The distance from the real pictures against the blur radius, a line for each side; the paper's, if it is FID."""
    from matplotlib.figure import Figure

    name = evaluated.facts.score_name("FID", other="FD")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(evaluated.radii))
    found = {(row["side"], row["score"]): row for row in evaluated.rows}
    for number, side in enumerate(evaluated.sides):
        rows = [found.get((side, f"{name}-{radius}")) for radius in evaluated.radii]
        if all(rows):
            values = [row["value"] for row in rows if row]
            reach = [
                [row["value"] - row["low"] for row in rows if row],
                [row["high"] - row["value"] for row in rows if row],
            ]
            shifted = [place + 0.04 * (number - len(evaluated.sides) / 2) for place in places]
            axes.errorbar(shifted, values, yerr=reach, label=side, color=COLOURS[number % len(COLOURS)], capsize=3)
    if evaluated.facts.is_published and tuple(evaluated.radii) == (0, 1, 2, 4, 8):
        for system, cells in PAPER_ROWS.items():
            axes.plot(places, [cell or 0.0 for cell in cells[:5]], ":", color="#8a909c", linewidth=1)
            axes.annotate(f"{system} (paper)", (4, cells[4] or 0), color="#8a909c", fontsize=7)
    axes.set_xticks(places, [str(radius) for radius in evaluated.radii])
    axes.set(xlabel="blur radius in pixels, of both sides", ylabel=name, ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e5ea", linewidth=0.8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return figure


def draw_sides(evaluated: Evaluated, output: Path) -> Image.Image:
    """The first captions, each with the picture of every side."""
    tiles = []
    for row in evaluated.captions[:SHOWN]:
        paths = [output / picture_name(side, row.index) for side in evaluated.sides]
        pictures = tuple(Image.open(path).convert("RGB") for path in paths if path.is_file())
        if pictures:
            tiles.append(Tile(images=pictures, caption=row.caption, fallback=row.key))
    return draw_sheet(tiles, title=" | ".join(evaluated.sides), picture_side=112)


def _lead(evaluated: Evaluated) -> str:
    return (
        f"{len(evaluated.captions):,} captions ({evaluated.captions_digest[:12]}), features of {evaluated.facts.name} "
        f"(sha256 {evaluated.facts.sha256[:12]}), resized: {evaluated.facts.resize}. Below each score: 95 % intervals."
    )


def _caution(evaluated: Evaluated) -> str:
    """What keeps our numbers from standing beside the paper's."""
    reasons = []
    if not evaluated.facts.is_published:
        reasons.append(f"the features are those of {evaluated.facts.name}, not of the published Inception network")
    if len(evaluated.captions) != PAPER_CAPTIONS:
        reasons.append(f"there are {len(evaluated.captions):,} captions, not {PAPER_CAPTIONS:,}")
    if not reasons:
        return "The same captions are not known: the paper's are a sample of its own from MS COCO, in translation."
    return f"These rows cannot be compared with ours: {'; '.join(reasons)}."
