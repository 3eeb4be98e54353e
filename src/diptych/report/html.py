"""A report in one HTML file: nothing is fetched when it is opened, on any machine, now or in ten years.

A report is sections, a section is blocks (``report.blocks``). All text is escaped.
"""

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from diptych.report.blocks import Block
from diptych.report.files import write_bytes
from diptych.report.markup import inline

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<header>
<svg class="mark" viewBox="0 0 26 18" aria-hidden="true"><path d="M1 3.5 12.2 1v16L1 14.5Z" fill="currentColor"/>\
<path d="M25 3.5 13.8 1v16L25 14.5Z" fill="currentColor" opacity=".45"/></svg>
<h1>$heading</h1>
$lead
$links
</header>
<main>
$body
</main>
$footer
</body>
</html>
""")


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    blocks: Sequence[Block]

    def render(self, anchor: str) -> str:
        body = "\n".join(block.render() for block in self.blocks)
        return f'<section id="{anchor}">\n<h2>{inline(self.title)}</h2>\n{body}\n</section>'


def write_report(
    path: str | os.PathLike[str], sections: Sequence[Section], *, title: str, lead: str = "", footer: str = ""
) -> Path:
    """Write the report to ``path``; the file is whole or not there."""
    anchors = {f"section-{number}": section for number, section in enumerate(sections, start=1)}
    links = "\n".join(f'<a href="#{anchor}">{inline(section.title)}</a>' for anchor, section in anchors.items())
    page = PAGE.substitute(
        title=html.escape(title),
        style=(files("diptych.report") / "style.css").read_text(encoding="utf-8"),
        heading=inline(title),
        lead=f'<p class="lead">{inline(lead)}</p>' if lead else "",
        links=f"<nav>{links}</nav>" if len(sections) > 2 else "",
        body="\n".join(section.render(anchor) for anchor, section in anchors.items()),
        footer=f"<footer>{inline(footer)}</footer>" if footer else "",
    )
    return write_bytes(path, page.encode())
