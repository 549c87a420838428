"""A sample data set that is drawn, not downloaded: two coloured shapes in a relation on a ground.

It has the layout of Flickr8k, so everything runs on it on any computer without a network, and because it is known
what every picture shows, it can answer questions that photographs cannot (does the model know "left" from "right"?).
"""

import csv
import itertools
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from config import InputError, progress_bar

# Few colours and shapes that are told apart at 32 pixels: in a batch, two pictures then often differ in a shape alone,
# so that shapes have to be learned and not only colours.
COLOURS = {
    "red": (222, 42, 42),
    "yellow": (252, 226, 42),
    "green": (64, 214, 74),
    "blue": (44, 78, 232),
    "purple": (140, 52, 190),
}
SHAPES = {"ring": "hoop", "square": "box", "triangle": "wedge", "cross": "plus"}  # with a second word for each
GROUNDS = {
    "grass": (38, 104, 44),
    "sand": (214, 190, 140),
    "snow": (238, 242, 248),
    "water": (52, 104, 150),
    "asphalt": (78, 78, 82),
}
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OFFSETS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # of the first object
WORDS = {"left of": "to the left of", "right of": "to the right of", "above": "over", "below": "under"}
SIDE = 96  # pixels of a drawn picture


def all_scenes():
    """Every scene once: (ground, (colour, shape), relation, (colour, shape)) with two different objects.

    "A left of B" and "B right of A" are one scene, so only the relations "left of" and "above" are listed.
    """
    objects = list(itertools.product(COLOURS, SHAPES))
    pairs = [(a, b) for a in objects for b in objects if a != b]
    return [(g, a, r, b) for g in GROUNDS for a, b in pairs for r in ("left of", "above")]


def captions_of(scene):
    """Five different captions of a scene; all name both objects and the ground, four name the relation."""
    ground, (colour_a, shape_a), relation, (colour_b, shape_b) = scene
    a, b = f"{colour_a} {shape_a}", f"{colour_b} {shape_b}"
    other_a, other_b = f"{colour_a} {SHAPES[shape_a]}", f"{colour_b} {SHAPES[shape_b]}"
    inverse = RELATIONS[relation]
    captions = [
        f"{an(a)} is {relation} {an(b)} on {ground} .",
        f"{an(b)} {WORDS[inverse]} {an(a)} , on the {ground} .",
        f"On {ground} , {an(other_a)} {WORDS[relation]} {an(b)} .",
        f"The {b} is {inverse} the {other_a} on the {ground} .",
        f"there is {an(a)} and {an(other_b)} on the {ground} .",
    ]
    return [caption[0].upper() + caption[1:] for caption in captions]


def read_caption(caption):
    """(ground, [(colour, shape), (colour, shape)]) that a caption of `captions_of` names; None for another caption."""
    first_words = {word: shape for shape, second in SHAPES.items() for word in (shape, second)}
    words = re.findall(r"\w+", caption.lower())
    grounds = [word for word in words if word in GROUNDS]
    objects = [(a, first_words[b]) for a, b in itertools.pairwise(words) if a in COLOURS and b in first_words]
    return (grounds[0], objects) if len(grounds) == 1 and len(objects) == 2 else None


def an(words):
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def draw_scene(scene, rng):
    """A picture of the scene as a PIL image, SIDE x SIDE; places, sizes and the ground's texture vary with `rng`."""
    scale = 3  # drawn large and reduced, for smooth edges
    side = SIDE * scale
    ground, first, relation, second = scene
    image = Image.fromarray(ground_texture(GROUNDS[ground], rng)).resize((side, side), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    dx, dy = OFFSETS[relation]
    centre = side / 2 + rng.uniform(-0.04, 0.04, 2) * side
    gap = rng.uniform(0.24, 0.27) * side
    for (colour, shape), sign in ((first, 1), (second, -1)):
        sway = rng.uniform(-0.08, 0.08) * side
        x = centre[0] + sign * dx * gap + abs(dy) * sway
        y = centre[1] + sign * dy * gap + abs(dx) * sway
        radius = rng.uniform(0.17, 0.22) * side
        tint = np.clip(np.array(COLOURS[colour]) + rng.integers(-10, 11, 3), 0, 255)
        draw_shape(draw, shape, x, y, radius, tuple(int(v) for v in tint))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def ground_texture(colour, rng):
    """Coarse and fine speckles around the ground's colour, (SIDE, SIDE, 3) uint8."""
    coarse = np.kron(rng.normal(0, 8, (SIDE // 8, SIDE // 8, 1)), np.ones((8, 8, 1)))
    fine = rng.normal(0, 7, (SIDE, SIDE, 1))
    return np.clip(np.array(colour) + coarse + fine, 0, 255).astype(np.uint8)


def draw_shape(draw, shape, x, y, radius, colour):
    """A shape of that radius, pixels, about (x, y), its outline darker than its colour."""
    outline, width = tuple(value // 2 for value in colour), max(2, int(radius / 10))
    if shape == "ring":
        rim = int(0.55 * radius)
        for inset, tint, thick in ((0, outline, rim), (width, colour, rim - 2 * width)):
            r = radius - inset
            draw.ellipse([x - r, y - r, x + r, y + r], None, tint, thick)
        return
    corners = {
        "square": [(0.88, 0.88), (-0.88, 0.88), (-0.88, -0.88), (0.88, -0.88)],
        "triangle": [(0, -1.1), (1.05, 0.8), (-1.05, 0.8)],
        "cross": [
            *[(-0.36, -1.05), (0.36, -1.05), (0.36, -0.36), (1.05, -0.36), (1.05, 0.36), (0.36, 0.36)],
            *[(0.36, 1.05), (-0.36, 1.05), (-0.36, 0.36), (-1.05, 0.36), (-1.05, -0.36), (-0.36, -0.36)],
        ],
    }
    draw.polygon([(x + radius * u, y + radius * v) for u, v in corners[shape]], colour, outline, width)


def draw_sample(image_path, captions_path, train_images, validation_images=200, test_images=400, seed=0):
    """Write the sample data set in Kaggle's layout, with official-style split files; deterministic by seed.

    No scene is drawn twice, so no picture shares its captions with another. An existing captions file is left
    alone: it is written last, so where it stands the data set is whole.
    """
    image_path, captions_path = Path(image_path), Path(captions_path)
    if captions_path.exists():
        return
    foreign = next((file for file in sorted(image_path.glob("[!.]*")) if not file.match("shapes_*.jpg")), None)
    if foreign is not None:
        raise InputError(
            f"captions_path is {captions_path}, which does not exist, and the sample is not drawn into {image_path}, "
            f"where {foreign.name} lies: name the captions file, or give another --image_path"
        )
    counts = {"train": train_images, "dev": validation_images, "test": test_images}
    scenes, total = all_scenes(), sum(counts.values())
    if total > len(scenes):
        raise InputError(f"sample_images is {train_images}: at most {len(scenes) - total + train_images} can be drawn")
    image_path.mkdir(parents=True, exist_ok=True)
    captions_path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    chosen = [scenes[i] for i in rng.permutation(len(scenes))[:total]]
    names = [f"shapes_{number:05d}.jpg" for number in range(total)]
    for name, scene in zip(progress_bar(names, desc="drawing the sample", unit="image"), chosen, strict=True):
        draw_scene(scene, rng).save(image_path / name, quality=92)
    ends = np.cumsum(list(counts.values()))
    for split, end in zip(counts, ends, strict=True):
        listing = "".join(f"{name}\n" for name in names[end - counts[split] : end])
        (captions_path.parent / f"shapes.{split}Images.txt").write_text(listing, encoding="utf-8")
    temporary = captions_path.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([name, text] for name, scene in zip(names, chosen, strict=True) for text in captions_of(scene))
    temporary.replace(captions_path)
