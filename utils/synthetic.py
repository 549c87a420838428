"""Synthetic data set in the layout of Flickr8k: two coloured shapes in a spatial relation on a background."""

import csv
import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from config import InputError
from utils.cli import progress_bar
from utils.files import atomic_write, temporary_folder

# Few colours and shapes, distinguishable at 32 pixels: two images of a batch then often differ in a shape alone, so
# that a model has to learn shapes and not only colours.
COLORS = {"red": "#de2a2a", "yellow": "#fce22a", "green": "#40d64a", "blue": "#2c4ee8", "purple": "#8c34be"}
COLORS = {name: ImageColor.getrgb(code) for name, code in COLORS.items()}
SHAPES = {"ring": "hoop", "square": "box", "triangle": "wedge", "cross": "plus"}  # shape: synonym
BACKGROUNDS = {"grass": "#26682c", "sand": "#d6be8c", "snow": "#eef2f8", "water": "#346896", "asphalt": "#4e4e52"}
BACKGROUNDS = {name: ImageColor.getrgb(code) for name, code in BACKGROUNDS.items()}
INVERSE_RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATION_SYNONYMS = {"left of": "to the left of", "right of": "to the right of", "above": "over", "below": "under"}
OFFSETS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # (x, y) of the first object
HALF_CROSS = [(-0.36, -1.05), (0.36, -1.05), (0.36, -0.36), (1.05, -0.36), (1.05, 0.36), (0.36, 0.36)]
CORNERS = {  # (x, y) in units of the radius
    "square": [(0.88, 0.88), (-0.88, 0.88), (-0.88, -0.88), (0.88, -0.88)],
    "triangle": [(0, -1.1), (1.05, 0.8), (-1.05, 0.8)],
    "cross": [(sign * x, sign * y) for sign in (1, -1) for x, y in HALF_CROSS],
}
RESOLUTION = 96  # pixels


def all_scenes():
    """Every scene once: (background, (color, shape), relation, (color, shape)) with two different objects."""
    pairs = list(itertools.permutations(itertools.product(COLORS, SHAPES), 2))
    # "A left of B" and "B right of A" are the same scene.
    return [(ground, a, relation, b) for ground in BACKGROUNDS for a, b in pairs for relation in ("left of", "above")]


def scene_captions(scene):
    """Five different captions of a scene: all name both objects and the background, four name the relation."""
    background, (color_a, shape_a), relation, (color_b, shape_b) = scene
    a, b, inverse = f"{color_a} {shape_a}", f"{color_b} {shape_b}", INVERSE_RELATIONS[relation]
    synonym_a, synonym_b = f"{color_a} {SHAPES[shape_a]}", f"{color_b} {SHAPES[shape_b]}"
    return [
        f"A {a} is {relation} a {b} on {background} .",
        f"A {b} {RELATION_SYNONYMS[inverse]} a {a} , on the {background} .",
        f"On {background} , a {synonym_a} {RELATION_SYNONYMS[relation]} a {b} .",
        f"The {b} is {inverse} the {synonym_a} on the {background} .",
        f"There is a {a} and a {synonym_b} on the {background} .",
    ]


def render_scene(scene, rng):
    """A (RESOLUTION, RESOLUTION) PIL image of a scene; positions, sizes and the texture are drawn from `rng`."""
    size = 3 * RESOLUTION  # supersampled for smooth edges
    background, first, relation, second = scene
    coarse = np.kron(rng.normal(0, 8, (RESOLUTION // 8, RESOLUTION // 8, 1)), np.ones((8, 8, 1)))
    fine = rng.normal(0, 7, (RESOLUTION, RESOLUTION, 1))
    texture = np.clip(np.array(BACKGROUNDS[background]) + coarse + fine, 0, 255).astype(np.uint8)
    image = Image.fromarray(texture).resize((size, size), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    (dx, dy), center = OFFSETS[relation], size / 2 + rng.uniform(-0.04, 0.04, 2) * size
    gap = rng.uniform(0.24, 0.27) * size
    for (color, shape), sign in ((first, 1), (second, -1)):
        shift = rng.uniform(-0.08, 0.08) * size
        x = center[0] + sign * dx * gap + abs(dy) * shift
        y = center[1] + sign * dy * gap + abs(dx) * shift
        radius = rng.uniform(0.17, 0.22) * size
        fill = np.clip(np.array(COLORS[color]) + rng.integers(-10, 11, 3), 0, 255)
        draw_shape(draw, shape, x, y, radius, tuple(int(value) for value in fill))
    return image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)


def draw_shape(draw, shape, x, y, radius, color):
    """Draw a shape with a radius in pixels, centred at (x, y), with a darker outline."""
    outline, width, thickness = tuple(value // 2 for value in color), max(2, int(radius / 10)), int(0.55 * radius)
    if shape == "ring":
        for r, fill, line in ((radius, outline, thickness), (radius - width, color, thickness - 2 * width)):
            draw.ellipse([x - r, y - r, x + r, y + r], None, fill, line)
    else:
        draw.polygon([(x + radius * u, y + radius * v) for u, v in CORNERS[shape]], color, outline, width)


def generate_dataset(image_path, captions_path, train_images, validation_images=200, test_images=400, seed=0):
    """Write the data set in Kaggle's layout with official-style split files; deterministic for a seed.

    No scene occurs twice. The captions file is written last: where it exists, the data set is complete and left
    unchanged. Raises InputError for too many images and for a folder with other files.
    """
    image_path, captions_path = Path(image_path), Path(captions_path)
    if captions_path.exists():
        return
    foreign = next((file.name for file in sorted(image_path.glob("[!.]*")) if not file.match("shapes_*.jpg")), None)
    if foreign is not None:
        found = f"captions_path is {captions_path}, which does not exist, and image_path {image_path}"
        raise InputError(f"{found}, which contains {foreign}: pass the captions file, or another --image_path")
    counts = {"train": train_images, "dev": validation_images, "test": test_images}
    scenes, total = all_scenes(), sum(counts.values())
    if total > len(scenes):
        raise InputError(f"sample_images is {train_images}: at most {len(scenes) - total + train_images} are possible")
    image_path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    chosen = [scenes[i] for i in rng.permutation(len(scenes))[:total]]
    names = [f"shapes_{number:05d}.jpg" for number in range(total)]
    with temporary_folder(image_path / "images") as folder:  # another process may be reading the same images
        for name, scene in zip(progress_bar(names, desc="rendering images", unit="image"), chosen, strict=True):
            render_scene(scene, rng).save(folder / name, quality=92)
            (folder / name).replace(image_path / name)
    for split, end in zip(counts, np.cumsum(list(counts.values())), strict=True):
        with atomic_write(captions_path.parent / f"shapes.{split}Images.txt") as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names[end - counts[split] : end]), encoding="utf-8")
    with atomic_write(captions_path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = ((name, text) for name, scene in zip(names, chosen, strict=True) for text in scene_captions(scene))
        csv.writer(file).writerows([("image", "caption"), *rows])
