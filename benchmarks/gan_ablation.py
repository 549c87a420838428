"""What generated pictures are worth to CLIP: arms times seeds, paired differences with 95% intervals.

    python benchmarks/gan_ablation.py                                    the drawn data set, all arms, five seeds
    python benchmarks/gan_ablation.py --share 0.1                        with a tenth of the training images
    python benchmarks/gan_ablation.py --share 0.25 --held_out 8          eight colour-shape combinations in no training
                                                                         image; generated from their captions
    python benchmarks/gan_ablation.py --preset best --image_path ... --captions_path ...        Flickr8k

Every arm of a seed starts from the same weights and sees the same real batches for the same number of steps (fewer
images are shown more often: epochs are divided by the share):

    real          real pairs only
    pairs         and generated pictures with their captions
    shuffled      the same, each with the caption of another: the negative control
    blurred       in place of generated pictures the real ones, reduced to the generator's size: is it just blur?
    captions      real pairs and variants of their captions (augmentation.py, meaning kept), no generated pictures
    new_captions  generated pictures for captions that no photograph has (augmentation.py, meaning new)
    sentences     the same for captions of scenes that were never drawn (few pictures, many sentences)
    joint         as pairs, from a GAN that goes on learning

With combinations held out, pairs, shuffled and joint make pictures for captions with them and for training captions.
The data set, the first CLIP and its GAN are made once and shared by all seeds: the intervals say how sure the
differences are for this data set and this GAN. Settings are to be chosen with another `--data_seed`, which draws other
pictures and holds out other combinations. Fewer than five seeds give no conclusion. Finished runs are kept in
`--folder`; a stopped benchmark goes on where it was. Other flags are main.py's (default: --preset demo).
"""

import argparse
import csv
import dataclasses
import math
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from common import report  # noqa: E402
from zero_shot_shapes import labels_of, share_named  # noqa: E402

import gan  # noqa: E402
import training  # noqa: E402
from augmentation import Neighbours, augment_captions, read_again, write_variants  # noqa: E402
from clip import load_model  # noqa: E402
from config import (  # noqa: E402
    InputError,
    OneLineParser,
    build_config,
    exit_on_input_error,
    parse_flags,
    read_json,
    write_json,
)
from dataset import load_splits, read_captions  # noqa: E402
from gan import PictureStore, resize_pictures  # noqa: E402
from generated import GeneratedPairs  # noqa: E402
from index import embed_captions, embed_images  # noqa: E402
from inference import own_split  # noqa: E402
from shapes import COLOURS, SHAPES, all_scenes, captions_of, draw_sample, draw_scene  # noqa: E402
from zero_shot import embedding_logits  # noqa: E402

ARMS = ("real", "pairs", "shuffled", "blurred", "captions", "new_captions", "sentences", "joint")
ENOUGH = 5  # seeds
OWN = {"run", "resume", "seed", "gan", "gan_run", "gan_captions"}  # settings of the arms
FIRST_SEED = 1000  # of the CLIP whose GAN is used: none of the arms' seeds
NEW_CAPTIONS = 2000
VALIDATION, TEST = 200, 400  # images drawn for each


# ---- control arms -----------------------------------------------------------------------------------------------


class Shuffled(GeneratedPairs):
    """Pictures that pass the gate as they are, each then given the caption of the next."""

    def make(self, chosen, random):
        batch = super().make(chosen, random)
        if batch is not None:
            for name in ("input_ids", "attention_mask", "image_ids"):
                batch[name] = batch[name].roll(1, 0)
        return batch


class Blurred(GeneratedPairs):
    """The captions' own photographs at the generator's size in place of its pictures."""

    def __init__(self, config, pairs, model, device, dtype):
        super().__init__(config, pairs, model, device, dtype)
        store = PictureStore(self.judge, pairs, config, self.generator.architecture.size, device)
        self.photographs = store.pictures

    def paint(self, chosen, random):
        return resize_pictures(self.photographs[self.image_ids[chosen]].float() / 255, self.config.size)


CONTROLS = {"shuffled": Shuffled, "blurred": Blurred}


# ---- data -------------------------------------------------------------------------------------------------------


def prepare_data(config, folder, share, held_out, data_seed):
    """The settings of the data set for this question, written into `folder` where it is a new one.

    The split is always written down: without official files every seed would split otherwise, and the GAN, whose run
    has a seed of its own, would have seen test pictures.
    """
    changes = {name: round(getattr(config, name) / share) for name in ("epochs", "gan_epochs")}
    changes |= {"captions_path": str(folder / "captions.txt"), "sample_images": 0}
    if held_out:
        draw_held_out(folder, config.sample_images, held_out, share, data_seed)
        return {**changes, "image_path": str(folder / "Images")}
    if config.sample_images:
        paths = {"image_path": str(folder / "Images"), "captions_path": str(folder / "drawn" / "captions.txt")}
        counts = {"train_images": config.sample_images, "validation_images": VALIDATION, "test_images": TEST}
        draw_sample(**paths, **counts, seed=data_seed)
        config = dataclasses.replace(config, **paths)
        changes["image_path"] = paths["image_path"]
    if (folder / "captions.txt").exists():
        return changes
    splits, frame = load_splits(config), read_captions(config.captions_path)
    names = {split: pairs.names for split, pairs in splits.items()}
    order = np.random.default_rng(data_seed).permutation(len(names["train"]))
    kept = sorted(order[: max(2, round(share * len(order)))])
    named = {"train": [names["train"][i] for i in kept], "dev": names["validation"], "test": names["test"]}
    everything = {name for part in named.values() for name in part}
    if config.sample_images:
        known = set(frame["caption"])
        unseen = [captions_of(scene) for scene in all_scenes() if captions_of(scene)[0] not in known]
        write_scenes(folder / "scenes.txt", unseen, known)
    write_data(folder, list(frame[frame["image"].isin(everything)].itertuples(index=False)), named)
    return changes


def draw_held_out(folder, images, held_out, share, seed):
    """Draw a data set whose training and validation images lack `held_out` combinations of colour and shape.

    Half of the test images show one. The combinations spread over colours and shapes: none is new by itself.
    `scenes.txt` lists captions of other scenes with them, for the generator.
    """
    if (folder / "captions.txt").exists():
        return
    rng = np.random.default_rng(seed)
    combinations = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    absent = set(spread(combinations, held_out, rng))
    scenes = all_scenes()
    shuffled = [scenes[i] for i in rng.permutation(len(scenes))]
    with_absent = [scene for scene in shuffled if {scene[1], scene[3]} & absent]
    without = [scene for scene in shuffled if not {scene[1], scene[3]} & absent]
    train = max(2, round(share * images))
    half = TEST // 2
    needed = train + VALIDATION + half
    if len(without) < needed or len(with_absent) < half:
        raise InputError(
            f"held_out is {held_out}, which leaves {len(without)} scenes without those combinations, of which "
            f"{needed} are needed: hold out fewer, or give a smaller --share"
        )
    parts = {
        "train": without[:train],
        "dev": without[train : train + VALIDATION],
        "test": with_absent[:half] + without[train + VALIDATION : needed],
    }
    (folder / "Images").mkdir(parents=True, exist_ok=True)
    rows, named, number = [], {}, 0
    for split, chosen in parts.items():
        named[split] = []
        for scene in chosen:
            name, number = f"{split}_{number:05d}.jpg", number + 1
            draw_scene(scene, rng).save(folder / "Images" / name, quality=92)
            rows += [(name, caption) for caption in captions_of(scene)]
            named[split].append(name)
    tested = {caption for scene in parts["test"] for caption in captions_of(scene)}
    scenes = [*with_absent[half : half + NEW_CAPTIONS // 5], *parts["train"]]
    write_scenes(folder / "scenes.txt", [captions_of(scene) for scene in scenes], tested)
    write_json(folder / "held_out.json", {"combinations": sorted(absent), "test_images": named["test"][:half]})
    write_data(folder, rows, named)


def write_scenes(path, scenes, without):
    """A file for --gan_captions: the captions of a scene are a group; those of `without` are left out.

    One caption in five names no relation, so that two scenes have it.
    """
    lines = [f"{n}\t{text}" for n, captions in enumerate(scenes) for text in captions if text not in without]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def spread(combinations, number, rng):
    """`number` (colour, shape) combinations, as evenly over colours and shapes as can be."""
    chosen = []
    for combination in sorted(combinations, key=lambda _: rng.random()):
        most = [math.ceil(number / len(names)) for names in (COLOURS, SHAPES)]
        used = [sum(combination[k] == other[k] for other in chosen) for k in (0, 1)]
        if len(chosen) < number and used[0] < most[0] and used[1] < most[1]:
            chosen.append(combination)
    return chosen


def write_data(folder, rows, named):
    """A captions file and the official kind of split files; the captions last, so where they stand all is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in named.items():
        (folder / f"data.{split}Images.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    with open(folder / "captions.tmp", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    (folder / "captions.tmp").replace(folder / "captions.txt")


# ---- runs -------------------------------------------------------------------------------------------------------


def train_first(config, folder):
    """The CLIP and the GAN that all arms share; their run's folder."""
    first = dataclasses.replace(config, run=str(folder / "first"), gan="none", gan_run="", seed=FIRST_SEED)
    if not (folder / "first" / "results.json").exists():
        training.train(first)
    gan.train_gan(first)
    return str(folder / "first")


def settings_of(arm, config, folder, first):
    """What an arm changes in the settings."""
    changes = {"gan": {"real": "none", "captions": "none", "joint": "joint"}.get(arm, "pairs")}
    scenes = folder / "data" / "scenes.txt"
    held_out = (folder / "data" / "held_out.json").exists()
    if arm == "sentences" or (held_out and arm in ("pairs", "shuffled", "joint")):
        changes["gan_captions"] = str(scenes)
    if arm == "new_captions":
        changes["gan_captions"] = str(augmented(config, folder, first, "new"))
    if arm == "captions":
        changes["captions_path"] = str(augmented(config, folder, first, "kept"))
        frame = read_captions(changes["captions_path"])
        # Larger groups of captions instead of more of them: the same number of steps as the other arms have.
        of_image = read_captions(config.captions_path)["image"].value_counts().max()
        groups = -(-of_image // config.captions_per_image)
        changes["captions_per_image"] = int(-(-frame["image"].value_counts().max() // groups))
    return changes


def augmented(config, folder, first, meaning):
    """The file with new captions, or with the captions and their variants."""
    path = folder / meaning / "captions.txt"
    if path.exists():
        return path
    pairs = load_splits(config)["train"]
    neighbours = Neighbours(pairs.captions)
    number = NEW_CAPTIONS if meaning == "new" else None
    frame = read_captions(config.captions_path)  # a caption of a test picture is not to be learned from
    rows = augment_captions(pairs, neighbours, meaning, number=number, known=frame["caption"])
    accepted = read_again(rows, meaning, neighbours, pairs, first)
    rows = [row for row, good in zip(rows, accepted, strict=True) if good]
    path.parent.mkdir(exist_ok=True)
    if meaning == "new":
        write_variants(path, rows, pairs, meaning)
        return path
    variants = {}
    for image, _, variant in rows:
        variants.setdefault(pairs.names[image], []).append(variant)
    groups = frame.groupby("image", sort=False)["caption"].agg(list).to_dict()
    splits = load_splits(config)
    places = {"train": "train", "dev": "validation", "test": "test"}
    named = {place: splits[split].names for place, split in places.items()}
    write_data(path.parent, [(n, c) for n, texts in groups.items() for c in [*texts, *variants.get(n, [])]], named)
    return path


def run_arm(arm, seed, config, folder, first):
    """Train one arm with one seed, unless it has been; its test figures as a dict."""
    place = folder / f"{arm}-{seed}"
    if not (place / "test.json").exists():
        changes = {"run": str(place), "seed": seed, "gan_run": first, **settings_of(arm, config, folder, first)}
        trainer = training.Trainer(dataclasses.replace(config, **changes))
        if arm in CONTROLS:
            trainer.generated = CONTROLS[arm](
                trainer.config, trainer.splits["train"], trainer.model, trainer.device, trainer.dtype
            )
            trainer.load_checkpoint()
        trainer.fit()
        write_json(place / "test.json", test_figures([place], config, folder))
    return read_json(place / "test.json")


def run_arms(arms, seeds, config, folder):
    """The figures of all arms and seeds, {arm: {seed: {figure: value}}}."""
    first, results = train_first(config, folder), {}
    for arm in arms:
        results[arm] = {}
        for seed in seeds:
            print(f"\n==== {arm}, seed {seed} ====", flush=True)
            results[arm][seed] = run_arm(arm, seed, config, folder, first)
    return results


def test_figures(runs, config, folder):
    """Text-to-image R@1 and R@5 (%), on all test captions and on those of held-out and of seen combinations.

    Without test images (the settings were then to be chosen elsewhere) the validation images stand in for them.

    On the drawn data set also how many of the test pictures' shapes and colours are named zero-shot (%; see
    zero_shot_shapes.py). Of several runs the cosines and logits are averaged.
    """
    test, models = own_split(config)[1], [load_model(run) for run in runs]
    images = [embed_images(model, test.files) for model in models]
    scores = sum(embed_captions(m, test.captions) @ vectors.T for m, vectors in zip(models, images, strict=True)).cpu()
    owner = torch.from_numpy(test.image_index)
    ranks = (scores >= scores.gather(1, owner[:, None])).sum(1)
    parts = {"": torch.ones(len(owner), dtype=torch.bool)}
    if (folder / "data" / "held_out.json").exists():
        names = set(read_json(folder / "data" / "held_out.json")["test_images"])
        held_out = torch.tensor([test.names[image] in names for image in owner.tolist()])
        parts |= {" held-out": held_out, " seen": ~held_out}
    figures = {
        f"R@{k}{part}": 100 * (ranks[mask] <= k).double().mean().item() for part, mask in parts.items() for k in (1, 5)
    }
    for kind, names in (("colour", COLOURS), ("shape", SHAPES)):
        truth = [labels_of(test.captions[first], kind) for first in test.first[:-1]]
        if all(truth):
            logits = embedding_logits(models, images, list(names))
            figures[f"zero-shot {kind}s"] = share_named(logits, truth, list(names))[0]
    return figures


# ---- the table --------------------------------------------------------------------------------------------------


def interval(differences):
    """Mean and half-width of the 95% interval of paired differences (Student's t)."""
    n = len(differences)
    return statistics.mean(differences), student(n - 1) * statistics.stdev(differences) / math.sqrt(n)


def student(freedom):
    """The 97.5% quantile of Student's t with 4 or more degrees of freedom, within 1%: Abramowitz and Stegun 26.7.5."""
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = [
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    ]
    return sum(term / freedom**power for power, term in enumerate(terms))


def table(results, seeds):
    """A row per arm: the mean of each figure, and its paired difference to `real` with the 95% interval.

    results: {arm: {seed: {figure: value}}}.
    """
    rows = []
    for arm, by_seed in results.items():
        row = {"arm": arm}
        for figure in by_seed[seeds[0]]:
            values = [by_seed[seed][figure] for seed in seeds]
            row[figure] = f"{statistics.mean(values):.1f}"
            if arm == "real":
                row[figure] += " (" + " ".join(f"{value:.1f}" for value in values) + ")"
            elif len(seeds) < ENOUGH:
                row[figure] += " (too few seeds)"
            else:
                row[figure] += f" ({difference(by_seed, results['real'], figure, seeds)})"
        rows.append(row)
    return rows


def difference(by_seed, reference, figure, seeds):
    """The paired difference of a figure to that of the reference, with its interval, as text."""
    mean, half = interval([by_seed[seed][figure] - reference[seed][figure] for seed in seeds])
    return f"{mean:+.2f} +- {half:.2f}{', *' if abs(mean) > half else ''}"


def against_blurred(results, seeds):
    """For each arm with generated pictures its differences to `blurred`: what they bring that blurred real ones do not.

    That an arm differs from `real` and `blurred` does not is no such comparison.
    """
    arms = [arm for arm in results if arm not in ("real", "captions", *CONTROLS)]
    figures = results["blurred"][seeds[0]]
    return {
        arm: {figure: difference(results[arm], results["blurred"], figure, seeds) for figure in figures} for arm in arms
    }


def ensembles(config, folder, seeds, arm="pairs"):
    """Mean figures of ensembles of two: a plain run and one of `arm`, and two plain runs (its own and the next seed's).

    No interval is given: a plain run is in more than one of them, so they are not independent.
    """
    following = dict(zip(seeds, [*seeds[1:], seeds[0]], strict=True))
    pairs_of = {
        f"real + {arm}": lambda seed: [folder / f"real-{seed}", folder / f"{arm}-{seed}"],
        "real + real": lambda seed: [folder / f"real-{seed}", folder / f"real-{following[seed]}"],
    }
    found = {}
    for name, runs in pairs_of.items():
        by_seed = [test_figures(runs(seed), config, folder) for seed in seeds]
        found[name] = {figure: round(statistics.mean(f[figure] for f in by_seed), 2) for figure in by_seed[0]}
    return found


def check_settings(folder, config):
    """Raise InputError if the folder holds runs with other settings: they would be taken for today's."""
    path, settings = folder / "settings.json", {**vars(config), "run": "", "device": "", "num_workers": 0}
    if path.exists():
        before = read_json(path)
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"{name} is {value}, but {folder} holds runs with {before.get(name)}: give another --folder"
                )
    write_json(path, settings)


@exit_on_input_error
def main(argv=None):
    parser = OneLineParser(
        prog="gan_ablation.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all that are possible; `real` always")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(1, ENOUGH + 1)), help="default: 1 2 3 4 5")
    parser.add_argument("--share", type=float, default=1.0, help="of the training images (default: 1)")
    parser.add_argument("--held_out", type=int, default=0, help="combinations of colour and shape (default: 0)")
    parser.add_argument("--data_seed", type=int, default=0, help="of what is drawn, left out, held out (default: 0)")
    parser.add_argument("--folder", default="runs/ablation", help="where the runs are kept (default: runs/ablation)")
    own, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    given = parse_flags(rest)
    for name in OWN & given.keys():
        raise InputError(f"{name} is set for each arm by the benchmark: drop the flag")
    config = build_config(given if "image_path" in given else {**parse_flags(["--preset", "demo"]), **given})
    if not 0 < own.share <= 1 or (own.held_out and not config.sample_images):
        raise InputError("share must lie between 0 and 1, and combinations are held out of the drawn data set only")
    own.seeds = list(dict.fromkeys(own.seeds))
    if min(*own.seeds, own.data_seed, own.held_out) < 0:
        raise InputError("seeds, data_seed and held_out must be at least 0")
    if FIRST_SEED in own.seeds:
        raise InputError(f"seed {FIRST_SEED} is that of the CLIP whose GAN is used: give others")
    name = f"share-{own.share:g}-held-out-{own.held_out}-data-{own.data_seed}"
    if not config.sample_images:
        name = f"{Path(config.image_path).resolve().parent.name}-{name}"
    folder = Path(own.folder) / name
    # Sentences that no photograph has can be written for drawn scenes alone; held out, `pairs` already has them.
    possible = [arm for arm in ARMS if arm != "sentences" or (config.sample_images and not own.held_out)]
    if "sentences" in (own.arms or ()) and "sentences" not in possible:
        raise InputError("the arm sentences needs the drawn data set with nothing held out: leave it or --held_out out")
    data = prepare_data(config, folder / "data", own.share, own.held_out, own.data_seed)
    check_settings(folder, config)
    config = dataclasses.replace(config, **data)
    try:
        results = run_arms(dict.fromkeys(["real", *(own.arms or possible)]), own.seeds, config, folder)
    except (KeyboardInterrupt, SystemExit, training.Stopped):
        print("\nstopped; the same command goes on here", flush=True)
        raise SystemExit(130) from None
    more = {}
    if "pairs" in results and len(own.seeds) >= ENOUGH:
        more["ensembles"] = ensembles(config, folder, own.seeds)
    if "blurred" in results and len(own.seeds) >= ENOUGH:
        more["differences to blurred"] = against_blurred(results, own.seeds)
    rows = table(results, own.seeds)
    note = "paired differences to real with 95% intervals; *: the interval excludes zero"
    if len(own.seeds) < ENOUGH:
        note = f"{len(own.seeds)} seeds: no conclusion is drawn from fewer than {ENOUGH}"
    details = {"runs": results}
    place = folder if len(own.seeds) < ENOUGH else None  # what concludes nothing takes no place among the results
    report(f"gan_ablation-{name}", rows, details, place, note=note, seeds=own.seeds, settings=rest, **more)


if __name__ == "__main__":
    main()
