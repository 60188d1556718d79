"""One self-contained page of figures and tables."""
import base64
import html
import os
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

STYLE = '''body { font-family: sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.15rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } figcaption { color: #444; }'''

Section = Tuple[str, str, Path]  # title, explanation, picture


def write_page(path: Path, title: str, intro: str, sections: Sequence[Section],
               tables: Dict[str, List[Sequence]]) -> None:
    """Write the page, all or nothing; pictures are put into it.

    Args:
        path: of the page.
        title, intro: of the page, as plain text.
        sections: a picture each, with its title and what it shows.
        tables: rows by title, of which the first is the header.
    """
    parts = [f'<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>']
    for name, explanation, picture in sections:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<h2>{html.escape(name)}</h2><figure>'
                     f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
                     f'<figcaption>{html.escape(explanation)}</figcaption></figure>')
    for name, rows in tables.items():
        parts.append(f'<h2>{html.escape(name)}</h2>{_table(rows)}')
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<title>{html.escape(title)}</title><style>{STYLE}</style></head>'
            f'<body>{"".join(parts)}</body></html>')
    unfinished = path.with_name(f'.{path.name}.part')
    unfinished.write_text(page, encoding='utf-8')
    os.replace(unfinished, path)


def _table(rows: List[Sequence]) -> str:
    header, *body = rows
    lines = [_row(header, 'th'), *(_row(row, 'td') for row in body)]
    return f'<table>{"".join(lines)}</table>'


def _row(cells: Sequence, tag: str) -> str:
    return '<tr>' + ''.join(f'<{tag}>{html.escape(_text(c))}</{tag}>' for c in cells) + '</tr>'


def _text(cell) -> str:
    return f'{cell:.3g}' if isinstance(cell, float) else str(cell)
