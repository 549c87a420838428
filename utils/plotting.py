"""Figures: search results, label probabilities, confusion matrices, training curves, GAN samples."""

import textwrap
import warnings

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from config import InputError
from utils.image_cache import DECODING_ERRORS, to_upright_rgb

matplotlib.rcParams["text.parse_math"] = False  # captions and file names may contain dollar signs
warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)  # characters that the font lacks are drawn as boxes
MATCH, WEAK = "limegreen", "lightgrey"  # colours of frames and bars
MAX_ROWS = 60  # of a grid: matplotlib cannot draw much larger figures
MAX_BARS = 20
DPI = 80


def plot_grid(panels, path, columns=3):
    """Save image grids, one below another; each image keeps its aspect ratio. Returns the number of images left out.

    Args:
        panels: list of (heading, image files, titles, colors); a color frames its image, None draws no frame.
    """
    num_images, shown, rows = sum(len(files) for _, files, _, _ in panels), [], 0
    for heading, *parts in panels:
        room = columns * (MAX_ROWS - rows)
        shown += [(heading, *(part[:room] for part in parts))] if room else []
        rows = min(MAX_ROWS, rows + -(-len(parts[0]) // columns))
    panels = shown
    columns = min(columns, max(len(files) for _, files, _, _ in panels))
    width = max(3.2 * columns, 6.4)
    headings = [wrap_text(heading, width, 14) for heading, *_ in panels]
    rows = [-(-len(files) // columns) for _, files, _, _ in panels]
    heights = [3.5 * num_rows + 0.28 * len(lines) + 0.2 for num_rows, lines in zip(rows, headings, strict=True)]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(panels), 1, height_ratios=heights))
    for part, lines, num_rows, (_, files, titles, colors) in zip(parts, headings, rows, panels, strict=True):
        part.suptitle("\n".join(lines), fontsize=14)
        axes = part.subplots(num_rows, columns, squeeze=False).ravel()
        for axis in axes[len(files) :]:
            axis.set_axis_off()
        for axis, file, title, color in zip(axes, files, titles, colors, strict=False):
            show_image(axis, file, color)
            axis.set_title(printable(title), fontsize=10)
    save_figure(figure, path)
    return num_images - sum(len(files) for _, files, _, _ in panels)


def plot_bars(file, heading, names, values, colors, path, digits=2):
    """Save an image beside horizontal bars, one per name, the first on top. Returns the number of bars left out.

    Bars start at zero, or slightly below the smallest value if that is negative, so that the largest value always has
    the longest bar.
    """
    num_names, names, values = len(names), names[:MAX_BARS], values[:MAX_BARS]
    colors = [color or WEAK for color in colors[:MAX_BARS]]
    names = ["\n".join(textwrap.wrap(name, 44, max_lines=3, placeholder=" ...")) for name in names]
    num_lines = sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(11, max(4.0, 0.22 * num_lines + 0.22 * len(names) + 0.8)), layout="constrained")
    figure.suptitle("\n".join(wrap_text(heading, 11, 14)), fontsize=14)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    show_image(left, file)
    rows = max(len(names), 4)  # keeps a single bar narrow
    positions = rows - 1 - np.arange(len(names))
    low, high = min(values), max(values)
    base = 0 if low >= 0 else low - 0.1 * max(high - low, 0.1)
    right.barh(positions, [value - base for value in values], left=base, color=colors, height=0.6)
    for position, value in zip(positions, values, strict=True):
        right.text(value, position, f" {value:.{digits}f}", va="center", fontsize=10)
    right.set_yticks(positions, names, fontsize=10)
    right.set(xticks=[], xlim=(base, base + 1.18 * max(high - base, 1e-6)), ylim=(-0.6, rows - 0.4))
    right.tick_params(left=False)
    right.spines[["top", "right", "bottom"]].set_visible(False)
    save_figure(figure, path)
    return num_names - len(names)


def plot_confusion(counts, labels, path, heading):
    """Save a confusion matrix as percentages of each row: rows are true labels, columns predicted labels (K, K)."""
    counts = np.asarray(counts, dtype=float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = max(4.6, 0.62 * len(labels) + 2.2)  # inches
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    names = [textwrap.shorten(label, 22, placeholder=" ...") for label in labels]
    slanted = max(map(len, names)) > 5
    axis.set_xticks(range(len(labels)), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
    axis.set_yticks(range(len(labels)), [f"{n} ({int(c)})" for n, c in zip(names, counts.sum(1), strict=True)])
    axis.set(xlabel="predicted label", ylabel="true label (images)")
    axis.set_title("\n".join(wrap_text(heading, size, 11)), fontsize=11)
    if len(labels) <= 25:
        for row, column in np.argwhere(counts > 0):
            color = "white" if shares[row, column] > 55 else "black"
            axis.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=color, fontsize=9)
    figure.colorbar(image, ax=axis, shrink=0.7, label="% of the images with the true label")
    save_figure(figure, path)


def plot_matches(pairs, image_embeddings, text_embeddings, path, rows=4, columns=5):
    """Save the best matching images of a few captions of a split, a row each; a caption's own image has a green frame.

    Args:
        pairs: a `dataset.Pairs`, with embeddings (N, D) of its images and (T, D) of its captions.
    """
    rng = np.random.default_rng(0)
    chosen = [rng.integers(*pairs.caption_offsets[i : i + 2]) for i in rng.permutation(len(pairs.files))[:rows]]
    columns = min(columns, len(pairs.files))
    figure = Figure(figsize=(2.3 * columns, 2.75 * len(chosen)), layout="constrained")
    for caption, part in zip(chosen, np.atleast_1d(figure.subfigures(len(chosen), 1)), strict=True):
        scores, own = (image_embeddings @ text_embeddings[caption]).cpu(), int(pairs.image_index[caption])
        best = scores.topk(columns)
        rank = int((scores >= scores[own]).sum())
        part.suptitle(
            f"{textwrap.shorten(pairs.captions[caption], 100)}   (rank of its own image: {rank})", fontsize=11
        )
        for column, axis in enumerate(np.atleast_1d(part.subplots(1, columns))):
            image = int(best.indices[column])
            show_image(axis, pairs.files[image], MATCH if image == own else None)
            axis.set_title(f"{best.values[column]:.2f}", fontsize=9)
    save_figure(figure, path)


def plot_curves(history, path):
    """Save losses, validation recalls and the temperature over the epochs; `history` has a dict for each epoch."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    epochs = [line["epoch"] for line in history]
    panels = {
        "contrastive loss": {"training": "train_loss", "validation": "validation_loss"},
        "validation recall, text to image (%)": {f"R@{k}": f"text_to_image_R@{k}" for k in (1, 5, 10)},
        "temperature": {"temperature": "temperature"},
    }
    for axis, (title, curves) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for label, key in curves.items():
            axis.plot(epochs, [line[key] for line in history], marker=".", label=label)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend()
    figure.savefig(path, dpi=100)


def plot_gan_samples(path, titles, rows, columns=2):
    """Save real and generated images of captions, `columns` captions side by side.

    Args:
        titles: the captions. rows: for each caption its real image and a list of generated images, all (H, W, 3) float
            arrays in [0, 1].
    """
    num_images = 1 + max(len(generated) for _, generated in rows)
    num_rows = -(-len(titles) // columns)
    figure = Figure(figsize=(1.9 * columns * num_images, 2.25 * num_rows))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.04, wspace=0.04, hspace=0.28)
    axes = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    for axis, title, (real, generated) in zip(axes, titles, rows, strict=False):
        width = real.shape[1]
        gap = np.ones((len(real), max(1, width // 16), 3))
        # One axis for all images of a caption: drawing an axis for each takes longer than a small epoch.
        axis.imshow(np.hstack([real, *(part for image in generated for part in (gap, image))]))
        centres = [number * (width + gap.shape[1]) + width / 2 for number in range(1 + len(generated))]
        axis.set_xticks(centres, ["real", *["generated"] * len(generated)], fontsize=8)
        axis.set_title(textwrap.shorten(title, 80), fontsize=11)
        axis.set(yticks=[], frame_on=False)
        axis.tick_params(length=0)
    figure.savefig(path, dpi=DPI)


def wrap_text(text, width, font_size, max_lines=4):
    """The lines of a text that fit into `width` inches at a font size in points; existing line breaks are kept."""
    num_letters = int(width * 72 / (0.58 * font_size))
    parts = [
        textwrap.wrap(line, num_letters, max_lines=max_lines, placeholder=" ...")
        for line in printable(text).split("\n")
    ]
    return [line for part in parts for line in part]


def printable(name):
    """A file name with question marks for undecodable bytes, which matplotlib rejects."""
    return name.encode("utf-8", "replace").decode()


def save_figure(figure, path):
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.15)


def show_image(axis, file, color=None, line_width=5):
    """Draw an image on an axis without ticks, framed if a color is given."""
    axis.imshow(open_image(file))
    axis.set(xticks=[], yticks=[], anchor="N")  # images of one row are aligned at the top
    for spine in axis.spines.values():
        spine.set(visible=color is not None, color=color or "white", linewidth=line_width)


def open_image(file, max_length=320, min_length=64):
    """An upright RGB PIL image, downsampled so that its longer side has at most `max_length` pixels.

    Narrow images are padded with white to `min_length`, else their frame would cover them. Raises InputError.
    """
    try:
        with Image.open(file) as image:
            image = to_upright_rgb(image)
            image.thumbnail((max_length, max_length))
            width, height = image.size
            shortest = min_length * max(image.size) // max_length
            size = (max(width, shortest), max(height, shortest))
            return image if size == image.size else ImageOps.pad(image, size, color="white")
    except DECODING_ERRORS as error:
        raise InputError(f"image {file} cannot be read ({error})") from None
