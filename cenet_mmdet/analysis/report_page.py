"""A channel report as one self-contained page, with its figures and numbers in files."""
import base64
import html
from pathlib import Path
from typing import Any, List, Mapping, Sequence, Tuple

from ..utils.files import replacing
from . import figures
from .report import Report

STYLE = '''body { font-family: sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.15rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } figcaption { color: #444; }'''
# What draws each figure, its title and explanation.
SECTIONS: List[Tuple[Any, str, str]] = [
    (figures.inhibited, 'Inhibited channels', 'Share of channels behind each rectifier with a mean '
     '|activation| below the threshold (Figures 1 and 4d of the paper).'),
    (figures.gammas, 'Gamma', 'Left: share of channels of each norm with |gamma| below the '
     'threshold; dotted: the same for the effective W gamma behind CE. Right: growth of the norm '
     'of gamma by batch decorrelation (Proposition 1).'),
    (figures.magnitudes, 'Magnitude of features', 'l2 norm over the channels at each position '
     '(Figure 3).'),
    (figures.correlations, 'Correlation between channels', 'Mean absolute correlation of all pairs '
     'of channels that vary: in front of CE, behind BD and IR by themselves, and behind CE. In a '
     'model without CE: behind the norms that CE follows in the other models, or behind all norms '
     '(Figure 5).'),
    (figures.operators, 'What CE learned', 'lambda, the range of the eigenvalues of W, and how '
     "much IR's weights differ between images."),
    (figures.ablation, 'Cumulative ablation', 'The metric as random channels of the norms are '
     'zeroed: mean (line) and range (band) of the seeds (Figures 1c and 4c).'),
]


def write_report(report: Report, images: Sequence, maps: Mapping[str, Sequence],
                 folder: Path) -> None:
    """Write report.html, its figures, and at last report.json, into a new or old folder.

    `images` and `maps` are those of `figures.magnitudes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    body = [f'<h1>Channels</h1><p>{len(report.models)} models on {report.images} images.</p>']
    for draw, title, explanation in SECTIONS:
        path = folder / f'{draw.__name__}.png'
        if draw(*(images, maps) if draw is figures.magnitudes else [report], path):
            picture = base64.b64encode(path.read_bytes()).decode()
            body.append(f'<h2>{title}</h2><figure>'
                        f'<img alt="{title}" src="data:image/png;base64,{picture}">'
                        f'<figcaption>{html.escape(explanation)}</figcaption></figure>')
    body.append('<h2>Summary</h2><table>')
    for row, tag in zip(report.table(), ['th', *['td'] * len(report.models)]):
        body += ['<tr>', *(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row), '</tr>']
    with replacing(folder / 'report.html') as partial:
        partial.write_text('<!doctype html><html lang="en"><head><meta charset="utf-8">'
                           f'<title>Channels</title><style>{STYLE}</style></head>'
                           f'<body>{"".join(body)}</table></body></html>', encoding='utf-8')
    report.write(folder / 'report.json')
