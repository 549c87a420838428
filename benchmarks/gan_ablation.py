"""The effect of generated images on CLIP: several arms and seeds, paired differences with 95% intervals.

    python benchmarks/gan_ablation.py                                    the synthetic data set, all arms, five seeds
    python benchmarks/gan_ablation.py --share 0.1                        with a tenth of the training images
    python benchmarks/gan_ablation.py --share 0.25 --held_out 8          eight combinations of colour and shape are in
                                                                         no training image, but are generated
    python benchmarks/gan_ablation.py --preset scratch --image_path ... --captions_path ...     Flickr8k
                                      --held_out 8 --gan_run RUN         the GAN of a run, and eight pairs of a subject
                                                                         and a context, such as a dog and snow

All arms of a seed start from the same weights and train on the same real batches for the same number of steps (with
fewer images there are more epochs: their number is divided by the share):

    real          real pairs only
    pairs         also generated images with their captions
    shuffled      also generated images, each with the caption of another one: the negative control
    blurred       also real images downsampled to the resolution of the generator (to half of CLIP's, if it is not
                  lower): the control for blur
    duplicates    also more real images, drawn independently of the batch: the control for more images
    nearest       with combinations held out, the captions of pairs, each with the real image of the most similar
                  training caption: the control for the captions
    captions      real pairs and variants of their captions (extras.augment_captions, same meaning)
    new_captions  also generated images for captions of no image (extras.augment_captions, new meaning)
    sentences     also generated images for captions of scenes outside the data set (few images, many sentences)
    joint         as pairs, with a GAN that keeps training along with CLIP

With combinations held out, pairs, shuffled, nearest and joint use captions with these combinations as well as training
captions; on photographs, only captions of the images left out, all but two of each, which are the test captions. The
data set, the CLIP of stage 1 and its GAN are created once (or given, `--gan_run`) and shared by all seeds: the
intervals are for this data set and this GAN. Choose settings with another `--data_seed`, which gives other images and
holds out other combinations (not on photographs). Fewer than five seeds are inconclusive. Finished runs are kept in
`--folder`; a stopped benchmark continues there. Other flags are those of main.py (default: --preset demo).
"""

import argparse
import contextlib
import csv
import dataclasses
import itertools
import math
import statistics
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from combinations import NUM_QUERIES, choose_combinations, leave_out_combinations  # noqa: E402
from common import check_folder, holm, print_table, report  # noqa: E402
from control_arms import CONTROLS  # noqa: E402
from scipy import stats  # noqa: E402
from zero_shot_shapes import labels_of, share_named  # noqa: E402

import gan  # noqa: E402
import main as clip_training  # noqa: E402
from clip import load_model  # noqa: E402
from config import InputError, build_config  # noqa: E402
from dataset import load_splits, subset_pairs  # noqa: E402
from extras.augment_captions import TrigramProposals, augment_captions, filter_variants, write_variants  # noqa: E402
from extras.search_index import default_split  # noqa: E402
from extras.zero_shot import embedding_logits  # noqa: E402
from inference import embed_images  # noqa: E402
from utils.captions import read_captions  # noqa: E402
from utils.cli import exit_on_input_error  # noqa: E402
from utils.embed import embed_captions  # noqa: E402
from utils.files import atomic_write, read_json, write_json  # noqa: E402
from utils.flags import OneLineParser, parse_flags  # noqa: E402
from utils.runs import adopt_gan_settings  # noqa: E402
from utils.synthetic import COLORS, SHAPES, all_scenes, generate_dataset, render_scene, scene_captions  # noqa: E402

# fmt: off
ARMS = (
    "real", "pairs", "shuffled", "blurred", "duplicates", "nearest", "captions", "new_captions", "sentences", "joint",
)
# fmt: on
MIN_SEEDS = 5  # for a conclusion
ARM_SETTINGS = {"run", "resume", "seed", "gan", "gan_captions"}  # set by the benchmark
STAGE_1_SEED = 1000  # of the CLIP and the GAN of stage 1; not allowed for an arm
NUM_NEW_CAPTIONS = 2000
NUM_VALIDATION, NUM_TEST = 200, 400  # synthetic images


# ---- data -------------------------------------------------------------------------------------------------------


def prepare_data(config, folder, share, held_out, data_seed):
    """The changed settings of the data set, which is written to `folder` where it is a new one.

    The split is always written to files: otherwise another seed would give another split, and the GAN, whose run has a
    seed of its own, would have seen test images.
    """
    changes = {name: round(getattr(config, name) / share) for name in ("epochs", "gan_epochs")}
    changes |= {"captions_path": str(folder / "captions.txt"), "sample_images": 0}
    if held_out and not config.sample_images:
        leave_out_photographs(config, folder, held_out)
        return changes
    if held_out:
        render_held_out(folder, config.sample_images, held_out, share, data_seed)
        return {**changes, "image_path": str(folder / "Images")}
    if config.sample_images:
        paths = {"image_path": str(folder / "Images"), "captions_path": str(folder / "all" / "captions.txt")}
        counts = {
            "train_images": config.sample_images,
            "validation_images": NUM_VALIDATION,
            "test_images": NUM_TEST,
        }
        generate_dataset(**paths, **counts, seed=data_seed)
        config = dataclasses.replace(config, **paths)
        changes["image_path"] = paths["image_path"]
    if (folder / "captions.txt").exists():
        return changes
    splits, frame = load_splits(config), read_captions(config.captions_path)
    names = {split: pairs.names for split, pairs in splits.items()}
    order = np.random.default_rng(data_seed).permutation(len(names["train"]))
    kept = sorted(order[: max(2, round(share * len(order)))])
    split_files = {"train": [names["train"][i] for i in kept], "dev": names["validation"], "test": names["test"]}
    used = {name for part in split_files.values() for name in part}
    if config.sample_images:
        known = set(frame["caption"])
        unseen = [scene_captions(scene) for scene in all_scenes() if scene_captions(scene)[0] not in known]
        write_scenes(folder / "scenes.txt", unseen, known)
    write_data(folder, list(frame[frame["image"].isin(used)].itertuples(index=False)), split_files)
    return changes


def render_held_out(folder, num_images, held_out, share, seed):
    """Write a data set whose training and validation images lack `held_out` combinations of colour and shape.

    Half of the test images contain one of them. The combinations are spread over colours and shapes, so that none of
    these is new. scenes.txt lists captions of other scenes with the combinations, for the generator.
    """
    if (folder / "captions.txt").exists():
        return
    rng = np.random.default_rng(seed)
    combinations = [(color, shape) for color in COLORS for shape in SHAPES]
    absent = set(spread(combinations, held_out, rng))
    scenes = all_scenes()
    shuffled = [scenes[i] for i in rng.permutation(len(scenes))]
    with_absent = [scene for scene in shuffled if {scene[1], scene[3]} & absent]
    without = [scene for scene in shuffled if not {scene[1], scene[3]} & absent]
    train = max(2, round(share * num_images))
    half = NUM_TEST // 2
    needed = train + NUM_VALIDATION + half
    if len(without) < needed or len(with_absent) < half:
        raise InputError(
            f"held_out is {held_out}, which leaves {len(without)} scenes without those combinations, but {needed} are "
            "needed: hold out fewer, or pass a smaller --share"
        )
    splits = {
        "train": without[:train],
        "dev": without[train : train + NUM_VALIDATION],
        "test": with_absent[:half] + without[train + NUM_VALIDATION : needed],
    }
    (folder / "Images").mkdir(parents=True, exist_ok=True)
    rows, split_files, number = [], {}, 0
    for split, chosen in splits.items():
        split_files[split] = []
        for scene in chosen:
            name, number = f"{split}_{number:05d}.jpg", number + 1
            render_scene(scene, rng).save(folder / "Images" / name, quality=92)
            rows += [(name, caption) for caption in scene_captions(scene)]
            split_files[split].append(name)
    test_captions = {caption for scene in splits["test"] for caption in scene_captions(scene)}
    scenes = [*with_absent[half : half + NUM_NEW_CAPTIONS // 5], *splits["train"]]
    write_scenes(folder / "scenes.txt", [scene_captions(scene) for scene in scenes], test_captions)
    content = {"combinations": sorted(absent), "test_images": split_files["test"][:half]}
    write_json(folder / "held_out.json", content)
    write_data(folder, rows, split_files)


def leave_out_photographs(config, folder, held_out):
    """Write a data set whose training images lack `held_out` combinations of a subject and a context.

    The images left out and half of the validation images are the test images. scenes.txt lists captions of the images
    left out, for the generator; the other `NUM_QUERIES` of each are test captions.
    """
    if (folder / "captions.txt").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    splits, frame = load_splits(config), read_captions(config.captions_path)
    train, validation = splits["train"], splits["validation"].names
    combinations = choose_combinations(train, held_out)
    if len(combinations) < held_out:
        found = f"only {len(combinations)} combinations are named often enough"
        raise InputError(f"held_out is {held_out}, but {found}: hold out fewer")
    left_out, _ = leave_out_combinations(train, combinations)
    absent = subset_pairs(train, np.flatnonzero(left_out).tolist())
    split_files = {"train": [train.names[image] for image in np.flatnonzero(~left_out)]}
    split_files |= {"dev": validation[::2], "test": [*absent.names, *validation[1::2]]}
    if (fewest := np.diff(absent.caption_offsets).min()) <= NUM_QUERIES:
        needed = f"{NUM_QUERIES} are test captions, the others for the generator"
        raise InputError(f"held_out needs at least {NUM_QUERIES + 1} captions per image, found {fewest}: {needed}")
    captions = [list(absent.captions_of(image))[:-NUM_QUERIES] for image in range(len(absent.files))]
    scenes = [[absent.captions[j] for j in own] for own in captions]
    write_scenes(folder / "scenes.txt", scenes, set())
    write_json(folder / "held_out.json", {"combinations": combinations, "test_images": absent.names})
    used = {name for names in split_files.values() for name in names}
    from_last = frame.groupby("image").cumcount(ascending=False)
    kept = frame["image"].isin(used) & (~frame["image"].isin(absent.names) | (from_last < NUM_QUERIES))
    write_data(folder, list(frame[kept].itertuples(index=False)), split_files)


def write_scenes(path, scenes, exclude):
    """Write a file for --gan_captions: the captions of a scene form a group; those in `exclude` are omitted.

    One caption in five names no relation, so two scenes share it.
    """
    lines = [f"{n}\t{text}" for n, captions in enumerate(scenes) for text in captions if text not in exclude]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def spread(combinations, number, rng):
    """`number` random (colour, shape) combinations, as evenly over colours and shapes as possible."""
    chosen = []
    for combination in sorted(combinations, key=lambda _: rng.random()):
        max_used = [math.ceil(number / len(names)) for names in (COLORS, SHAPES)]
        used = [sum(combination[k] == other[k] for other in chosen) for k in (0, 1)]
        if len(chosen) < number and used[0] < max_used[0] and used[1] < max_used[1]:
            chosen.append(combination)
    return chosen


def write_data(folder, rows, split_files):
    """Write official-style split files and a captions file; the captions last: where they exist, all is complete."""
    for split, names in split_files.items():
        with atomic_write(folder / f"data.{split}Images.txt") as temporary:
            temporary.write_text("\n".join(names) + "\n", encoding="utf-8")
    with atomic_write(folder / "captions.txt") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])


# ---- runs -------------------------------------------------------------------------------------------------------


def train_stages_1_and_2(config, folder):
    """Train the CLIP and the GAN that all arms share, unless `gan_run` is given; returns their run folder."""
    if config.gan_run:
        return config.gan_run
    run = folder / "stage1"
    stage_1 = dataclasses.replace(config, run=str(run), gan="none", gan_run="", seed=STAGE_1_SEED)
    if not (run / "results.json").exists():
        clip_training.train(stage_1)
    gan.train_gan(stage_1)
    return str(run)


def arm_settings(arm, config, folder, stage_1):
    """The settings that an arm changes."""
    changes = {"gan": {"real": "none", "captions": "none", "joint": "joint"}.get(arm, "pairs")}
    held_out = (folder / "data" / "held_out.json").exists()
    if arm == "sentences" or (held_out and arm in ("pairs", "shuffled", "nearest", "joint")):
        changes["gan_captions"] = str(folder / "data" / "scenes.txt")
    if arm == "new_captions":
        changes["gan_captions"] = str(augmented_captions(config, folder, stage_1, "new"))
    if arm == "captions":
        changes["captions_path"] = str(augmented_captions(config, folder, stage_1, "same"))
        frame = read_captions(changes["captions_path"])
        # Larger groups of captions rather than more groups: the number of steps is that of the other arms.
        max_captions = read_captions(config.captions_path)["image"].value_counts().max()
        groups = math.ceil(max_captions / config.captions_per_image)
        changes["captions_per_image"] = math.ceil(frame["image"].value_counts().max() / groups)
    return changes


def augmented_captions(config, folder, stage_1, meaning):
    """The file with new captions, or with the captions and their variants."""
    path = folder / f"{meaning}_meaning" / "captions.txt"
    if path.exists():
        return path
    splits, frame = load_splits(config), read_captions(config.captions_path)
    proposals = TrigramProposals(splits["train"].captions)
    number = NUM_NEW_CAPTIONS if meaning == "new" else None
    # Captions of test images must not be trained on.
    rows = augment_captions(splits["train"], proposals, meaning, number=number, known=frame["caption"])
    rows = filter_variants(rows, meaning, proposals, splits["train"], stage_1)
    if meaning == "new":
        write_variants(path, rows, splits["train"], meaning)
        return path
    variants = {}
    for image, _, variant in rows:
        variants.setdefault(splits["train"].names[image], []).append(variant)
    captions = frame.groupby("image", sort=False)["caption"].agg(list).to_dict()
    rows = [(name, text) for name, texts in captions.items() for text in [*texts, *variants.get(name, [])]]
    write_data(
        path.parent,
        rows,
        {"train": splits["train"].names, "dev": splits["validation"].names, "test": splits["test"].names},
    )
    return path


def run_arm(arm, seed, config, folder, stage_1):
    """Train one arm with one seed, unless it is finished; returns its test metrics, a dict."""
    run = folder / f"{arm}-{seed}"
    if not (run / "test.json").exists():
        changes = {"run": str(run), "seed": seed, "gan_run": stage_1, **arm_settings(arm, config, folder, stage_1)}
        control = patch("gan.build_augmentation", CONTROLS[arm]) if arm in CONTROLS else contextlib.nullcontext()
        with control:
            clip_training.train(dataclasses.replace(config, **changes))
        write_json(run / "test.json", test_metrics([run], config, folder))
    return read_json(run / "test.json")


def run_arms(arms, seeds, config, folder):
    """The test metrics of all arms and seeds, {arm: {seed: {metric: value}}}."""
    stage_1, results = train_stages_1_and_2(config, folder), {}
    for arm in arms:
        results[arm] = {}
        for seed in seeds:
            print(f"\n==== {arm}, seed {seed} ====", flush=True)
            results[arm][seed] = run_arm(arm, seed, config, folder, stage_1)
    return results


def test_metrics(runs, config, folder):
    """Text-to-image R@1, R@5, R@10 (%), over all test captions and over those with held-out and with seen combinations.

    Without a test split, on the validation split: then choose settings elsewhere. On the synthetic data set also the
    share of colours and shapes of the test images that are predicted (%; see zero_shot_shapes.py). Several runs
    are an ensemble: the means of their cosines and logits.
    """
    test, models = default_split(config)[1], [load_model(run) for run in runs]
    images = [embed_images(model, test.files) for model in models]
    scores = sum(embed_captions(m, test.captions) @ vectors.T for m, vectors in zip(models, images, strict=True)).cpu()
    image_index = torch.from_numpy(test.image_index)
    ranks = (scores >= scores.gather(1, image_index[:, None])).sum(1)
    parts = {"": torch.ones(len(image_index), dtype=torch.bool)}
    if (folder / "data" / "held_out.json").exists():
        names = set(read_json(folder / "data" / "held_out.json")["test_images"])
        held_out = torch.tensor([test.names[image] in names for image in image_index.tolist()])
        parts |= {" held-out": held_out, " seen": ~held_out}
    metrics = {
        f"R@{k}{part}": 100 * (ranks[mask] <= k).double().mean().item()
        for part, mask in parts.items()
        for k in (1, 5, 10)
    }
    for name, kind, labels in (("colours", "color", COLORS), ("shapes", "shape", SHAPES)):
        truth = [labels_of(test.captions[first], kind) for first in test.caption_offsets[:-1]]
        if all(truth):
            logits = embedding_logits(models, images, list(labels))
            metrics[f"zero-shot {name}"] = share_named(logits, truth, list(labels))[0]
    return metrics


# ---- the table --------------------------------------------------------------------------------------------------


def interval(differences):
    """Mean and half-width of the 95% interval of paired differences (Student's t)."""
    n = len(differences)
    half_width = stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return statistics.mean(differences), float(half_width)


def table(results, seeds):
    """A row per arm: the mean of each metric, and its paired difference from `real` with the 95% interval.

    results: {arm: {seed: {metric: value}}}.
    """
    rows = []
    for arm, by_seed in results.items():
        row = {"arm": arm}
        for metric in by_seed[seeds[0]]:
            values = [by_seed[seed][metric] for seed in seeds]
            row[metric] = f"{statistics.mean(values):.1f}"
            if arm == "real":
                row[metric] += " (" + " ".join(f"{value:.1f}" for value in values) + ")"
            elif len(seeds) < MIN_SEEDS:
                row[metric] += " (too few seeds)"
            else:
                row[metric] += f" ({difference(by_seed, results['real'], metric, seeds)})"
        rows.append(row)
    return rows


def difference(by_seed, reference, metric, seeds):
    """The paired difference of a metric from that of the reference, with its interval, as text."""
    mean, half_width = interval([by_seed[seed][metric] - reference[seed][metric] for seed in seeds])
    return f"{mean:+.2f} +- {half_width:.2f}{', *' if abs(mean) > half_width else ''}"


def claims(results, seeds):
    """Rows of the paired differences of the arms with generated images from every other arm, with 95% intervals.

    They do not follow from an arm that differs from `real` where the control does not. p: of the paired t-test,
    corrected for the rows of the same metric (Holm 1979).
    """
    controls = [arm for arm in results if arm in ("real", "captions", *CONTROLS)]
    rows = []
    for metric in results["real"][seeds[0]]:
        found = []
        for arm, control in itertools.product([arm for arm in results if arm not in controls], controls):
            values = [results[arm][seed][metric] - results[control][seed][metric] for seed in seeds]
            row = {"metric": metric, "arm": arm, "control": control}
            row["difference"] = difference(results[arm], results[control], metric, seeds)
            found.append((row, 1.0 if len(set(values)) == 1 else stats.ttest_1samp(values, 0).pvalue))
        rows += [{**row, "p": f"{p:.2g}"} for (row, _), p in zip(found, holm([p for _, p in found]), strict=True)]
    return rows


def ensembles(config, folder, seeds, arm="pairs"):
    """Mean metrics of ensembles of two runs: `real` and `arm` of one seed, and `real` of two successive seeds.

    Without intervals: a run is in several ensembles, so they are not independent.
    """
    following = dict(zip(seeds, [*seeds[1:], seeds[0]], strict=True))
    members = {
        f"real + {arm}": lambda seed: [folder / f"real-{seed}", folder / f"{arm}-{seed}"],
        "real + real": lambda seed: [folder / f"real-{seed}", folder / f"real-{following[seed]}"],
    }
    found = {}
    for name, runs in members.items():
        by_seed = [test_metrics(runs(seed), config, folder) for seed in seeds]
        found[name] = {metric: round(statistics.mean(m[metric] for m in by_seed), 2) for metric in by_seed[0]}
    return found


# ---- the command ------------------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    """(arguments of the benchmark, `Config` of the runs, flags of the runs); raises InputError."""
    parser = OneLineParser(
        prog="gan_ablation.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    seeds = list(range(1, MIN_SEEDS + 1))
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        help="arms (default: all that apply); `real` is always included",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds, help="seeds of the runs (default: 1 2 3 4 5)")
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="fraction of the training images to use, above 0 and up to 1 (default: 1)",
    )
    parser.add_argument(
        "--held_out",
        type=int,
        default=0,
        help="number of combinations to hold out (default: 0)",
    )
    parser.add_argument(
        "--data_seed",
        type=int,
        default=0,
        help="random seed of the images, the fraction and the combinations (default: 0)",
    )
    parser.add_argument("--folder", default="runs/ablation", help="folder of the runs (default: runs/ablation)")
    own, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    given, _ = parse_flags(rest)
    for name in ARM_SETTINGS & given.keys():
        raise InputError(f"{name} is set by the benchmark for each arm: drop the flag")
    config = build_config(given if "image_path" in given else {**parse_flags(["--preset", "demo"])[0], **given})
    if config.gan_run:
        config, _ = adopt_gan_settings(config, given)
    if not 0 < own.share <= 1:
        raise InputError("share must be above 0 and at most 1")
    if own.held_out and not config.sample_images and (own.share < 1 or own.data_seed):
        raise InputError("on photographs, held_out requires all images: pass neither --share nor --data_seed")
    own.seeds = list(dict.fromkeys(own.seeds))
    if min(*own.seeds, own.data_seed, own.held_out) < 0:
        raise InputError("seeds, data_seed and held_out must be at least 0")
    if STAGE_1_SEED in own.seeds:
        raise InputError(f"seed {STAGE_1_SEED} is that of stage 1: use others")
    own.arms = list(dict.fromkeys(["real", *(own.arms or possible_arms(own, config))]))
    for arm in set(own.arms) - set(possible_arms(own, config)):
        needed = {"sentences": "the synthetic data set and no --held_out", "nearest": "--held_out"}[arm]
        raise InputError(f"the arm {arm} requires {needed}")
    return own, config, rest


def possible_arms(own, config):
    """The arms that apply, a list.

    Captions of unseen scenes exist for synthetic scenes only; with combinations held out, `pairs` already uses them.
    Without, a training caption would be the nearest to itself.
    """
    unused = {"sentences"} if own.held_out or not config.sample_images else set()
    unused |= set() if own.held_out else {"nearest"}
    return [arm for arm in ARMS if arm not in unused]


@exit_on_input_error
def main(argv=None):
    own, config, rest = parse_arguments(argv)
    name = f"share-{own.share:g}-held-out-{own.held_out}-data-{own.data_seed}"
    if not config.sample_images:
        name = f"{Path(config.image_path).resolve().parent.name}-{name}"
    folder = Path(own.folder) / name
    data = prepare_data(config, folder / "data", own.share, own.held_out, own.data_seed)
    check_folder(folder, config)
    config = dataclasses.replace(config, **data)
    try:
        results = run_arms(own.arms, own.seeds, config, folder)
    except (KeyboardInterrupt, SystemExit):
        print("\nstopped; the same command continues", flush=True)
        raise SystemExit(130) from None
    more = {}
    if "pairs" in results and len(own.seeds) >= MIN_SEEDS:
        more["ensembles"] = ensembles(config, folder, own.seeds)
    details, rows = {"runs": results}, table(results, own.seeds)
    if len(own.seeds) >= MIN_SEEDS and (found := claims(results, own.seeds)):
        details["claims"] = found
        print_table(found, "claims")
    note = "paired differences from real with 95% intervals; *: the interval excludes zero"
    if len(own.seeds) < MIN_SEEDS:
        note = f"{len(own.seeds)} seeds: no conclusion is drawn from fewer than {MIN_SEEDS}"
    target = folder if len(own.seeds) < MIN_SEEDS else None  # inconclusive results are not among benchmarks/results
    report(f"gan_ablation-{name}", rows, details, target, note=note, seeds=own.seeds, settings=rest, **more)


if __name__ == "__main__":
    main()
