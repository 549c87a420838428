"""How good a GAN's pictures are, as a CLIP sees them that was trained with another seed.

`python benchmarks/gan_evaluate.py --run runs/demo/first --judge runs/other` paints one picture for one caption of each
test image and reports, beside the same figures of the real test pictures at the GAN's size:

- how often the right caption is the first, or among the first ten, of 100 captions of 100 images (chance: 1%, 10%);
- the kernel distance of the judge's features to those of real test pictures (Binkowski et al. 2018, arXiv:1801.01401),
  with real training pictures as the floor;
- memorising: how often a picture lies closer to its nearest training picture than a real test picture does to its own
  (50%: as close as real ones), and how many are closer than all but 1% of the test pictures (1%: as real ones);
- variety: the mean distance between pictures of one caption, as a share of that between pictures of different captions;
- on the drawn data set: how often the ground, and an object, has the colour that the caption names; and how often a
  recogniser, a network taught with labels on newly drawn pictures of that size, sees a named object (colour and shape)
  among the two objects it is surest of. Unlike a CLIP, no generator was trained to please it.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from common import report  # noqa: E402
from tqdm import tqdm  # noqa: E402

from clip import load_model, setup_device  # noqa: E402
from config import InputError, OneLineParser, exit_on_input_error, gan_run_of  # noqa: E402
from dataset import load_splits, pairs_of, resize_image  # noqa: E402
from gan import PictureStore, conditioning_run, generate, load_generator, resize_pictures  # noqa: E402
from index import embed_captions  # noqa: E402
from shapes import COLOURS, GROUNDS, SHAPES, all_scenes, draw_scene, read_caption  # noqa: E402

AMONG = 100
PLACES = ("image_path", "captions_path")  # settings
BATCH = 100


def in_batches(function, *tensors):
    return torch.cat([function(*parts) for parts in zip(*(tensor.split(BATCH) for tensor in tensors), strict=True)])


def caption_places(images, texts, rng):
    """(N,) the place of each picture's own caption among it and 99 captions of other pictures; (N, D) each."""
    scores = (images @ texts.T).cpu().numpy()
    others = min(AMONG - 1, len(scores) - 1)
    places = np.empty(len(scores), dtype=np.int64)
    for row, line in enumerate(scores):
        chosen = rng.permutation(np.delete(np.arange(len(line)), row))[:others]
        places[row] = 1 + (line[chosen] >= line[row]).sum()
    return places


def kernel_distance(a, b, rng, subsets=50, size=200):
    """1000 times the unbiased squared maximum mean discrepancy of features (N, F) and (M, F): mean and deviation."""
    values, size = [], min(size, len(a), len(b))
    for _ in range(subsets):
        x, y = (features[rng.permutation(len(features))[:size]].astype(np.float64) for features in (a, b))
        width = x.shape[1]
        xx, yy, xy = ((p @ q.T / width + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (xx, yy))
        values.append(1000 * (within - 2 * xy.mean()))
    return float(np.mean(values)), float(np.std(values))


def nearest(features, training):
    """(N,) the distance of each row of unit vectors to the nearest training one."""
    return torch.cdist(features, training).min(1).values.cpu().numpy()


def variety(features):
    """Of features (captions, pictures each, D): the mean distance within a caption over that between captions."""
    captions, each, _ = features.shape
    distances = torch.cdist(features.flatten(0, 1), features.flatten(0, 1))
    owner = torch.arange(captions, device=features.device).repeat_interleave(each)
    same = owner[:, None] == owner
    within = distances[same].sum() / (same.sum() - len(owner))
    return (within / distances[~same].mean()).item()


# ---- colours of drawn pictures ----------------------------------------------------------------------------------


def seen_colours(picture):
    """The ground's name and the objects' colours, the most frequent first, of a (3, S, S) picture in [0, 1]."""
    pixels = (picture * 255).permute(1, 2, 0).cpu().numpy()  # (S, S, 3)
    rim = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    ground = closest(np.median(rim, axis=0)[None], GROUNDS)[0]
    names = closest(pixels.reshape(-1, 3), {**COLOURS, ground: GROUNDS[ground]})
    counts = {name: names.count(name) for name in COLOURS}
    return ground, sorted(counts, key=lambda name: -counts[name])


def closest(pixels, palette):
    distances = np.linalg.norm(pixels[:, None] - np.array(list(palette.values())), axis=2)
    names = list(palette)
    return [names[i] for i in distances.argmin(1)]


def colours_right(pictures, captions):
    """Of the pictures whose captions name colours: the share with the right ground, and of objects in theirs (%).

    An object counts if its colour is among the picture's two most frequent ones (the first, where both have one).
    """
    ground_hits, object_hits = [], []
    for picture, caption in zip(pictures, captions, strict=True):
        scene = read_caption(caption)
        if scene is not None:
            ground, seen = seen_colours(picture)
            colours = [colour for colour, _ in scene[1]]
            ground_hits.append(ground == scene[0])
            object_hits += [colour in seen[: len(set(colours))] for colour in colours]
    return (100 * np.mean(ground_hits), 100 * np.mean(object_hits)) if ground_hits else (None, None)


# ---- objects of drawn pictures ----------------------------------------------------------------------------------

LESSONS, ROUNDS = 5000, 5  # pictures that the recogniser is taught with, and how often it sees each
OBJECTS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


class Recogniser(torch.nn.Module):
    """(B, 3, S, S) pictures in [0, 1] -> (B, 20) logits of the objects."""

    def __init__(self, size):
        super().__init__()
        layers, channels = [], 3
        for out, stride in ((32, 1), (32, 2), (64, 1), (64, 2), (96, 1)):
            layers += [torch.nn.Conv2d(channels, out, 3, stride, 1), torch.nn.BatchNorm2d(out), torch.nn.ReLU()]
            channels = out
        width = channels * (size // 4) ** 2
        self.layers = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(width, len(OBJECTS)))

    def forward(self, pictures):
        return self.layers(pictures)


@torch.enable_grad()
def teach_recogniser(size, device, seed=0):
    """A recogniser of pictures of that size, taught on newly drawn scenes, some of them blurred or noisy."""
    rng, scenes = np.random.default_rng(seed), all_scenes()
    chosen = [scenes[i] for i in rng.integers(len(scenes), size=LESSONS)]
    drawn = [np.asarray(resize_image(np.asarray(draw_scene(scene, rng)), size)) for scene in chosen]
    pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).to(device)
    truth = torch.zeros(LESSONS, len(OBJECTS), device=device)
    for row, (_, first, _, second) in zip(truth, chosen, strict=True):
        row[[OBJECTS.index(first), OBJECTS.index(second)]] = 1
    torch.manual_seed(seed)
    model, steps = Recogniser(size).to(device), ROUNDS * -(-LESSONS // 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    with tqdm(total=steps, desc="recogniser", unit="step", disable=not sys.stderr.isatty()) as bar:
        for _ in range(ROUNDS):
            for rows in torch.randperm(LESSONS, device=device).split(64):
                batch = pictures[rows].float() / 255
                if torch.rand(()) < 0.3:
                    batch = resize_pictures(resize_pictures(batch, size // 2), size)
                batch = batch + 0.05 * torch.rand(()).to(device) * torch.randn_like(batch)
                loss = torch.nn.functional.binary_cross_entropy_with_logits(model(batch), truth[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.requires_grad_(False).eval()


def objects_right(recogniser, pictures, captions):
    """The share (%) of the objects that captions name which are among the recogniser's two; None without any."""
    named = [(i, scene[1]) for i, scene in enumerate(map(read_caption, captions)) if scene]
    if not named:
        return None
    seen = in_batches(lambda x: recogniser(x).topk(2).indices, pictures).tolist()
    return 100 * np.mean([OBJECTS.index(thing) in seen[i] for i, objects in named for thing in objects])


# ---- the table --------------------------------------------------------------------------------------------------


def evaluate(run, judge_run, device, seed=0, places=None):
    """The rows of the table, the generator's pictures and the real test pictures at its size, and their number.

    places: settings that say where the data are now (image_path, captions_path).
    """
    run = gan_run_of(run)
    clip, judge = load_model(conditioning_run(run), device), load_model(judge_run, device)
    if clip.config.seed == judge.config.seed:
        raise InputError(f"run and judge were both trained with seed {clip.config.seed}: a judge needs another")
    generator, rng = load_generator(Path(run) / "gan", device), np.random.default_rng(seed)
    config, judge_config = (dataclasses.replace(model.config, **(places or {})) for model in (clip, judge))
    size, splits = generator.architecture.size, load_splits(config)
    # Without official split files the judge's seed splits otherwise: only what neither has learned from is asked.
    learned = set(load_splits(judge_config)["train"].names)
    test = pairs_of(splits["test"], [i for i, name in enumerate(splits["test"].names) if name not in learned])
    if len(test.files) < AMONG:
        raise InputError(f"{len(test.files)} test pictures are unseen by run and judge: at least {AMONG} are needed")
    known = set(splits["train"].captions)
    chosen = np.array([unseen_caption(test, image, known, rng) for image in range(len(test.files))])
    captions = [test.captions[j] for j in chosen]
    chosen_from = {"train": splits["train"], "test": test}
    stores = {split: PictureStore(clip, pairs, config, size, device) for split, pairs in chosen_from.items()}
    generated = generate(generator, stores["test"].embeddings[chosen], seed)
    real = stores["test"].pictures.float() / 255

    def look(pictures):  # (N, F) features and (N, D) embeddings of the judge
        features = in_batches(lambda x: judge.image_features(resize_pictures(x, judge.config.size)), pictures)
        return features.cpu().numpy(), in_batches(judge.project_image, features)

    texts = embed_captions(judge, captions)
    train_features, train_embeddings = look(stores["train"].pictures.float() / 255)
    real_features, real_embeddings = look(real)
    several = stores["test"].embeddings[chosen[:50]].repeat_interleave(8, 0)
    varied = look(generate(generator, several, seed + 1))[1].view(-1, 8, texts.shape[1])
    from_real = nearest(real_embeddings, train_embeddings)
    drawn = any(map(read_caption, captions))
    recogniser = teach_recogniser(size, device) if drawn else None
    rows = []
    for name, pictures in (("generated", generated), ("real test pictures at that size", real)):
        features, embeddings = look(pictures)
        places, distances = caption_places(embeddings, texts, rng), nearest(embeddings, train_embeddings)
        closer = (distances[:, None] < from_real).mean() + 0.5 * (distances[:, None] == from_real).mean()
        # What the real test pictures themselves are compared with are real training pictures: the floor.
        distance, deviation = kernel_distance(features if name == "generated" else train_features, real_features, rng)
        ground, objects = colours_right(pictures, captions)
        rows.append(
            {
                "pictures": name,
                "caption first of 100 (%)": round(100 * (places == 1).mean(), 1),
                "in the first ten (%)": round(100 * (places <= 10).mean(), 1),
                "kernel distance x 1000": f"{distance:.2f} +- {deviation:.2f}",
                "closer to training pictures (%)": round(100 * closer, 1),
                "closer than all but 1% of test (%)": round(100 * (distances < np.quantile(from_real, 0.01)).mean(), 1),
                "variety": round(variety(varied), 2) if name == "generated" else "",
                "ground's colour right (%)": "" if ground is None else round(ground, 1),
                "objects' colours right (%)": "" if objects is None else round(objects, 1),
                "objects right (%)": round(objects_right(recogniser, pictures, captions), 1) if drawn else "",
            }
        )
    return rows, len(captions)


def unseen_caption(pairs, image, known, rng):
    """The number of one of the picture's captions, of those that are none of the `known` ones if there are any."""
    numbers = range(*pairs.first[image : image + 2])
    return rng.choice([j for j in numbers if pairs.captions[j] not in known] or list(numbers))


@exit_on_input_error
def main(argv=None):
    parser = OneLineParser(prog="gan_evaluate.py", description="How good a GAN's pictures are.")
    parser.add_argument("--run", required=True, help="the run whose gan/ is looked at")
    parser.add_argument("--judge", required=True, help="a run of another seed on the same data")
    parser.add_argument("--image_path", help="where the pictures are now, if they were moved")
    parser.add_argument("--captions_path", help="and the captions")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    arguments = parser.parse_args(argv)
    device, _ = setup_device(arguments.device)
    with torch.no_grad():
        places = {name: value for name in PLACES if (value := getattr(arguments, name))}
        rows, pictures = evaluate(arguments.run, arguments.judge, device, places=places)
    names = {"run": arguments.run, "judge": arguments.judge}
    report("gan_evaluate", rows, folder=gan_run_of(arguments.run) / "gan", pictures=pictures, **names)


if __name__ == "__main__":
    main()
