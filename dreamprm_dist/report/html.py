"""Tables, figures and the page of a report, as HTML that loads nothing."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import matplotlib
from matplotlib.figure import Figure

from dreamprm_dist.report.style import method_of

PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def whole_page(name: str, title: str, verdict: str, sections: Mapping[str, Sequence[str]]) -> str:
    """The page; sections are HTML by heading, and one without content is left out."""
    return PAGE.substitute(
        name=escape(name),
        title=escape(title),
        verdict=escape(verdict),
        sections="\n".join(
            f"<section><h2>{escape(heading)}</h2>{wrap('grid', ''.join(parts))}</section>"
            for heading, parts in sections.items()
            if any(parts)
        ),
    )


def axes_of(height: float = 2.9) -> tuple[Figure, matplotlib.axes.Axes]:
    """A figure of the page's width and its axes; height in inches."""
    figure = Figure(figsize=(4.6, height))
    return figure, figure.subplots()


def svg_figure(figure: Figure, label: str, caption: str) -> str:
    """A plot as inline SVG: no date, no outside names, no id that another plot has."""
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1, handlelength=1.6)
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


def html_table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], by_method: bool = False
) -> str:
    """A table in a box that scrolls by itself; `by_method`: rows start with a method's name."""
    body = ""
    for first, *cells in rows:
        label, note, _ = method_of(first) if by_method else (first, "", "")
        note = note and f"<small>{escape(note)}</small>"
        body += f'<tr><th scope="row">{escape(label)}{note}</th>'
        body += "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n"
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return body and (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{titles}</tr></thead>\n"
        f"<tbody>\n{body}</tbody></table></div>\n"
    )
