"""Do generated image features make CLIP better on photographs? Frozen encoders, paired seeds, controls.

    python benchmarks/gan_features.py --share 0.1 --seeds 20 [--image_path ... and other flags of main.py]
    python benchmarks/gan_features.py --held_out --seeds 20 [--gan_run RUN] [...]

The projection heads of `--preset frozen` see nothing but features, so a generator may make features instead of images:
a small conditional GAN from (noise, caption features) to image features, in the manner of Xian et al. 2018
(arXiv:1712.00981), trained with the losses of gan.py. With `--share`, only that share of the training images is used,
another one for every seed, and features are generated for the captions of all the others (of all images for a share of
1). With `--held_out`, no training image has certain combinations such as a dog and snow; features are generated for the
captions of the images left out, and captions that name a combination are the queries. All arms of a seed start from the
same weights and see the same real batches for the same number of steps:

    real          real pairs only
    gan           also features from the feature GAN
    shuffled      the same features, each with the caption of another image
    regression    also features predicted from the captions by a network without noise (mean squared error)
    nearest       also the features of the real image with the most similar caption
    noise         also real features with Gaussian noise that has the spread of the features of a caption
    mixup         also interpolations of two real pairs, features and captions
    duplicates    also more real pairs
    images        also features of images from the image GAN of `--gan_run`, encoded by the frozen encoder
    blurred       also features of real images downsampled to the resolution of that GAN
    left_out      also the real features of the images left out: the upper bound

Results are those after the last step on the validation images; nothing is selected on them. Finished seeds are kept in
`--folder`, and a stopped benchmark continues there.
"""

import argparse
import copy
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import ROOT, build_state, print_table, report  # noqa: E402
from scipy import stats  # noqa: E402
from torch import nn  # noqa: E402

import gan  # noqa: E402
import main as clip_training  # noqa: E402
from clip import retrieval_metrics  # noqa: E402
from config import PRESETS, InputError, build_config  # noqa: E402
from dataset import Batch, derive_seed, subset_pairs  # noqa: E402
from utils.captions import text_ids  # noqa: E402
from utils.cli import StopRequest, exit_on_input_error, progress_bar  # noqa: E402
from utils.device import setup_device  # noqa: E402
from utils.embed import embed_captions, encode_dataset, fast_image_encoder, precompute_features  # noqa: E402
from utils.files import read_json, write_json  # noqa: E402
from utils.flags import parse_flags  # noqa: E402
from utils.gan_layers import CONDITION_DIM, NOISE_DIM, CaptionConditioning, leaky  # noqa: E402
from utils.image_cache import EvaluationImages, open_images  # noqa: E402

# fmt: off
ARMS = (
    "real", "gan", "shuffled", "regression", "nearest", "noise", "mixup", "duplicates", "images", "blurred", "left_out",
)
# fmt: on
METRICS = ("text_to_image_R@1", "text_to_image_R@10", "image_to_text_R@10", "rsum")
WIDTH = 512  # of the hidden layers
GAN_STEPS, GAN_BATCH, GAN_LR, R1_WEIGHT = 1500, 128, 2e-4, 0.1
# The combinations left out: the eight pairs of these words that are named together by captions of 50 to 200 training
# images, the most frequent first, no word in more than two pairs.
SUBJECTS = ("dog", "man", "woman", "boy", "girl", "child", "people")
# fmt: off
CONTEXTS = (
    "snow", "water", "beach", "grass", "street", "bike", "ball", "mountain", "pool", "car", "field", "rock", "park",
    "sand", "bench", "swing", "skateboard", "ramp", "hill", "wall", "fence", "building", "stick", "frisbee", "tree",
)
# fmt: on
PLURALS = {"man": "men", "woman": "women", "child": "children"}


# ---- data -------------------------------------------------------------------------------------------------------


def load(config):
    """The CLIP, and the training and validation pairs with features."""
    splits = clip_training.load_data(config)
    device, amp_dtype = setup_device(config.device, config.precision)
    model = clip_training.build_model(config, splits["train"].captions, device)
    open_images(splits, config)
    precompute_features(model, splits, amp_dtype, config)
    return model, splits["train"], splits["validation"]


def subset(pairs, images):
    """The pairs of these images (indices), with features; also the indices of their captions."""
    found, captions = subset_pairs(pairs, images), [j for i in images for j in pairs.captions_of(i)]
    found.image_features, found.text_features = pairs.image_features[images], pairs.text_features[captions]
    return found, captions


def on_device(pairs, device):
    """The pairs with their features on the device."""
    features = {name: getattr(pairs, name).to(device) for name in ("image_features", "text_features")}
    return replace(pairs, **features)


def naming(pairs, word):
    """(T,) booleans: the captions that name a word, in the singular or plural."""
    forms = re.compile(rf"\b({word}|{word}e?s|{PLURALS.get(word, word)})\b", re.IGNORECASE)
    return np.array([bool(forms.search(caption)) for caption in pairs.captions])


def images_naming(pairs, captions):
    """(N,) booleans: the images with one of these captions (T,)."""
    return np.bincount(pairs.image_index[captions], minlength=len(pairs.files)) > 0


def choose_combinations(pairs):
    """The combinations to leave out, chosen from the training captions alone: a list of (subject, context)."""
    named = {word: naming(pairs, word) for word in (*SUBJECTS, *CONTEXTS)}
    counts = {(a, b): images_naming(pairs, named[a] & named[b]).sum() for a in SUBJECTS for b in CONTEXTS}
    uses, chosen = Counter(), []
    for a, b in sorted((pair for pair in counts if 50 <= counts[pair] <= 200), key=lambda pair: -counts[pair]):
        if uses[a] < 2 and uses[b] < 2 and len(chosen) < 8:
            chosen.append((a, b))
            uses.update((a, b))
    return chosen


def leave_out_combinations(pairs, combinations):
    """(N,) images that show a combination according to all their captions; (T,) captions that name one themselves."""
    images, captions = np.zeros(len(pairs.files), bool), np.zeros(len(pairs.captions), bool)
    for a, b in combinations:
        first, second = naming(pairs, a), naming(pairs, b)
        images |= images_naming(pairs, first) & images_naming(pairs, second)
        captions |= first & second
    return images, captions


# ---- networks ---------------------------------------------------------------------------------------------------


class FeatureGenerator(nn.Module):
    """(B, NOISE_DIM) and caption features (B, F_t) -> standardised image features (B, F_i); without noise if 0."""

    def __init__(self, dim, width, noise_dim=NOISE_DIM):
        super().__init__()
        self.caption = CaptionConditioning(dim)
        sizes = (noise_dim + CONDITION_DIM, WIDTH, WIDTH)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.out = nn.Linear(WIDTH, width)

    def forward(self, noise, captions):
        h = self.caption(captions)
        h = h if noise is None else torch.cat([noise, h], 1)
        for layer in self.hidden:
            h = leaky(layer(h))
        return self.out(h)


class FeatureDiscriminator(gan.Discriminator):
    """The projection discriminator of gan.py for image features (B, F_i)."""

    def __init__(self, dim, width):
        nn.Module.__init__(self)
        self.caption = CaptionConditioning(dim)
        self.first, self.flatten = nn.Linear(width, WIDTH), nn.Linear(WIDTH, 2 * CONDITION_DIM)
        self.realness = nn.Linear(2 * CONDITION_DIM, 1)
        self.projection = nn.Linear(2 * CONDITION_DIM, CONDITION_DIM)

    def features(self, x):
        return leaky(self.flatten(leaky(self.first(x))))


class Standardised:
    """Image features to zero mean and unit variance and back; features after a ReLU stay positive."""

    def __init__(self, features):
        self.mean, self.std, self.positive = features.mean(0), features.std(0).clamp(min=1e-4), features.min() >= 0

    def __call__(self, features):
        return (features - self.mean) / self.std

    def inverse(self, x):
        features = x * self.std + self.mean
        return features.clamp(min=0) if self.positive else features


def draw_pairs(pairs, count, random):
    """Random image indices and one of their captions each."""
    captions = torch.randint(len(pairs.captions), (count,), generator=random)
    return torch.from_numpy(pairs.image_index)[captions], captions


def train_regression(pairs, standard, seed):
    """A network that predicts standardised image features from a caption; AdamW, mean squared error."""
    torch.manual_seed(seed)
    network = FeatureGenerator(pairs.text_features.shape[1], pairs.image_features.shape[1], noise_dim=0)
    network.caption.fit(pairs.text_features)
    network.to(pairs.text_features.device)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, GAN_STEPS // 4)
    random, x = torch.Generator().manual_seed(seed), standard(pairs.image_features)
    for _ in range(GAN_STEPS // 4):
        images, captions = draw_pairs(pairs, GAN_BATCH, random)
        prediction = network(None, pairs.text_features[captions])
        F.mse_loss(prediction, x[images]).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return network.eval()


def train_feature_gan(pairs, standard, seed):
    """The EMA of a generator, trained with the losses of gan.py: hard negatives, lazy R1, interpolated captions."""
    torch.manual_seed(seed)
    sizes = pairs.text_features.shape[1], pairs.image_features.shape[1]
    generator, discriminator = FeatureGenerator(*sizes), FeatureDiscriminator(*sizes)
    for network in (generator, discriminator):
        network.caption.fit(pairs.text_features)
        network.to(pairs.text_features.device)
    ema = copy.deepcopy(generator).requires_grad_(False)
    optimizers = [
        torch.optim.Adam(network.parameters(), lr, betas=gan.ADAM_BETAS, fused=True)
        for network, lr in ((generator, GAN_LR), (discriminator, 2 * GAN_LR))
    ]
    random, x = torch.Generator().manual_seed(seed), standard(pairs.image_features)
    for step in range(GAN_STEPS):
        images, captions = draw_pairs(pairs, GAN_BATCH, random)
        texts, real = pairs.text_features[captions], x[images].requires_grad_()
        mismatched = pairs.text_features[draw_pairs(pairs, 8 * GAN_BATCH, random)[1]].view(GAN_BATCH, 8, -1)
        noise = torch.randn(GAN_BATCH, NOISE_DIM, generator=random).to(x.device)

        features, fake = discriminator.features(real), generator(noise, texts)
        scores = discriminator.score(features, texts)
        negatives = discriminator.score(features[:, None], mismatched)
        loss = gan.discriminator_loss(scores, discriminator(fake.detach(), texts), negatives)
        if step % gan.R1_INTERVAL == 0:
            (gradient,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
            loss = loss + gan.R1_INTERVAL * R1_WEIGHT / 2 * gradient.square().sum(1).mean()
        loss.backward()
        optimizers[1].step()
        gan.generator_loss(discriminator(fake, texts)).backward()
        optimizers[0].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        for averaged, new in zip(ema.parameters(), generator.parameters(), strict=True):
            averaged.lerp_(new.detach(), 1 - min(0.999, (1 + step) / (10 + step)))
    return ema.eval()


# ---- arms -------------------------------------------------------------------------------------------------------


class ExtraPairs:
    """Adds pairs to each batch of `main.train_one_epoch`.

    `draw(count, random)` gives image features, text features, image ids and text ids.
    """

    def __init__(self, draw, settings):
        self.draw, self.settings = draw, settings

    def sample(self, num_images, step, progress, rank=0):
        count = round(self.settings.ratio * num_images)
        if not self.settings.start <= progress < self.settings.end:
            return []
        random = torch.Generator().manual_seed(derive_seed(self.settings.seed, step, 1))
        images, texts, image_ids, text_ids = self.draw(count, random)
        index, weights = torch.arange(count), torch.full((count,), self.settings.weight)
        features = {"image_features": images, "text_features": texts}
        batch = Batch(index, image_ids, **features, weights=weights, text_ids=text_ids)
        return [batch.to(images.device)]

    def train_step(self, *_):
        pass


@torch.no_grad()
def build_arm(arm, data, settings):
    """The function `draw` of an arm, None for "real"."""
    real, left_out, standard = data.real, data.left_out, data.standard
    own, pool = torch.from_numpy(real.image_index), torch.from_numpy(left_out.image_index)
    pool_ids = -1 - pool  # the images left out are not in the batches
    own_texts, pool_texts = (torch.from_numpy(text_ids(pairs.captions)) for pairs in (real, left_out))

    def from_real(change):
        def draw(count, random):
            images, captions = draw_pairs(real, count, random)
            changed = change(real.image_features[images], real.text_features[captions], random)
            return *changed, images, own_texts[captions]

        return draw

    def from_pool(make):
        def draw(count, random):
            captions = torch.randint(len(pool), (count,), generator=random)
            features = make(captions, random)
            if arm == "shuffled":
                captions = torch.randint(len(pool), (count,), generator=random)
            return features, left_out.text_features[captions], pool_ids[captions], pool_texts[captions]

        return draw

    def generate(captions, random):
        noise = torch.randn(len(captions), NOISE_DIM, generator=random).to(standard.mean.device)
        return standard.inverse(data.generator(noise, left_out.text_features[captions])).detach()

    def mixup(images, texts, random):
        weight = torch.rand(len(images), 1, generator=random).to(images.device)
        other = torch.randperm(len(images), generator=random)
        return torch.lerp(images, images[other], weight), torch.lerp(texts, texts[other], weight)

    if arm in ("gan", "shuffled"):
        return from_pool(generate)
    if arm == "regression":
        predicted = standard.inverse(data.regression(None, left_out.text_features))
        return from_pool(lambda captions, _: predicted[captions])
    if arm == "nearest":
        texts, queries = F.normalize(real.text_features, dim=1), F.normalize(left_out.text_features, dim=1)
        nearest = torch.cat([(part @ texts.T).argmax(1) for part in queries.split(4096)])
        return from_pool(lambda captions, _: real.image_features[own[nearest[captions]]])
    if arm == "left_out":
        return from_pool(lambda captions, _: left_out.image_features[pool[captions]])
    if arm == "images":
        return from_pool(lambda captions, _: data.generated[captions])
    if arm == "blurred":
        return from_real_blurred(real, data.blurred, own_texts)
    if arm == "noise":
        residual = standard(real.image_features)[own] - data.regression(None, real.text_features)
        spread = residual.std(0) * standard.std
        return from_real(lambda x, t, random: (x + spread * torch.randn(x.shape, generator=random).to(x.device), t))
    if arm == "mixup":
        draw = from_real(mixup)
        return lambda count, random: (*draw(count, random)[:2], *[-1 - torch.arange(count)] * 2)
    return from_real(lambda x, t, _: (x, t)) if arm == "duplicates" else None


def from_real_blurred(real, blurred, own_texts):
    def draw(count, random):
        images, captions = draw_pairs(real, count, random)
        return blurred[images], real.text_features[captions], images, own_texts[captions]

    return draw


def train_heads(model, pairs, draw, config, settings):
    """A CLIP with new heads after `config.epochs` epochs."""
    model, stop = copy.deepcopy(model), StopRequest()
    torch.manual_seed(config.seed)
    for head in (model.image_projection, model.text_projection):
        head.layers[-1].reset_parameters()
    sampler, loader = clip_training.build_loader(model, pairs, config)
    state = build_state(model, config, None, pairs, config.epochs * sampler.num_batches)
    state.augmentation = ExtraPairs(draw, settings) if draw else None
    for state.epoch in range(config.epochs):
        clip_training.train_one_epoch(state, sampler, loader, config, None, stop)
        state.batch = 0
    return model.eval()


@torch.no_grad()
def evaluate(model, data):
    """Recalls on the validation images; with combinations left out, those of the captions that name one."""
    pairs = data.validation
    images, texts = model.project_image(pairs.image_features), model.project_text(pairs.text_features)
    found = retrieval_metrics(images, texts, pairs.image_index)
    if data.queries is not None:
        gallery = torch.cat([model.project_image(data.left_out.image_features), images])
        scores = model.project_text(data.left_out.text_features[data.queries]) @ gallery.T
        own = torch.from_numpy(data.left_out.image_index[data.queries]).to(scores.device)
        ranks = (scores >= scores.gather(1, own[:, None])).sum(1)
        found |= {f"left_out_R@{k}": 100 * (ranks <= k).double().mean().item() for k in (1, 10)}
    return {name: value for name, value in found.items() if name in METRICS or name.startswith("left_out")}


# ---- the experiment ---------------------------------------------------------------------------------------------


def prepare(model, train, validation, options, config, seed):
    """The pairs of a seed and the networks trained on its images."""
    count, data = len(train.files), SimpleNamespace(validation=validation, queries=None)
    if options.held_out:
        left_out, named = leave_out_combinations(train, choose_combinations(train))
    else:
        left_out, named = np.ones(count, bool), None
        left_out[np.random.default_rng([seed, 7]).permutation(count)[: round(options.share * count)]] = False
    data.real, _ = subset(train, np.flatnonzero(~left_out).tolist() if left_out.any() else list(range(count)))
    data.left_out, captions = subset(train, np.flatnonzero(left_out).tolist() if left_out.any() else list(range(count)))
    if named is not None:
        data.queries = np.flatnonzero(named[captions])
    data.train = data.real  # in main memory, as the data loader expects
    data.real, data.left_out = (on_device(pairs, model.device) for pairs in (data.real, data.left_out))
    data.standard = Standardised(data.real.image_features)
    if {"gan", "shuffled"} & set(options.arms):
        data.generator = train_feature_gan(data.real, data.standard, seed)
    if {"regression", "noise"} & set(options.arms):
        data.regression = train_regression(data.real, data.standard, seed)
    if options.gan_run:
        data.generated, data.blurred = image_gan_features(model, train, options, config)
        data.generated = data.generated[captions].to(model.device)
        data.blurred = data.blurred[np.flatnonzero(~left_out)].to(model.device)
    return data


def image_gan_features(model, pairs, options, config):
    """(T, F_i) features of one generated image per caption, and (N, F_i) of the real images at its resolution."""
    path = Path(options.folder) / "images.pt"
    if path.exists():
        return torch.load(path, map_location="cpu")
    run = gan.gan_run_folder(options.gan_run)
    conditioning = gan.load_model(gan.conditioning_run(run), model.device)
    generator, random = gan.load_generator(run / "gan", model.device), torch.Generator().manual_seed(0)
    embeddings = embed_captions(conditioning, pairs.captions, desc="embedding captions")
    size = generator.architecture["size"]
    encode = fast_image_encoder(model, len(embeddings))
    with torch.no_grad():
        generated = torch.cat([
            encode(gan.generate(generator, part, random, config.size))
            for part in progress_bar(embeddings.split(16), desc="generated images", unit="batch")
        ])  # fmt: skip
        images = EvaluationImages(pairs.images, range(len(pairs.files)), config.size)

        def blur(batch):
            small = F.interpolate(batch.float(), size=(size, size), mode="area")
            return encode(F.interpolate(small, size=(config.size,) * 2, mode="bilinear").round().to(torch.uint8))

        blurred = encode_dataset(blur, images, model.device, batch_size=16, desc="blurred images")
    torch.save((generated, blurred), path)
    return generated, blurred


def run_seed(model, train, validation, options, config, seed):
    """{arm: metrics} of a seed, kept in the folder."""
    path = Path(options.folder) / f"{seed}.json"
    results = read_json(path) if path.exists() else {}
    missing = [arm for arm in options.arms if arm not in results]
    if not missing:
        return results
    data = prepare(model, train, validation, options, config, seed)
    settings = SimpleNamespace(
        **{name: getattr(options, name) for name in ("ratio", "weight", "start", "end")}, seed=seed
    )
    for arm in missing:
        heads = train_heads(model, data.train, build_arm(arm, data, settings), replace(config, seed=seed), settings)
        results[arm] = evaluate(heads, data)
        write_json(path, results)
        print(seed, arm, {name: round(value, 1) for name, value in results[arm].items()}, flush=True)
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


def parse_options(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--share", type=float, default=1.0, help="share of the training images")
    parser.add_argument("--held_out", action="store_true", help="leave out images of combinations")
    parser.add_argument("--gan_run", default="", help="run with an image GAN, for the arms images and blurred")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all that apply")
    parser.add_argument("--first_seed", type=int, default=101)
    parser.add_argument("--seeds", type=int, default=20, help="number of seeds")
    parser.add_argument("--ratio", type=float, default=2.0, help="added pairs per real image")
    parser.add_argument("--weight", type=float, default=1.0, help="loss weight of an added pair; real images: 1")
    parser.add_argument("--start", type=float, default=0.0, help="fraction of training after which pairs are added")
    parser.add_argument("--end", type=float, default=1.0, help="fraction of training after which they are not")
    parser.add_argument("--folder", help="finished seeds; default: runs/gan_features-...")
    options, flags = parser.parse_known_args(argv)
    options.name = "gan_features-" + ("held-out" if options.held_out else f"share-{options.share:g}")
    options.folder = options.folder or str(ROOT / "runs" / options.name)
    unused = set() if options.gan_run else {"images", "blurred"}
    unused |= {"left_out"} if options.share == 1 and not options.held_out else set()
    options.arms = options.arms or [arm for arm in ARMS if arm not in unused]
    if unused & set(options.arms):
        raise InputError(f"arms {', '.join(sorted(unused & set(options.arms)))} need --gan_run, or images left out")
    return options, flags


def main(argv=None):
    options, flags = parse_options(argv)
    given, _ = parse_flags(flags)
    config = build_config({**PRESETS["frozen"], "num_workers": 0, **given, "run": options.folder})
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    model, train, validation = load(config)
    results = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        results[seed] = run_seed(model, train, validation, options, config, seed)
        if seed % 5 == 0:
            print_table(compare(results, options.arms), f"{len(results)} seeds")
    details = {"seeds": results, "settings": vars(options) | {"epochs": config.epochs, "batch_size": config.batch_size}}
    if options.held_out:
        details["combinations"] = [" ".join(pair) for pair in choose_combinations(train)]
    report(options.name, compare(results, options.arms), details)


if __name__ == "__main__":
    exit_on_input_error(main)()
