"""Tables, figures and the page of a report, as HTML that loads nothing."""

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, ScalarFormatter

from dreamprm_dist.data.images import decode_image
from dreamprm_dist.errors import RecordError
from dreamprm_dist.report.style import shortened

THUMBNAIL = 320  # pixels
MOST_TEXT = 300  # characters of a cell

# Its text, or its text and a small note under it.
Cell = str | tuple[str, str]

PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def whole_page(
    name: str, title: str, verdict: Iterable[str], sections: Mapping[str, Sequence[str]]
) -> str:
    """The page.

    Args:
        verdict: what the page says first, in paragraphs.
        sections: HTML by heading; one without content is left out.
    """
    page = PAGE.substitute(
        name=escape(name),
        title=escape(title),
        verdict="\n".join(f'<p class="verdict">{escape(text)}</p>' for text in verdict),
        sections="\n".join(
            f"<section><h2>{escape(heading)}</h2>{wrap('grid', ''.join(parts))}</section>"
            for heading, parts in sections.items()
            if any(parts)
        ),
    )
    return page.encode("utf-8", "replace").decode()  # a text of JSON may hold half a surrogate pair


def axes_of(height: float = 2.9) -> tuple[Figure, matplotlib.axes.Axes]:
    """A figure of the page's width and its axes; height in inches."""
    figure = Figure(figsize=(4.6, height))
    return figure, figure.subplots()


def svg_figure(figure: Figure, label: str, caption: str) -> str:
    """A plot as inline SVG: no date, no outside names, no id that another plot has."""
    if labels := figure.axes[0].get_legend_handles_labels()[1]:
        columns = 3 if max(map(len, labels)) < 20 else 2
        figure.legend(loc="outside upper left", ncols=columns, columnspacing=1, handlelength=1.6)
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        if isinstance(axis.get_major_formatter(), ScalarFormatter):
            # Each tick says all of its number: no offset, no factor at the axis' end.
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    [(box, drawing)] = re.findall(r'<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)', buffer.getvalue(), re.S)
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawing, flags=re.S)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    return (
        f'<figure><svg {box} role="img" aria-label="{escape(label)}">{drawing.strip()}'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def wrap(name: str, content: str) -> str:
    """Content, where there is any, in a box of a class of the page's style."""
    return content and f'<div class="{name}">{content}</div>'


def notes(lines: Iterable[str]) -> str:
    """Sentences as a list, where there are any."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return items and f'<ul class="notes wide">{items}</ul>'


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table in a box that scrolls by itself, where there are rows."""
    body = ""
    for first, *cells in rows:
        body += f'<tr><th scope="row">{_cell(first)}</th>'
        body += "".join(f"<td>{_cell(cell)}</td>" for cell in cells) + "</tr>\n"
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return body and (
        f'<figure class="table"><figcaption>{escape(caption)}</figcaption>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>\n'
        f"<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}</tbody></table></div></figure>\n"
    )


def _cell(cell: Cell) -> str:
    text, note = (cell, "") if isinstance(cell, str) else cell
    return escape(shortened(text, MOST_TEXT)) + (note and f"<small>{escape(note)}</small>")


def thumbnail(data: bytes) -> str:
    """An encoded image in small, embedded; a sentence in place of one that is broken."""
    try:
        image = decode_image(data)
    except RecordError:
        return "<p>(image cannot be shown)</p>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="the question\'s image" src="data:image/webp;base64,{encoded}">'
