"""Pictures of results: grids of matches, captions and labels of a picture, confusion matrices."""

import textwrap
import warnings

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from config import InputError
from dataset import EvaluationImages
from images import upright_rgb
from index import embed_captions, run_encoder

matplotlib.rcParams["text.parse_math"] = False  # a dollar in a caption or a file name is a dollar
warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)  # letters that the font lacks are boxes, as everywhere
MATCH, WEAK = "limegreen", "lightgrey"  # frames and bars: a match, or not


def draw_grid(panels, path, columns=3):
    """Save grids of pictures, one under another, each picture in its own proportions under its title.

    Args:
        panels: a list of (heading, files, titles, colours); a colour frames its picture, None leaves it unframed.
    """
    columns = min(columns, max(len(files) for _, files, _, _ in panels))
    width = max(3.2 * columns, 6.4)
    headings = [wrap(heading, width, 14) for heading, *_ in panels]
    rows = [-(-len(files) // columns) for _, files, _, _ in panels]
    heights = [3.5 * count + 0.28 * len(lines) + 0.2 for count, lines in zip(rows, headings, strict=True)]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(panels), 1, height_ratios=heights))
    for part, lines, count, (_, files, titles, colours) in zip(parts, headings, rows, panels, strict=True):
        part.suptitle("\n".join(lines), fontsize=14)
        axes = part.subplots(count, columns, squeeze=False).ravel()
        for axis in axes[len(files) :]:
            axis.set_axis_off()
        for axis, file, title, colour in zip(axes, files, titles, colours, strict=False):
            show_picture(axis, file, colour)
            axis.set_title(as_text(title), fontsize=10)
    save(figure, path)


def wrap(text, width, size, lines=4):
    """The lines of a text that fit into `width` inches at a font size; line breaks in it stay."""
    letters = int(width * 72 / (0.58 * size))
    parts = [textwrap.wrap(line, letters, max_lines=lines, placeholder=" ...") for line in as_text(text).split("\n")]
    return [line for part in parts for line in part]


def as_text(name):
    """A file's name with question marks for bytes that are no text, which matplotlib refuses."""
    return name.encode("utf-8", "replace").decode()


def save(figure, path):
    figure.savefig(path, dpi=80, bbox_inches="tight", pad_inches=0.15)


def show_picture(axis, file, colour=None, width=5):
    """A picture on an axis without ticks, in a coloured frame if a colour is given."""
    axis.imshow(open_picture(file))
    axis.set(xticks=[], yticks=[], anchor="N")  # in a row, wide and tall pictures hang from one line
    for spine in axis.spines.values():
        spine.set(visible=colour is not None, color=colour or "white", linewidth=width)


def draw_bars(file, heading, names, values, colours, path, digits=2):
    """Save a picture beside horizontal bars, the first on top: what describes it, and how well.

    The bars begin at zero or, with values below it, a little below the least: the best is always the longest.
    """
    names = ["\n".join(textwrap.wrap(name, 44, max_lines=3, placeholder=" ...")) for name in names]
    lines = sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(11, max(4.0, 0.22 * lines + 0.22 * len(names) + 0.8)), layout="constrained")
    figure.suptitle("\n".join(wrap(heading, 11, 14)), fontsize=14)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    show_picture(left, file)
    rows = max(len(names), 4)  # a single bar is not to fill the picture
    places = rows - 1 - np.arange(len(names))
    least, most = min(values), max(values)
    base = 0 if least >= 0 else least - 0.1 * max(most - least, 0.1)
    right.barh(places, [value - base for value in values], left=base, color=colours, height=0.6)
    for place, value in zip(places, values, strict=True):
        right.text(value, place, f" {value:.{digits}f}", va="center", fontsize=10)
    right.set_yticks(places, names, fontsize=10)
    right.set(xticks=[], xlim=(base, base + 1.18 * max(most - base, 1e-6)), ylim=(-0.6, rows - 0.4))
    right.tick_params(left=False)
    right.spines[["top", "right", "bottom"]].set_visible(False)
    save(figure, path)


def draw_confusion(counts, labels, path, heading):
    """Save a confusion matrix: rows the true labels, columns the labels given; shares of each row, in per cent."""
    counts = np.asarray(counts, dtype=float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.6, 0.62 * len(labels) + 2.2)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    names = [textwrap.shorten(label, 22, placeholder=" ...") for label in labels]
    axis.set_xticks(range(len(labels)), names, rotation=45 if max(map(len, names)) > 5 else 0, ha="right")
    if max(map(len, names)) <= 5:
        axis.set_xticks(range(len(labels)), names, ha="center")
    axis.set_yticks(range(len(labels)), [f"{n} ({int(c)})" for n, c in zip(names, counts.sum(1), strict=True)])
    axis.set(xlabel="label given", ylabel="true label (pictures)")
    axis.set_title("\n".join(wrap(heading, side, 11)), fontsize=11)
    if len(labels) <= 25:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 55 else "black"
            axis.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, ax=axis, shrink=0.7, label="per cent of the true label's pictures")
    save(figure, path)


def open_picture(file, longest=320, narrowest=64):
    """A picture upright and in its own proportions, no larger than it will be shown, as a PIL image.

    A strip gets white borders: its frame would cover it.
    """
    try:
        with Image.open(file) as image:
            image = upright_rgb(image)
            image.thumbnail((longest, longest))
            width, height = image.size
            least = narrowest * max(image.size) // longest
            size = (max(width, least), max(height, least))
            return image if size == image.size else ImageOps.pad(image, size, color="white")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"picture {file} cannot be read ({error})") from None


@torch.no_grad()
def draw_queries(model, pairs, store, path, rows=4, columns=5):
    """For a few captions of a split, the best matching pictures; the caption's own has a green frame."""
    images = EvaluationImages(store, range(len(store)), model.config.size)
    image_embeddings = run_encoder(model.encode_image, images, model.device)
    rng = np.random.default_rng(0)
    chosen = [rng.integers(*pairs.first[i : i + 2]) for i in rng.permutation(len(pairs.files))[:rows]]
    columns = min(columns, len(pairs.files))
    scores = embed_captions(model, [pairs.captions[j] for j in chosen]) @ image_embeddings.T
    best = scores.topk(columns)
    figure = Figure(figsize=(2.3 * columns, 2.75 * len(chosen)), layout="constrained")
    for row, part in enumerate(np.atleast_1d(figure.subfigures(len(chosen), 1))):
        caption = pairs.captions[chosen[row]]
        rank = int((scores[row] >= scores[row, pairs.image_index[chosen[row]]]).sum())
        part.suptitle(f"{textwrap.shorten(caption, 100)}   (its own picture: place {rank})", fontsize=11)
        for column, axis in enumerate(np.atleast_1d(part.subplots(1, columns))):
            image = int(best.indices[row, column])
            own = image == pairs.image_index[chosen[row]]
            show_picture(axis, pairs.files[image], MATCH if own else None)
            axis.set_title(f"{best.values[row, column]:.2f}", fontsize=9)
    save(figure, path)
