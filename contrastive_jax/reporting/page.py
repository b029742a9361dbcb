"""The HTML of a report: one file without scripts or network requests, for light and dark themes, wide and narrow screens."""

import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark; --paper: #fffefb; --ink: #22211f; --faint: #6a675f; --rule: #e2dfd6; --flag: #a03a12;
  --series-0: #0067a5; --series-1: #c8500a; --series-2: #008764; --series-3: #b04e8c; --series-4: #a67c00; --series-5: #3d9bd1;
  --series-6: #6a4c93; --series-7: #77736a;
  --letters: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #161615; --ink: #e3e0d8; --faint: #a09c92; --rule: #34332f;
  --flag: #ff9466; --series-0: #62b4ee; --series-1: #ff9550; --series-2: #3fcaa0; --series-3: #ea94c8; --series-4: #e5bd4a;
  --series-5: #a4d8f5; --series-6: #b79bdc; --series-7: #a8a49a; } }
* { box-sizing: border-box; }
body { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 "Iowan Old Style", Charter, "Bitstream Charter", "Palatino Linotype", Palatino, Georgia, serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.7rem; font-weight: 600; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; font-weight: 600; margin: 3.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--ink); }
h3 { font-size: 1rem; font-weight: 600; margin: 2rem 0 .4rem; }
p { max-width: 42rem; margin: .5rem 0; }
nav, .note, figcaption, caption, summary { color: var(--faint); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; }
a { color: inherit; text-decoration-color: var(--rule); text-underline-offset: .2em; }
code { font: .85em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.flag { color: var(--flag); }
.scroll { overflow-x: auto; margin: .6rem 0 1.4rem; }
table { border-collapse: collapse; border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink);
  font: .84rem/1.45 var(--letters); font-variant-numeric: tabular-nums; }
caption { caption-side: top; text-align: left; padding-bottom: .35rem; }
th { font-weight: 600; text-align: left; border-bottom: 1px solid var(--ink); vertical-align: bottom; }
th, td { padding: .22rem 1.1rem .22rem 0; }
td { vertical-align: top; } th:last-child, td:last-child { padding-right: 0; }
.figure { text-align: right; white-space: nowrap; }
tr.begin td { border-top: 1px solid var(--rule); }
.texts { min-width: 46rem; overflow-wrap: anywhere; } .texts td:nth-child(2), .texts td:nth-child(5) { width: 31%; }
.texts th { white-space: nowrap; } .texts td:first-child, .texts td:last-child { overflow-wrap: break-word; }
.results td:not(.figure) { white-space: nowrap; }
figure { margin: 0; } figcaption { max-width: 42rem; margin-top: .4rem; }
svg { display: block; width: 100%; max-width: 100%; height: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 1.4rem 1.6rem; }
.grid figcaption { margin: 0 0 .2rem; } details { margin-top: 1.4rem; } summary { cursor: pointer; margin-bottom: 1rem; }
.curve { max-width: 26rem; } .wide { max-width: 44rem; } .square { max-width: 32rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; padding: 0; margin: .4rem 0 1.2rem; list-style: none;
  font: .84rem/1.6 var(--letters); }
.legend span { margin-right: .45rem; } .wide + .legend { max-width: 44rem; margin-top: .8rem; }
"""


MAX_CHARACTERS = 160  # of a text in a table, and of the title


def shorten(text: str, size: int = MAX_CHARACTERS) -> str:
    """Returns a text on one line, truncated to `size` characters."""
    line = " ".join(text.split())
    return line if len(line) <= size else line[: size - 1].rstrip() + "…"


def html_page(title: str, links: Sequence[tuple[str, str]], sections: Sequence[str]) -> str:
    """Returns the whole page.

    Args:
      title: its title, as text.
      links: (id of a section, its name) for the navigation at the top.
      sections: the HTML of the sections.
    """
    anchors = "".join(f'<a href="#{name}">{html.escape(text)}</a>' for name, text in links)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<nav>{anchors}</nav>
{"".join(sections)}
</body>
</html>
"""


def section(name: str, title: str, *parts: str, level: int = 2) -> str:
    """Returns a section with the id `name`; its parts are HTML."""
    return (
        f'<section id="{html.escape(name)}">\n<h{level}>{html.escape(title)}</h{level}>\n' + "\n".join(parts) + "\n</section>\n"
    )


def paragraph(text: str, kind: str = "note") -> str:
    """Returns a text as a paragraph of a CSS class; what stands between backquotes becomes code."""
    pieces = html.escape(text).split("`")
    body = "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))
    return f'<p class="{kind}">{body}</p>'


def figure(svg: str, caption: str, kind: str = "wide", above: bool = False) -> str:
    """Returns an SVG as a figure of a CSS class, with its caption below it, or above it."""
    text = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f'<figure class="{kind}">{text + svg if above else svg + text}</figure>'


def legend(names: Sequence[str], glyphs: Sequence[tuple[str, int]]) -> str:
    """Returns a legend: each name behind its (glyph, number of the glyph's colour)."""
    items = [
        f'<li><span style="color: var(--series-{colour})">{glyph}</span>{html.escape(name)}</li>'
        for name, (glyph, colour) in zip(names, glyphs, strict=True)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def table(head: Sequence[str], rows: Sequence[Sequence[str | float]], kind: str, caption: str = "") -> str:
    """Returns a table in a box that scrolls by itself.

    Args:
      head: the names of the columns.
      rows: the cells of each row; numbers are shown with one decimal. A rule separates a row whose first cell is not empty from
        the row above it.
      kind: the CSS class of the table.
      caption: a text above the table.
    """
    is_numeric = [any(isinstance(row[column], float) for row in rows) for column in range(len(head))]

    def cell(tag: str, column: int, value: str | float) -> str:
        text = f"{value:.1f}" if isinstance(value, float) else html.escape(value)
        return f'<{tag} class="figure">{text}</{tag}>' if is_numeric[column] else f"<{tag}>{text}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", column, name) for column, name in enumerate(head)) + "</tr>"]
    for number, row in enumerate(rows):
        begins = ' class="begin"' if number and row[0] else ""
        lines.append(f"<tr{begins}>" + "".join(cell("td", column, value) for column, value in enumerate(row)) + "</tr>")
    above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    body = "<thead>" + lines[0] + "</thead><tbody>" + "\n".join(lines[1:]) + "</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{above}{body}</table></div>'
