"""Synthetic data set in the layout of Flickr8k: two coloured shapes in a spatial relation on a background.

It needs no network, and because the content of every image is known, it answers questions that photographs cannot
(does the model distinguish "left of" from "right of"?).
"""

import csv
import itertools
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from config import InputError
from utils.cli import progress_bar
from utils.files import atomic_write

# Few colours and shapes, distinguishable at 32 pixels: two images of a batch then often differ in a shape alone, so
# that a model has to learn shapes and not only colours.
COLORS = {
    "red": (222, 42, 42),
    "yellow": (252, 226, 42),
    "green": (64, 214, 74),
    "blue": (44, 78, 232),
    "purple": (140, 52, 190),
}
SHAPES = {"ring": "hoop", "square": "box", "triangle": "wedge", "cross": "plus"}  # shape: synonym
BACKGROUNDS = {
    "grass": (38, 104, 44),
    "sand": (214, 190, 140),
    "snow": (238, 242, 248),
    "water": (52, 104, 150),
    "asphalt": (78, 78, 82),
}
INVERSE_RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATION_SYNONYMS = {"left of": "to the left of", "right of": "to the right of", "above": "over", "below": "under"}
OFFSETS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # (x, y) of the first object
RESOLUTION = 96  # pixels


def all_scenes():
    """Every scene once: (background, (color, shape), relation, (color, shape)) with two different objects."""
    pairs = list(itertools.permutations(itertools.product(COLORS, SHAPES), 2))
    # "A left of B" and "B right of A" are the same scene.
    return [(ground, a, relation, b) for ground in BACKGROUNDS for a, b in pairs for relation in ("left of", "above")]


def scene_captions(scene):
    """Five different captions of a scene: all name both objects and the background, four name the relation."""
    background, (color_a, shape_a), relation, (color_b, shape_b) = scene
    a, b = f"{color_a} {shape_a}", f"{color_b} {shape_b}"
    synonym_a, synonym_b = f"{color_a} {SHAPES[shape_a]}", f"{color_b} {SHAPES[shape_b]}"
    inverse = INVERSE_RELATIONS[relation]
    return [
        f"A {a} is {relation} a {b} on {background} .",
        f"A {b} {RELATION_SYNONYMS[inverse]} a {a} , on the {background} .",
        f"On {background} , a {synonym_a} {RELATION_SYNONYMS[relation]} a {b} .",
        f"The {b} is {inverse} the {synonym_a} on the {background} .",
        f"There is a {a} and a {synonym_b} on the {background} .",
    ]


def parse_caption(caption):
    """(background, [(color, shape), (color, shape)]) of a caption by `scene_captions`, None for any other caption."""
    shapes = {word: shape for shape, synonym in SHAPES.items() for word in (shape, synonym)}
    words = re.findall(r"\w+", caption.lower())
    backgrounds = [word for word in words if word in BACKGROUNDS]
    objects = [(a, shapes[b]) for a, b in itertools.pairwise(words) if a in COLORS and b in shapes]
    return (backgrounds[0], objects) if len(backgrounds) == 1 and len(objects) == 2 else None


def render_scene(scene, rng):
    """A (RESOLUTION, RESOLUTION) PIL image of a scene; positions, sizes and the texture are drawn from `rng`."""
    size = 3 * RESOLUTION  # supersampled for smooth edges
    background, first, relation, second = scene
    texture = Image.fromarray(background_texture(BACKGROUNDS[background], rng))
    image = texture.resize((size, size), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    dx, dy = OFFSETS[relation]
    center = size / 2 + rng.uniform(-0.04, 0.04, 2) * size
    gap = rng.uniform(0.24, 0.27) * size
    for (color, shape), sign in ((first, 1), (second, -1)):
        shift = rng.uniform(-0.08, 0.08) * size
        x = center[0] + sign * dx * gap + abs(dy) * shift
        y = center[1] + sign * dy * gap + abs(dx) * shift
        radius = rng.uniform(0.17, 0.22) * size
        fill = np.clip(np.array(COLORS[color]) + rng.integers(-10, 11, 3), 0, 255)
        draw_shape(draw, shape, x, y, radius, tuple(int(value) for value in fill))
    return image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)


def background_texture(color, rng):
    """Coarse and fine noise around a colour, (RESOLUTION, RESOLUTION, 3) uint8."""
    coarse = np.kron(rng.normal(0, 8, (RESOLUTION // 8, RESOLUTION // 8, 1)), np.ones((8, 8, 1)))
    fine = rng.normal(0, 7, (RESOLUTION, RESOLUTION, 1))
    return np.clip(np.array(color) + coarse + fine, 0, 255).astype(np.uint8)


def draw_shape(draw, shape, x, y, radius, color):
    """Draw a shape of a radius in pixels around (x, y), with a darker outline."""
    outline, width = tuple(value // 2 for value in color), max(2, int(radius / 10))
    if shape == "ring":
        thickness = int(0.55 * radius)
        for inset, fill, line in ((0, outline, thickness), (width, color, thickness - 2 * width)):
            r = radius - inset
            draw.ellipse([x - r, y - r, x + r, y + r], None, fill, line)
        return
    corners = {
        "square": [(0.88, 0.88), (-0.88, 0.88), (-0.88, -0.88), (0.88, -0.88)],
        "triangle": [(0, -1.1), (1.05, 0.8), (-1.05, 0.8)],
        "cross": [
            *[(-0.36, -1.05), (0.36, -1.05), (0.36, -0.36), (1.05, -0.36), (1.05, 0.36), (0.36, 0.36)],
            *[(0.36, 1.05), (-0.36, 1.05), (-0.36, 0.36), (-1.05, 0.36), (-1.05, -0.36), (-0.36, -0.36)],
        ],
    }
    draw.polygon([(x + radius * u, y + radius * v) for u, v in corners[shape]], color, outline, width)


def generate_dataset(image_path, captions_path, train_images, validation_images=200, test_images=400, seed=0):
    """Write the data set in Kaggle's layout with official-style split files; deterministic for a seed.

    No scene occurs twice, so no two images share their captions. The captions file is written last: where it exists,
    the data set is complete and left unchanged. Raises InputError for too many images and for a folder of other files.
    """
    image_path, captions_path = Path(image_path), Path(captions_path)
    if captions_path.exists():
        return
    foreign = next((file for file in sorted(image_path.glob("[!.]*")) if not file.match("shapes_*.jpg")), None)
    if foreign is not None:
        raise InputError(
            f"captions_path is {captions_path}, which does not exist, and the synthetic data set is not written to "
            f"{image_path}, which contains {foreign.name}: give the captions file, or another --image_path"
        )
    counts = {"train": train_images, "dev": validation_images, "test": test_images}
    scenes, total = all_scenes(), sum(counts.values())
    if total > len(scenes):
        raise InputError(f"sample_images is {train_images}: at most {len(scenes) - total + train_images} are possible")
    image_path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    chosen = [scenes[i] for i in rng.permutation(len(scenes))[:total]]
    names = [f"shapes_{number:05d}.jpg" for number in range(total)]
    for name, scene in zip(progress_bar(names, desc="rendering images", unit="image"), chosen, strict=True):
        render_scene(scene, rng).save(image_path / name, quality=92)
    for split, end in zip(counts, np.cumsum(list(counts.values())), strict=True):
        with atomic_write(captions_path.parent / f"shapes.{split}Images.txt") as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names[end - counts[split] : end]), encoding="utf-8")
    with atomic_write(captions_path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = ((name, text) for name, scene in zip(names, chosen, strict=True) for text in scene_captions(scene))
        csv.writer(file).writerows([("image", "caption"), *rows])
