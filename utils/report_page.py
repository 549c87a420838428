"""report.html: a self-contained page about a run, with its settings, results and example searches."""

import base64
import html
import io
from pathlib import Path

import numpy as np
import torch

from config import Config, InputError
from utils.files import atomic_write
from utils.plotting import open_image

MAX_CAPTIONS = 5000  # whose rankings are examined
EXAMPLES, SHOWN = 5, 5  # searches per section, and images per search
LENGTHS = ((1, 5), (6, 8), (9, 11), (12, 15), (16, None))  # words of a caption
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } img.curves { width: 100%; }
.search { margin: 1rem 0; } .images { display: flex; gap: .5rem; } figure { margin: 0; width: 19%; }
figure img { width: 100%; height: 8rem; object-fit: contain; background: #f4f4f4; border: 4px solid transparent; }
figure.own img { border-color: #2a9d4b; } figcaption { font-size: .8rem; color: #555; overflow-wrap: anywhere; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
"""


@torch.no_grad()
def write_page(folder, config, results, pairs, image_embeddings, text_embeddings):
    """Write report.html of a run; `pairs` is the evaluated split, with embeddings (N, D) and (T, D)."""
    folder = Path(folder)
    random = np.random.default_rng(0)
    chosen = np.sort(random.permutation(len(pairs.captions))[:MAX_CAPTIONS])
    ranking = rank_images(image_embeddings, text_embeddings, pairs.image_index, chosen)
    ranks, margins = ranking["ranks"], ranking["margins"]
    order = random.permutation(len(chosen))
    right, wrong = order[ranks[order] == 1][:EXAMPLES], order[ranks[order] > 10][:EXAMPLES]
    hardest = np.argsort(-margins, kind="stable")[:EXAMPLES]
    title = f"CLIP run {folder.name}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(describe(config, results))}</p>",
        "<h2>Results</h2>",
        recall_table(results),
        "<p>± is the half width of a 95% confidence interval (bootstrap over images).</p>",
        curves(folder / "curves.png"),
        "<h2>Recall by length of the caption</h2>",
        length_table(pairs, chosen, ranks),
    ]
    for heading, rows in (
        ("Searches that succeed", right),
        ("Searches that fail: the caption's own image is not among the first ten", wrong),
        ("Hardest confusions: another image is far more similar than the caption's own", hardest),
    ):
        parts.append(f"<h2>{heading}</h2>")
        parts += [search(pairs, chosen[row], ranking["best"][row], ranks[row]) for row in rows]
        parts += ["<p>None.</p>"] * (len(rows) == 0)
    parts += ["<h2>Settings</h2>", f"<pre>{html.escape(settings(config))}</pre>"]
    head = f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    page = f"{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    with atomic_write(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def rank_images(image_embeddings, text_embeddings, image_index, chosen):
    """For C captions: rank of the own image (C,), margin of the best other image over it (C,), best images (C, K)."""
    found = {"ranks": [], "margins": [], "best": []}
    for part in np.array_split(chosen, max(1, len(chosen) // 500)):
        scores = text_embeddings[torch.from_numpy(part)] @ image_embeddings.T
        own = torch.as_tensor(image_index[part], device=scores.device)[:, None]
        own_scores = scores.gather(1, own)
        found["ranks"].append((scores >= own_scores).sum(1))
        found["best"].append(scores.topk(min(SHOWN, scores.shape[1])).indices)
        found["margins"].append((scores.scatter(1, own, -2) - own_scores).amax(1))
    return {name: torch.cat(values).cpu().numpy() for name, values in found.items()}


def describe(config, results):
    encoders = f"{Path(config.model_name).name} and {Path(config.text_encoder_model).name}"
    return f"{encoders}, evaluated on {results['images']:,} images of the {results['split']} split."


def recall_table(results):
    """The recalls in both directions, with their confidence intervals."""
    head = "<tr><th></th><th>R@1</th><th>R@5</th><th>R@10</th><th>median rank</th></tr>"
    rows = []
    for way in ("text_to_image", "image_to_text"):
        cells = [f"{results[f'{way}_R@{k}']:.1f} ± {results['ci95'][f'{way}_R@{k}']:.1f}" for k in (1, 5, 10)]
        cells.append(f"{results[f'{way}_median_rank']:.0f}")
        rows.append(f"<tr><td>{way.replace('_', ' ')}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    rsum = f"rsum {results['rsum']:.1f} ± {results['ci95']['rsum']:.1f}"
    return f"<table>{head}{''.join(rows)}</table><p>{rsum}</p>"


def length_table(pairs, chosen, ranks):
    """Text-to-image recalls of captions by their number of words."""
    words = np.array([len(pairs.captions[caption].split()) for caption in chosen])
    rows = ["<tr><th>words</th><th>captions</th><th>R@1</th><th>R@10</th></tr>"]
    for low, high in LENGTHS:
        inside = (words >= low) & (words <= (high or words.max(initial=0)))
        if inside.any():
            shares = [f"{100 * (ranks[inside] <= k).mean():.1f}" for k in (1, 10)]
            name = f"{low} to {high}" if high else f"{low} and more"
            rows.append(f"<tr><td>{name}</td><td>{inside.sum():,}</td>{''.join(f'<td>{x}</td>' for x in shares)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def search(pairs, caption, best, rank):
    """A caption with its best images; its own image has a green frame."""
    own = pairs.image_index[caption]
    shown = [int(image) for image in best] + ([int(own)] if own not in best else [])
    figures = []
    for image in shown[: SHOWN - 1] + [shown[-1]] if len(shown) > SHOWN else shown:
        name, source = html.escape(Path(pairs.names[image]).name), thumbnail(pairs.files[image])
        kind = ' class="own"' if image == own else ""
        figures.append(f'<figure{kind}><img src="{source}" alt="{name}"><figcaption>{name}</figcaption></figure>')
    heading = f"{html.escape(pairs.captions[caption])} <small>(rank of its own image: {rank})</small>"
    return f'<div class="search">{heading}<div class="images">{"".join(figures)}</div></div>'


def thumbnail(file):
    """An image as a JPEG data URI; empty if it can no longer be read."""
    try:
        image = open_image(file)
    except (InputError, OSError):
        return ""
    image.thumbnail((240, 240))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return data_uri(buffer.getvalue(), "jpeg")


def curves(file):
    if not file.exists():
        return ""
    return f'<h2>Training</h2><img class="curves" src="{data_uri(file.read_bytes(), "png")}" alt="training curves">'


def data_uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def settings(config):
    """The settings that differ from the defaults, a line each."""
    default = Config()
    changed = {name: value for name, value in vars(config).items() if value != getattr(default, name)}
    return "\n".join(f"{name} = {value}" for name, value in changed.items())
