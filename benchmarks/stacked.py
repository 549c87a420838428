"""Many small trainings at once: the parameters of all runs are stacked, so that a GPU is busy with tiny models.

`train_heads` trains the projection heads of `--preset frozen`, as `main.train_one_epoch` does one run at a time
(tests/benchmarks/test_stacked.py compares the two); `train_regression` and `train_feature_gan` train the networks that
make features.

Shapes: S seeds, A arms of each, R = S A runs; B real and E added images, N = B + E; T captions; F features, D shared.
"""

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.func import functional_call, stack_module_state, vmap  # noqa: E402

import gan  # noqa: E402
import main as clip_training  # noqa: E402
from clip import MAX_LOGIT_SCALE  # noqa: E402
from dataset import PairSampler, derive_seed  # noqa: E402
from utils.cli import progress_bar  # noqa: E402
from utils.gan_layers import CONDITION_DIM, NOISE_DIM, CaptionConditioning, leaky  # noqa: E402

WIDTH = 512  # of the hidden layers
GAN_STEPS, GAN_BATCH, GAN_LR, R1_WEIGHT = 1500, 128, 2e-4, 0.1
NUM_MISMATCHED = 8


# ---- networks that make features --------------------------------------------------------------------------------


class FeatureGenerator(nn.Module):
    """(B, NOISE_DIM) and caption features (B, F_t) -> standardised image features (B, F_i); without noise if 0."""

    def __init__(self, dim, width, noise_dim=NOISE_DIM):
        super().__init__()
        self.caption = CaptionConditioning(dim)
        sizes = (noise_dim + CONDITION_DIM, WIDTH, WIDTH)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.out = nn.Linear(WIDTH, width)

    def forward(self, captions, noise=None):
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

    def forward(self, x, captions, mismatched=None):
        """Logits (B,) of features (B, F_i) and captions (B, F_t); also (B, K) of mismatched captions (B, K, F_t)."""
        features = self.features(x)
        score = self.score(features, captions)
        return score if mismatched is None else (score, self.score(features[:, None], mismatched))


class Stacked:
    """One network per seed, with stacked parameters; called with inputs (S, B, .)."""

    def __init__(self, build, conditions, seeds, device):
        networks = []
        for seed, captions in zip(seeds, conditions, strict=True):
            torch.manual_seed(seed)
            networks.append(build())
            networks[-1].caption.fit(captions)
        parameters, buffers = stack_module_state([network.to(device) for network in networks])
        self.parameters = {name: x.detach().requires_grad_() for name, x in parameters.items()}
        self.buffers = buffers
        skeleton = copy.deepcopy(networks[0]).to("meta")

        def call(parameters, buffers, *inputs):
            return functional_call(skeleton, (parameters, buffers), inputs)

        def call_one(parameters, buffers, *inputs):  # without the overhead of vmap, which is large on a CPU
            first = [{name: x.squeeze(0) for name, x in each.items()} for each in (parameters, buffers)]
            found = call(*first, *(x.squeeze(0) for x in inputs))
            return tuple(x[None] for x in found) if isinstance(found, tuple) else found[None]

        self.function = vmap(call) if len(seeds) > 1 else call_one

    def __call__(self, *inputs):
        return self.function(self.parameters, self.buffers, *inputs)


class Standardised:
    """Image features of each seed to zero mean and unit variance and back; features after a ReLU stay positive."""

    def __init__(self, features):
        """features: a list of (n, F), one per seed."""
        self.mean = torch.stack([x.mean(0) for x in features])[:, None]
        self.std = torch.stack([x.std(0).clamp(min=1e-4) for x in features])[:, None]
        self.positive = all(bool(x.min() >= 0) for x in features)

    def __call__(self, features):
        return (features - self.mean) / self.std

    def inverse(self, x):
        features = x * self.std + self.mean
        return features.clamp(min=0) if self.positive else features


class Draws:
    """Random numbers of a step, the same for all arms of the seeds."""

    def __init__(self, device, *key):
        self.random = torch.Generator(device).manual_seed(derive_seed(*key))
        self.device = device

    def choose(self, table, count):
        """(S, count) random entries of each row of (S, n)."""
        chosen = torch.randint(table.shape[1], (len(table), count), generator=self.random, device=self.device)
        return table.gather(1, chosen)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.random, device=self.device)

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.random, device=self.device)


def train_regression(data, seeds):
    """Networks that predict standardised image features from a caption; AdamW, mean squared error."""
    device, sizes = data.texts.device, (data.texts.shape[1], data.images.shape[1])
    conditions = [data.texts[captions] for captions in data.real_captions]
    network = Stacked(lambda: FeatureGenerator(*sizes, noise_dim=0), conditions, seeds, device)
    steps = GAN_STEPS // 4
    optimizer = torch.optim.AdamW(network.parameters.values(), 1e-3, weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        captions = Draws(device, seeds[0], step, 2).choose(data.real_captions, GAN_BATCH)
        target = data.standard(data.images[data.image_index[captions]])
        (len(seeds) * F.mse_loss(network(data.texts[captions]), target)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return torch.no_grad()(network)


def train_feature_gan(data, seeds):
    """The EMA of the generators, trained with the losses of gan.py: mismatched captions, lazy R1."""
    device, sizes = data.texts.device, (data.texts.shape[1], data.images.shape[1])
    conditions = [data.texts[captions] for captions in data.real_captions]
    generator = Stacked(lambda: FeatureGenerator(*sizes), conditions, seeds, device)
    discriminator = Stacked(lambda: FeatureDiscriminator(*sizes), conditions, seeds, device)
    ema = {name: x.detach().clone() for name, x in generator.parameters.items()}
    optimizers = [
        torch.optim.Adam(network.parameters.values(), lr, betas=gan.ADAM_BETAS, fused=True)
        for network, lr in ((generator, GAN_LR), (discriminator, 2 * GAN_LR))
    ]
    for step in progress_bar(range(GAN_STEPS), desc="feature GAN", unit="step", leave=False):
        draws = Draws(device, seeds[0], step, 3)
        captions = draws.choose(data.real_captions, GAN_BATCH)
        real = data.standard(data.images[data.image_index[captions]]).requires_grad_()
        texts, mismatched = data.texts[captions], draws.choose(data.real_captions, NUM_MISMATCHED * GAN_BATCH)
        mismatched = data.texts[mismatched.view(len(seeds), GAN_BATCH, NUM_MISMATCHED)]
        fake = generator(texts, draws.normal(len(seeds), GAN_BATCH, NOISE_DIM))

        scores, negatives = discriminator(real, texts, mismatched)
        loss = gan.discriminator_loss(scores, discriminator(fake.detach(), texts), negatives)
        if step % gan.R1_INTERVAL == 0:
            (gradient,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
            loss = loss + gan.R1_INTERVAL * R1_WEIGHT / 2 * gradient.square().sum(-1).mean()
        (len(seeds) * loss).backward()  # the sum over the seeds: each has the gradient of its own mean
        optimizers[1].step()
        (len(seeds) * gan.generator_loss(discriminator(fake, texts))).backward()
        optimizers[0].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        weight = 1 - min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [x.detach() for x in generator.parameters.values()], weight)
    generator.parameters = ema
    return torch.no_grad()(generator)


# ---- projection heads -------------------------------------------------------------------------------------------


class Heads:
    """The projection heads and temperatures of (S, A) runs; all arms of a seed start from the same weights."""

    def __init__(self, model, seeds, num_arms):
        self.parameters = {}
        for name in ("image", "text"):
            layer, weights = copy.deepcopy(getattr(model, f"{name}_projection").layers[-1]).cpu(), []
            for seed in seeds:
                torch.manual_seed(derive_seed(seed, name == "text"))
                layer.reset_parameters()
                weights.append({key: x.detach().clone() for key, x in layer.named_parameters()})
            for key in weights[0]:
                stack = torch.stack([each[key] for each in weights])[:, None]
                self.parameters[name, key] = stack.expand(-1, num_arms, *stack.shape[2:])
        self.parameters["t", ""] = model.logit_scale.detach().expand(len(seeds), num_arms)
        device = model.logit_scale.device
        self.parameters = {key: x.to(device).clone().requires_grad_() for key, x in self.parameters.items()}

    def __call__(self, name, features):
        """(S, A, n, F) features, or (S, 1, n, F) of all arms -> (S, A, n, D) unit vectors."""
        x = features @ self.parameters[name, "weight"].mT
        if (bias := self.parameters.get((name, "bias"))) is not None:
            x = x + bias[:, :, None]
        return F.normalize(x, dim=-1)

    def optimizer(self, config):
        """AdamW as `main.build_optimizer` makes it: weight decay for matrices only."""
        matrices = [x for (_, key), x in self.parameters.items() if key == "weight"]
        others = [x for (_, key), x in self.parameters.items() if key != "weight"]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=config.head_lr, fused=True)

    @torch.no_grad()
    def clip_gradients(self, max_norm):
        """As `clip_grad_norm_`, for each run."""
        gradients = [x.grad for x in self.parameters.values()]
        norm = sum(x.square().flatten(2).sum(2) if x.ndim > 2 else x.square() for x in gradients).sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        for x in gradients:
            x *= scale.view(*scale.shape, *[1] * (x.ndim - 2))


def contrastive_losses(images, texts, t, image_index, image_ids, weights, text_ids):
    """`clip.contrastive_loss` of R runs, (R,).

    Args:
        images, texts: (R, N, D) and (R, T, D). t: (R,). image_index: (T,), the same for all runs, ascending.
        image_ids: (R, N). weights: (N,). text_ids: (R, T).
    """
    num_images, images = images.shape[1], t.exp()[:, None, None] * images
    counts = image_index.bincount(minlength=num_images)
    masked = image_ids[:, :, None] == image_ids[:, None, image_index]  # (R, N, T)
    first = counts.cumsum(0) - counts
    for k in range(int(counts.max())):  # captions equal to the image's k-th caption
        (rows,) = (counts > k).nonzero(as_tuple=True)
        masked[:, rows] |= text_ids[:, first[rows] + k, None] == text_ids[:, None]
    own_logits = (images[:, image_index] * texts).sum(2)  # (R, T)
    negatives = (images @ texts.mT).masked_fill_(masked, -math.inf)
    text_loss = F.softplus(negatives.logsumexp(1) - own_logits)
    image_loss = F.softplus(negatives.logsumexp(2)[:, image_index] - own_logits)
    image_weights, text_weights = (weights / counts)[image_index], weights[image_index]
    image_loss = (image_weights * image_loss).sum(1) / weights.sum()
    return (image_loss + (text_weights * text_loss).sum(1) / text_weights.sum()) / 2


def real_batches(pairs, config, seeds):
    """Yield the images (S, B) and captions (S, T) of each step, from the samplers of the seeds' `Pairs`.

    All images need the same number of captions, which are all shown with their image.
    """
    samplers = [PairSampler(each, replace(config, seed=seed)) for each, seed in zip(pairs, seeds, strict=True)]
    for epoch in range(config.epochs):
        for sampler in samplers:
            sampler.epoch = epoch
        for batches in zip(*(sampler.batches() for sampler in samplers), strict=True):
            keys = [[key for micro_batch in batch for key in micro_batch] for batch in batches]
            images = torch.tensor([[image for _, image, _ in batch] for batch in keys])
            yield images, torch.tensor([[j for _, _, captions in batch for j in captions] for batch in keys])


def dropout(x, p):
    """As `F.dropout` with p rounded to 1/65536, but several times faster on a CPU: 16 random bits per element."""
    if not p:
        return x
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(2**16 * p) - 2**15
    return x * (kept / (1 - p))


def train_heads(model, data, draw, num_arms, config, seeds, weight=1.0):
    """The `Heads` of (S, A) runs after `config.epochs` epochs.

    Args:
        data: images (N, F), texts (T, F) and text_ids (T,) on the device; `pairs`, the `Pairs` of each seed, and
            `real_images`, `real_captions` (S, .): the indices of its images and captions in them.
        draw: called with the step and B; the pairs added in this step: features (S, A, E, F), texts (S, A, E, F),
            image ids and text ids (S, A, E). None: none are added.
        weight: of an added pair in the loss.
    """
    device, p = data.texts.device, config.dropout
    heads, batches = Heads(model, seeds, num_arms), list(PairSampler(data.pairs[0], config).micro_batch_counts())
    steps = config.epochs * len(batches)
    optimizer = heads.optimizer(config)
    scheduler = clip_training.build_scheduler(optimizer, config, steps)
    bar = progress_bar(real_batches(data.pairs, config, seeds), total=steps, desc="heads", unit="step", leave=False)
    for step, (images, captions) in enumerate(bar):
        torch.manual_seed(derive_seed(seeds[0], step))
        num_real = images.shape[1]
        image_ids = data.real_images.gather(1, images.to(device))
        captions = data.real_captions.gather(1, captions.to(device))
        real = [dropout(x, p)[:, None] for x in (data.images[image_ids], data.texts[captions])]
        embeddings = [heads(name, x) for name, x in zip(("image", "text"), real, strict=True)]
        index = torch.arange(num_real, device=device).repeat_interleave(captions.shape[1] // num_real)
        ids, text_ids = ([x[:, None].expand(-1, num_arms, -1)] for x in (image_ids, data.text_ids[captions]))
        weights = torch.ones(num_real, device=device)
        if draw:
            *added, added_ids, added_text_ids = draw(step, num_real)
            for position, (name, x) in enumerate(zip(("image", "text"), added, strict=True)):
                embeddings[position] = torch.cat([embeddings[position], heads(name, dropout(x, p))], 2)
            count = added_ids.shape[2]
            index = torch.cat([index, num_real + torch.arange(count, device=device)])
            ids, text_ids = [*ids, added_ids], [*text_ids, added_text_ids]
            weights = torch.cat([weights, torch.full((count,), weight, device=device)])
        ids, text_ids = torch.cat(ids, 2).flatten(0, 1), torch.cat(text_ids, 2).flatten(0, 1)
        vectors, t = [x.flatten(0, 1) for x in embeddings], heads.parameters["t", ""]
        contrastive_losses(*vectors, t.flatten(), index, ids, weights, text_ids).sum().backward()
        if config.max_grad_norm:
            heads.clip_gradients(config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        t.data.clamp_(0, MAX_LOGIT_SCALE)
    return heads
