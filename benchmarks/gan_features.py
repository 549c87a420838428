"""Do generated image features make CLIP better on photographs? Frozen encoders, paired seeds, controls.

    python benchmarks/gan_features.py --share 0.1 --seeds 20 [--image_path ... and other flags of main.py]
    python benchmarks/gan_features.py --held_out --seeds 20 [...]
    python benchmarks/gan_features.py (--share 0.1 | --held_out) --gan_run RUN [...]

The projection heads of `--preset frozen` see nothing but features, so a generator may make features instead of images:
a small conditional GAN from (noise, caption features) to image features, in the manner of Xian et al. 2018
(arXiv:1712.00981), trained with the losses of gan.py. With `--share`, only that share of the training images is used,
another one for every seed, and features are generated for the captions of all the others (of all images for a share of
1). With `--held_out`, captions of no training image name certain combinations such as a dog and snow; features are
generated for captions of the images left out, and their other captions that name a combination are the queries. With
`--gan_run`, the training images of all seeds are those of that run (`--write_split` writes a split file for it). All
arms of a seed start from the same weights and see the same real batches for the same number of steps:

    real          real pairs only
    two_models    real pairs only; the mean similarity of two models
    gan           also features from the feature GAN
    shuffled      the same features, each with the caption of another image
    regression    also features predicted from the captions by a network without noise (mean squared error)
    nearest       also the features of the real image with the most similar caption
    noise         also real features with Gaussian noise that has the spread of the features of a caption
    mixup         also interpolations of two real pairs, features and captions; no negatives of the closer pair
    duplicates    also more real pairs
    captions      also real images with variants of their captions (extras.augment_captions, not filtered by a CLIP)
    images        also features of images from the image GAN of `--gan_run`, encoded by the frozen encoder
    shuffled_images  the same, each with the caption of another image
    blurred       also features of real images downsampled to the resolution of that GAN
    left_out      also the real features of the images left out: the upper bound

Results are those after the last step on the validation images; no epoch and no arm is selected on them, but the presets
and the settings of this benchmark were. They depend on `--at_once`, as seeds trained at once share random numbers.
Finished seeds are kept in `--folder`, and a stopped benchmark continues there.
"""

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from combinations import NUM_QUERIES, choose_combinations, leave_out_combinations  # noqa: E402
from common import ROOT, check_folder, holm, print_table, report  # noqa: E402
from gan_evaluate import caption_ranks, kernel_distance, nearest_distance  # noqa: E402
from scipy import stats  # noqa: E402
from stacked import Draws, Standardised, train_feature_gan, train_heads, train_regression  # noqa: E402

import gan  # noqa: E402
import main as clip_training  # noqa: E402
from clip import retrieval_metrics  # noqa: E402
from config import PRESETS, InputError, build_config  # noqa: E402
from dataset import load_splits, subset_pairs  # noqa: E402
from extras.augment_captions import TrigramProposals, augment_captions  # noqa: E402
from utils.captions import text_ids  # noqa: E402
from utils.cli import exit_on_input_error, progress_bar  # noqa: E402
from utils.device import full_float32, setup_device  # noqa: E402
from utils.embed import (  # noqa: E402
    cached_features,
    embed_captions,
    encode_dataset,
    fast_image_encoder,
    image_batch_size,
    precompute_features,
)
from utils.files import read_json, write_json  # noqa: E402
from utils.flags import parse_flags  # noqa: E402
from utils.gan_layers import NOISE_DIM  # noqa: E402
from utils.image_cache import EvaluationImages, open_images  # noqa: E402

# fmt: off
ARMS = (
    "real", "two_models", "gan", "shuffled", "regression", "nearest", "noise", "mixup", "duplicates", "captions",
    "images", "shuffled_images", "blurred", "left_out",
)
CONTROLS = ("real", "noise", "mixup", "duplicates", "captions", "nearest", "blurred")
# fmt: on
CLAIMS = {
    "gan": (*CONTROLS, "regression", "shuffled"),
    "regression": CONTROLS,
    "images": (*CONTROLS, "shuffled_images"),
}
METRICS = ("text_to_image_R@1", "text_to_image_R@10", "image_to_text_R@10", "rsum")
SECOND_MODEL = 10_000  # added to the seed of the second model of the arm two_models


# ---- data -------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Training features on the device, and which of them each of S seeds uses.

    images (N, F), texts (T, F), text_ids and image_index (T,); pairs: the `Pairs` of each seed; real_images,
    real_captions and pool_captions (S, .): the indices of its images, of their captions, and of the captions that
    features are generated for. queries: captions (Q,) that name a combination left out, or None.
    """

    images: torch.Tensor
    texts: torch.Tensor
    text_ids: torch.Tensor
    image_index: torch.Tensor
    pairs: list
    real_images: torch.Tensor
    real_captions: torch.Tensor
    pool_captions: torch.Tensor
    queries: torch.Tensor | None = None

    def __post_init__(self):
        self.standard = Standardised([self.images[images] for images in self.real_images])


def load(config):
    """The CLIP, and the training and validation pairs with features."""
    splits = clip_training.load_data(config)
    device, amp_dtype = setup_device(config.device, config.precision)
    if amp_dtype == torch.bfloat16 and device.type == "cpu":
        torch.set_float32_matmul_precision("medium")  # the heads and the feature GAN in bf16, too
    model = clip_training.build_model(config, splits["train"].captions, device)
    open_images(splits, config)
    precompute_features(model, splits, amp_dtype, config)
    return model, splits["train"], splits["validation"]


def choose_data(train, options, seeds, device):
    """The `Data` of these seeds; raises InputError if the images have different numbers of captions."""
    count, numbers = len(train.files), np.diff(train.caption_offsets)
    if (numbers != numbers[0]).any():
        raise InputError(f"images have {numbers.min()} to {numbers.max()} captions: this benchmark needs equal numbers")
    if options.held_out and numbers[0] <= NUM_QUERIES:
        raise InputError(f"held_out needs at least {NUM_QUERIES + 1} captions per image, found {numbers[0]}")
    real, pool, queries, own = [], [], None, np.arange(numbers[0])
    seen = np.isin(train.names, names_of_gan_run(options.gan_run)) if options.gan_run else None
    for seed in seeds:
        if options.held_out:
            left_out, named = leave_out_combinations(train, choose_combinations(train))
            named &= left_out[train.image_index] & np.tile(own >= numbers[0] - NUM_QUERIES, count)
            queries = torch.from_numpy(np.flatnonzero(named)).to(device)
        else:
            left_out = leave_out_share(count, options.share, seed) if seen is None else ~seen
        if seen is not None and ((seen & left_out).any() or not seen.any()):
            raise InputError(f"gan_run is {options.gan_run}, whose GAN was not trained on these images alone")
        real.append(np.flatnonzero(~left_out))
        pool.append(np.flatnonzero(left_out) if left_out.any() else np.arange(count))

    def captions(images, own=own):
        return (images[:, None] * numbers[0] + own).ravel()

    def stack(arrays):
        return torch.from_numpy(np.stack(arrays)).to(device)

    return Data(
        images=train.image_features.to(device),
        texts=train.text_features.to(device),
        text_ids=torch.from_numpy(text_ids(train.captions)).to(device),
        image_index=torch.from_numpy(train.image_index).to(device),
        pairs=[subset_pairs(train, images.tolist()) for images in real],
        real_images=stack(real),
        real_captions=stack([captions(images) for images in real]),
        pool_captions=stack([captions(images, own[:-NUM_QUERIES] if options.held_out else own) for images in pool]),
        queries=queries,
    )


def leave_out_share(count, share, seed):
    """(N,) booleans: all but a random share of the images."""
    left_out = np.ones(count, bool)
    left_out[np.random.default_rng([seed, 7]).permutation(count)[: round(share * count)]] = False
    return left_out


def names_of_gan_run(run):
    """The names of the training images of a run with a GAN."""
    config = gan.load_model(gan.conditioning_run(gan.gan_run_folder(run))).config
    return load_splits(config)["train"].names


# ---- arms -------------------------------------------------------------------------------------------------------


class Arms:
    """The pairs that the arms, but "real", add to a batch; `made` holds the networks and tables that make features."""

    def __init__(self, arms, data, made, ratio, seeds):
        self.arms, self.data, self.made, self.ratio, self.seeds = arms, data, made, ratio, seeds
        captions = data.real_captions
        if "noise" in arms:  # with the spread of the features of a caption
            residual = data.standard(data.images[data.image_index[captions]]) - made.regression(data.texts[captions])
            self.spread = residual.std(1, keepdim=True) * data.standard.std
        if "nearest" in arms:  # (S, T): the most similar real caption of each
            texts = F.normalize(data.texts, dim=1)
            found = [torch.cat([(part @ texts[real].T).argmax(1) for part in texts.split(4096)]) for real in captions]
            self.nearest = captions.gather(1, torch.stack(found))

    @torch.no_grad()
    def __call__(self, step, num_real):
        """Features (S, A, E, F_i) and (S, A, E, F_t), image ids and text ids (S, A, E)."""
        data, count = self.data, round(self.ratio * num_real)
        draws = Draws(data.texts.device, self.seeds[0], step, 1)
        pool, other = (draws.choose(data.pool_captions, count) for _ in range(2))
        real, noise = draws.choose(data.real_captions, count), draws.normal(len(self.seeds), count, NOISE_DIM)
        made = {}
        if {"gan", "shuffled"} & set(self.arms):
            made["gan"] = data.standard.inverse(self.made.generator(data.texts[pool], noise))
        parts = []
        for arm in self.arms:
            if arm == "mixup":
                parts.append(self.mixup(real, draws))
                continue
            captions = {"shuffled": other, "shuffled_images": other}.get(arm, pool)
            captions = real if arm in ("noise", "duplicates", "blurred") else captions
            captions = draws.choose(self.made.variants, count) if arm == "captions" else captions
            if arm in ("gan", "shuffled"):
                features = made["gan"]
            elif arm in ("captions", "left_out"):
                features = data.images[data.image_index[captions]]
            else:
                features = self.features(arm, pool, real, draws)
            sources = self.nearest.gather(1, pool) if arm == "nearest" else captions
            parts.append((features, data.texts[captions], data.image_index[sources], data.text_ids[captions]))
        return [torch.stack(each, 1) for each in zip(*parts, strict=True)]

    def features(self, arm, pool, real, draws):
        """(S, E, F_i) for captions of the pool or of the real images."""
        data = self.data
        if arm == "regression":
            return data.standard.inverse(self.made.regression(data.texts[pool]))
        if arm == "nearest":
            return data.images[data.image_index[self.nearest.gather(1, pool)]]
        if arm in ("images", "shuffled_images"):
            return self.made.generated[pool]
        if arm == "blurred":
            return self.made.blurred[data.image_index[real]]
        features = data.images[data.image_index[real]]
        if arm == "noise":
            features = features + self.spread * draws.normal(*features.shape)
            return features.clamp(min=0) if data.standard.positive else features
        return features

    def mixup(self, real, draws):
        """Interpolations of two real pairs, with the ids of the closer one."""
        weight, data = draws.uniform(*real.shape, 1), self.data
        mixed = [torch.lerp(x, x.roll(1, 1), weight) for x in (data.images[data.image_index[real]], data.texts[real])]
        closer = torch.where(weight[..., 0] < 0.5, real, real.roll(1, 1))
        return *mixed, data.image_index[closer], data.text_ids[closer]


@torch.no_grad()
@full_float32()
def evaluate(models, seed, arm, data, validation):
    """Recalls on the validation images; with combinations left out, those of the captions that name one.

    models: a list of `Heads`, whose similarities are averaged.
    """

    def embed(name, features):
        found = []
        for heads in models:
            parameters = {key: x[seed, arm] for (head, key), x in heads.parameters.items() if head == name}
            found.append(F.normalize(F.linear(features, **parameters), dim=-1))
        return torch.cat(found, 1) / len(models) ** 0.5

    device = data.texts.device
    images, texts = (
        embed("image", validation.image_features.to(device)),
        embed("text", validation.text_features.to(device)),
    )
    found = retrieval_metrics(images, texts, validation.image_index)
    if data.queries is not None:
        real = torch.zeros(len(data.images), dtype=torch.bool, device=device).index_fill(0, data.real_images[0], 1)
        own = data.image_index[data.queries]
        gallery = torch.cat([embed("image", data.images), images])
        scores = embed("text", data.texts[data.queries]) @ gallery.T
        target = scores.gather(1, own[:, None])
        scores[:, : len(real)].masked_fill_(real, -torch.inf)  # training images are not searched
        ranks = (scores >= target).sum(1)
        found |= {f"left_out_R@{k}": 100 * (ranks <= k).double().mean().item() for k in (1, 10)}
    return {name: value for name, value in found.items() if name in METRICS or name.startswith("left_out")}


# ---- the experiment ---------------------------------------------------------------------------------------------


def add_variants(model, data, validation, config):
    """(S, V) indices of variants of each seed's captions, which are appended to the captions of `data`."""
    tables, images, variants = [], [], []
    for pairs, own in zip(data.pairs, data.real_images.tolist(), strict=True):
        rows = augment_captions(pairs, TrigramProposals(pairs.captions), "same", known=validation.captions)
        if not rows:
            raise InputError("the training captions have no variants: use a larger --share, or drop the arm captions")
        tables.append(len(data.texts) + len(variants) + torch.arange(len(rows)))
        images += [own[image] for image, _, _ in rows]
        variants += [variant for _, _, variant in rows]
    device, amp_dtype = setup_device(config.device, config.precision)
    features = cached_features(
        model, SimpleNamespace(captions=variants), "text", amp_dtype, config, "encoding variants"
    )
    data.texts = torch.cat([data.texts, features])
    data.image_index = torch.cat([data.image_index, torch.tensor(images, device=device)])
    data.text_ids = torch.cat([data.text_ids, torch.from_numpy(text_ids(variants)).to(device)])
    longest = torch.arange(max(map(len, tables)))
    return torch.stack([table[longest % len(table)] for table in tables]).to(device)


def image_gan_features(model, pairs, options, config, data):
    """(T, F_i) features of one generated image per caption, and (N, F_i) of the real images at its resolution.

    All seeds generate for the same captions, as the GAN has seen the same images; those of other captions stay zero.
    """
    path = Path(options.folder) / "images.pt"
    if path.exists():
        return torch.load(path, map_location="cpu")
    run = gan.gan_run_folder(options.gan_run)
    conditioning = gan.load_model(gan.conditioning_run(run), model.device)
    generator, random = gan.load_generator(run / "gan", model.device), torch.Generator().manual_seed(0)
    embeddings = embed_captions(conditioning, pairs.captions, desc="embedding captions")
    size = generator.architecture["size"]
    encode, count = fast_image_encoder(model, len(embeddings)), image_batch_size(model.device, 256)
    generated = torch.zeros(len(embeddings), data.images.shape[1])
    with torch.no_grad():
        for part in progress_bar(data.pool_captions[0].split(count), desc="generated images", unit="batch"):
            generated[part.cpu()] = encode(gan.generate(generator, embeddings[part], random, config.size)).cpu()
        images = EvaluationImages(pairs.images, range(len(pairs.files)), config.size)

        def blur(batch):
            small = F.interpolate(batch.float(), size=(size, size), mode="area")
            return encode(F.interpolate(small, size=(config.size,) * 2, mode="bilinear").round().to(torch.uint8))

        blurred = encode_dataset(blur, images, model.device, batch_size=count, desc="blurred images")
    torch.save((generated, blurred), path)
    return generated, blurred


@torch.no_grad()
def image_quality(options, config, model, train, validation):
    """Table rows about generated images, evaluated with features of the frozen encoder and the heads of another run.

    The generated images of the captions that are used, and the real images of those captions at the resolution of the
    GAN and as they are: the rank of the own caption among 100, the kernel distance to validation images, and how often
    an image is closer to its nearest training image than a validation image is to its own (50%: as close).
    """
    data, evaluator = choose_data(train, options, [options.first_seed], model.device), gan.load_model(options.evaluator)
    evaluator, rng = evaluator.to(model.device), np.random.default_rng(0)
    generated, blurred = (x.to(model.device) for x in image_gan_features(model, train, options, config, data))
    captions = data.pool_captions[0, :: max(1, data.pool_captions.shape[1] // 1000)]
    texts, images = evaluator.project_text(data.texts[captions]), data.image_index[captions]
    others = validation.image_features.to(model.device)
    training = F.normalize(data.images[data.real_images[0]], dim=1)
    usual = nearest_distance(F.normalize(others, dim=1), training)
    rows = []
    for name, features in (
        ("generated", generated[captions]),
        ("real, at the GAN's resolution", blurred[images]),
        ("real", data.images[images]),
        ("validation images, one half and the other", others[::2]),
    ):
        row = {"images": name}
        if name in ("generated", "real", "real, at the GAN's resolution"):
            ranks = caption_ranks(evaluator.project_image(features), texts, rng)
            row |= {"first of 100": f"{100 * (ranks == 1).mean():.1f}", "top 10": f"{100 * (ranks <= 10).mean():.1f}"}
            distances = nearest_distance(F.normalize(features, dim=1), training)
            row["closer to training images"] = f"{100 * (distances[:, None] < usual).mean():.1f}"
        reference = others[1::2] if name.startswith("validation") else others
        mean, deviation = kernel_distance(features.cpu().numpy(), reference.cpu().numpy(), rng)
        rows.append({**row, "kernel distance x 1000": f"{mean:.1f} ± {deviation:.1f}"})
    return [{**dict.fromkeys(rows[0], ""), **row} for row in rows]


def run_seeds(model, train, validation, options, config, seeds):
    """{seed: {arm: metrics}} of seeds that are trained at once, kept in the folder."""
    paths = {seed: Path(options.folder) / f"{seed}.json" for seed in seeds}
    results = {seed: read_json(path) if path.exists() else {} for seed, path in paths.items()}
    missing = [arm for arm in options.arms if any(arm not in found for found in results.values())]
    if not missing:
        return results
    data, made = choose_data(train, options, seeds, model.device), SimpleNamespace()

    def note(arm, models, number):
        for i, seed in enumerate(seeds):
            results[seed][arm] = evaluate(models, i, number, data, validation)
            print(seed, arm, {name: round(value, 1) for name, value in results[seed][arm].items()}, flush=True)

    if {"gan", "shuffled"} & set(missing):
        made.generator = train_feature_gan(data, seeds)
    if {"regression", "noise"} & set(missing):
        made.regression = train_regression(data, seeds)
    if "captions" in missing:
        made.variants = add_variants(model, data, validation, config)
    if options.gan_run:
        made.generated, made.blurred = image_gan_features(model, train, options, config, data)
        made.generated, made.blurred = made.generated.to(model.device), made.blurred.to(model.device)
    added = [arm for arm in missing if arm not in ("real", "two_models")]
    alone = [arm for arm in missing if arm not in added]
    models = [train_heads(model, data, None, 1, config, seeds)] if alone else []
    if "two_models" in alone:
        models.append(train_heads(model, data, None, 1, config, [seed + SECOND_MODEL for seed in seeds]))
    for arm in alone:
        note(arm, models[: 1 + (arm == "two_models")], 0)
    if added:
        draw = Arms(added, data, made, options.ratio, seeds)
        heads = train_heads(model, data, draw, len(added), config, seeds, options.weight)
        for j, arm in enumerate(added):
            note(arm, [heads], j)
    for seed in seeds:
        write_json(paths[seed], results[seed])
    return results


def compare(results, arms):
    """Table rows: mean per arm and paired difference from "real" with its 95% interval (t)."""
    rows = []
    for arm in arms:
        row = {"arm": arm}
        for name in next(iter(results.values()))["real"]:
            values = np.array([run[arm][name] for run in results.values()])
            difference = values - [run["real"][name] for run in results.values()]
            row[name] = f"{values.mean():.1f}"
            if arm != "real" and len(values) > 1:
                half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(difference)
                row[name] += f" ({difference.mean():+.2f} ± {half:.2f}{' *' if abs(difference.mean()) > half else ''})"
        rows.append(row)
    return rows


def against_controls(results, arms):
    """Paired differences between the claimed arms and the controls, a row each, with 95% intervals.

    p: of the paired t-test, corrected for the rows of the same metric (Holm 1979).
    """
    rows = []
    for metric in ("text_to_image_R@10", "rsum", "left_out_R@10"):
        found = []
        for arm, control in ((arm, control) for arm, controls in CLAIMS.items() for control in controls):
            if {arm, control} <= set(arms) and metric in next(iter(results.values()))["real"]:
                difference = np.array([run[arm][metric] - run[control][metric] for run in results.values()])
                half = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)
                row = {"metric": metric, "arm": arm, "control": control}
                row["difference"] = f"{difference.mean():+.2f} ± {half:.2f}"
                found.append((stats.ttest_1samp(difference, 0).pvalue, row))
        found.sort(key=lambda each: each[0])
        corrected = holm([p for p, _ in found])
        rows += [{**row, "p": f"{p:.2g}"} for p, (_, row) in zip(corrected, found, strict=True)]
    return rows


def parse_options(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--share", type=float, default=1.0, help="share of the training images")
    parser.add_argument("--held_out", action="store_true", help="leave out images of combinations")
    parser.add_argument("--write_split", help="only write the names of the images not left out to this file")
    parser.add_argument("--gan_run", default="", help="run with an image GAN, for the arms of images; gives the images")
    parser.add_argument(
        "--evaluator", default="", help="frozen run of another seed that evaluates the images of --gan_run"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all that apply")
    parser.add_argument("--first_seed", type=int, default=101)
    parser.add_argument("--seeds", type=int, default=20, help="number of seeds")
    parser.add_argument("--ratio", type=float, default=2.0, help="added pairs per real image")
    parser.add_argument("--weight", type=float, default=1.0, help="loss weight of an added pair; real images: 1")
    parser.add_argument("--at_once", type=int, default=1, help="seeds trained at once, which suits a large GPU")
    parser.add_argument("--folder", help="finished seeds; default: runs/gan_features-...")
    options, flags = parser.parse_known_args(argv)
    options.name = "gan_features-" + ("held-out" if options.held_out else f"share-{options.share:g}")
    options.name += "-images" * bool(options.gan_run)
    options.folder = options.folder or str(ROOT / "runs" / "-".join([options.name, *Path(options.gan_run).parts[-1:]]))
    unused = set() if options.gan_run else {"images", "shuffled_images", "blurred"}
    unused |= {"left_out"} if options.share == 1 and not options.held_out else set()
    options.arms = options.arms or [arm for arm in ARMS if arm not in {*unused, "two_models"}]
    if unused & set(options.arms):
        raise InputError(f"arms {', '.join(sorted(unused & set(options.arms)))} need --gan_run, or images left out")
    return options, flags


def main(argv=None):
    options, flags = parse_options(argv)
    given, _ = parse_flags(flags)
    config = build_config({**PRESETS["frozen"], "num_workers": 0, **given, "run": options.folder})
    if options.write_split:
        train = clip_training.load_data(config)["train"]
        left_out = leave_out_share(len(train.files), options.share, options.first_seed)
        if options.held_out:
            left_out, _ = leave_out_combinations(train, choose_combinations(train))
        names = [f"{name}\n" for name, out in zip(train.names, left_out, strict=True) if not out]
        Path(options.write_split).write_text("".join(names), encoding="utf-8")
        return
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    used = {name: getattr(options, name) for name in ("share", "held_out", "gan_run", "ratio", "weight")}
    if options.gan_run:  # of which images.pt has features
        generator = gan.gan_run_folder(options.gan_run) / "gan" / "generator.safetensors"
        used["generator"] = hashlib.sha256(generator.read_bytes()).hexdigest() if generator.exists() else ""
    check_folder(options.folder, config, **used)
    model, train, validation = load(config)
    results = {}
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for start in range(0, len(seeds), options.at_once):
        group = list(seeds[start : start + options.at_once])
        results |= run_seeds(model, train, validation, options, config, group)
        print_table(compare(results, options.arms), f"{len(results)} seeds")
    details = {"seeds": results, "settings": vars(options) | {"epochs": config.epochs, "batch_size": config.batch_size}}
    if options.held_out:
        details["combinations"] = [" ".join(pair) for pair in choose_combinations(train)]
    if len(results) > 1:
        print_table(rows := against_controls(results, options.arms), "claims")
        details["against_controls"] = rows
    if options.evaluator:
        details["images"] = image_quality(options, config, model, train, validation)
        print_table(details["images"], "images")
    report(options.name, compare(results, options.arms), details)


if __name__ == "__main__":
    exit_on_input_error(main)()
