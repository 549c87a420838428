"""Figures: search results, label probabilities, confusion matrices, training curves, GAN samples."""

import sys
import textwrap
import warnings

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import ImageOps

from utils.files import atomic_write
from utils.image_cache import load_image

matplotlib.rcParams["text.parse_math"] = False  # captions and file names may contain dollar signs
warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)  # characters missing from the font are drawn as boxes
MATCH, WEAK = "limegreen", "lightgrey"  # colours of frames and bars
MAX_ROWS = 60  # of a grid: matplotlib cannot draw much larger figures
MAX_BARS = 20
MAX_LENGTH, MIN_LENGTH = 320, 64  # pixels of a plotted image: maximum of the longer, minimum of the shorter edge
TIGHT = {"dpi": 80, "bbox_inches": "tight", "pad_inches": 0.15}


def save_figure(figure, path, **options):
    """Save a figure in the format that the file's name ends in."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, **options)


def plot_grid(panels, path, columns=3):
    """Save image grids, one below another. Returns the number of images left out.

    `panels` is a list of (heading, image files, titles, colors); a color frames its image, None draws no frame.
    """
    columns = min(columns, max(len(files) for _, files, _, _ in panels))
    width, free_rows, omitted, shown = max(3.2 * columns, 6.4), MAX_ROWS, 0, []
    for heading, *cells in panels:
        rows = min(-(-len(cells[0]) // columns), free_rows)
        omitted += max(0, len(cells[0]) - rows * columns)
        free_rows -= rows
        shown += [(rows, wrap_text(heading, width, 14), cells)] if rows else []
    heights = [3.5 * rows + 0.28 * len(lines) + 0.2 for rows, lines, _ in shown]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(shown), 1, height_ratios=heights))
    for part, (rows, lines, cells) in zip(parts, shown, strict=True):
        part.suptitle("\n".join(lines), fontsize=14)
        for number, (file, title, color) in zip(range(rows * columns), zip(*cells, strict=True), strict=False):
            axis = part.add_subplot(rows, columns, number + 1)
            show_image(axis, file, color)
            axis.set_title(printable(title), fontsize=10)
    save_figure(figure, path, **TIGHT)
    return omitted


def plot_bars(file, heading, names, values, colors, path):
    """Save an image beside horizontal bars, one per name, the first on top. Returns the number of bars left out."""
    omitted, values = len(names[MAX_BARS:]), values[:MAX_BARS]
    names = ["\n".join(textwrap.wrap(name, 44, max_lines=3, placeholder=" ...")) for name in names[:MAX_BARS]]
    num_lines = len("\n".join(names).split("\n"))
    figure = Figure(figsize=(11, max(4.0, 0.22 * num_lines + 0.22 * len(names) + 0.8)), layout="constrained")
    figure.suptitle("\n".join(wrap_text(heading, 11, 14)), fontsize=14)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    show_image(left, file)
    rows = max(len(names), 4)  # keeps a single bar narrow
    positions = rows - 1 - np.arange(len(names))
    low, high = min(values), max(values)
    base = 0 if low >= 0 else low - 0.1 * max(high - low, 0.1)  # the largest value always has the longest bar
    colors = [color or WEAK for color in colors[:MAX_BARS]]
    bars = right.barh(positions, np.subtract(values, base), left=base, color=colors, height=0.6)
    right.bar_label(bars, [f" {value:.2f}" for value in values], fontsize=10)
    right.set_yticks(positions, names, fontsize=10)
    right.set(xticks=[], xlim=(base, base + 1.18 * max(high - base, 1e-6)), ylim=(-0.6, rows - 0.4))
    right.tick_params(left=False)
    right.spines[["top", "right", "bottom"]].set_visible(False)
    save_figure(figure, path, **TIGHT)
    return omitted


def plot_confusion(counts, labels, path, heading):
    """Save a confusion matrix as percentages of each row: rows are true labels, columns predicted labels (K, K)."""
    counts = np.asarray(counts, dtype=float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = max(4.6, 0.62 * len(labels) + 2.2)  # inches
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    names = [textwrap.shorten(label, 22, placeholder=" ...") for label in labels]
    rotation, alignment = (45, "right") if max(map(len, names)) > 5 else (0, "center")
    axis.set_xticks(range(len(labels)), names, rotation=rotation, ha=alignment)
    axis.set_yticks(range(len(labels)), [f"{n} ({int(c)})" for n, c in zip(names, counts.sum(1), strict=True)])
    axis.set(xlabel="predicted label", ylabel="true label (images)")
    axis.set_title("\n".join(wrap_text(heading, size, 11)), fontsize=11)
    for row, column in np.argwhere(counts > 0) if len(labels) <= 25 else []:
        color = "white" if shares[row, column] > 55 else "black"
        axis.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=color, fontsize=9)
    figure.colorbar(image, ax=axis, shrink=0.7, label="% of the images with the true label")
    save_figure(figure, path, **TIGHT)


def plot_matches(pairs, image_embeddings, text_embeddings, path, rows=4, columns=5):
    """Save the best matching images of a few captions of a split, a row each; a caption's own image has a green frame.

    `pairs` is a `dataset.Pairs`, with embeddings (N, D) of its images and (T, D) of its captions.
    """
    rng, panels = np.random.default_rng(0), []
    for own in rng.permutation(len(pairs.files))[:rows].tolist():
        caption = rng.integers(*pairs.caption_offsets[own : own + 2])
        scores = (image_embeddings @ text_embeddings[caption]).cpu()
        rank, best = int((scores >= scores[own]).sum()), scores.topk(min(columns, len(scores))).indices.tolist()
        heading = f"{textwrap.shorten(pairs.captions[caption], 100)}   (rank of its own image: {rank})"
        colors = [MATCH if image == own else None for image in best]
        panels.append((heading, [pairs.files[i] for i in best], [f"{scores[i]:.2f}" for i in best], colors))
    plot_grid(panels, path, columns)


def plot_curves(history, path):
    """Save losses, validation recalls and the temperature over the epochs; `history` has a dict for each epoch."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = {
        "contrastive loss": {"training": "train_loss", "validation": "validation_loss"},
        "validation recall, text to image (%)": {f"R@{k}": f"text_to_image_R@{k}" for k in (1, 5, 10)},
        "temperature": {"temperature": "temperature"},
    }
    for axis, (title, curves) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for label, key in curves.items():
            axis.plot([line["epoch"] for line in history], [line[key] for line in history], marker=".", label=label)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend()
    save_figure(figure, path, dpi=100)


def plot_gan_samples(path, titles, rows, columns=2):
    """Save real and generated images of captions (`titles`), `columns` captions side by side.

    `rows` holds for each caption its real image and a list of generated images, all (H, W, 3) floats in [0, 1].
    """
    num_images, num_rows = 1 + max(len(generated) for _, generated in rows), -(-len(titles) // columns)
    figure = Figure(figsize=(1.9 * columns * num_images, 2.25 * num_rows))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.04, wspace=0.04, hspace=0.28)
    for number, (title, (real, generated)) in enumerate(zip(titles, rows, strict=True), 1):
        width, axis = real.shape[1], figure.add_subplot(num_rows, columns, number)
        gap = np.ones((len(real), max(1, width // 16), 3))
        # One axis for all images of a caption: drawing an axis for each takes longer than a small epoch.
        axis.imshow(np.hstack([real, *(part for image in generated for part in (gap, image))]))
        centres = width / 2 + np.arange(1 + len(generated)) * (width + gap.shape[1])
        axis.set_xticks(centres, ["real", *["generated"] * len(generated)], fontsize=8)
        axis.set_title(textwrap.shorten(title, 80), fontsize=11)
        axis.set(yticks=[], frame_on=False)
        axis.tick_params(length=0)
    save_figure(figure, path, dpi=80)


def wrap_text(text, width, font_size):
    """The lines of a text that fit into `width` inches at a font size in points; existing line breaks are kept."""
    max_chars, lines = int(width * 72 / (0.58 * font_size)), printable(text).split("\n")
    return [part for line in lines for part in textwrap.wrap(line, max_chars, max_lines=4, placeholder=" ...")]


def printable(name):
    """A file name with question marks for undecodable bytes, which matplotlib rejects."""
    return name.encode("utf-8", "replace").decode()


def show_image(axis, file, color=None):
    """Draw an image on an axis without ticks, framed if a color is given."""
    axis.imshow(open_image(file))
    axis.set(xticks=[], yticks=[], anchor="N")  # images of one row are aligned at the top
    axis.spines[:].set(visible=color is not None, color=color or "white", linewidth=5)


def open_image(file):
    """An upright RGB PIL image, downsampled for a figure; raises InputError."""
    image = load_image(file, MAX_LENGTH)
    image.thumbnail((MAX_LENGTH, MAX_LENGTH))
    shortest = MIN_LENGTH * max(image.size) // MAX_LENGTH
    size = tuple(max(length, shortest) for length in image.size)  # else the frame covers a narrow image
    return image if size == image.size else ImageOps.pad(image, size, color="white")


def report_plot(content, path, num_omitted=0):
    omitted = f" ({num_omitted} more did not fit)" if num_omitted else ""
    print(f"{content}: plot saved to {path}{omitted}", file=sys.stderr)
