"""Joint training of CLIP and the GAN: `--gan joint`.

With theta the parameters of CLIP, its temperature included, phi those of the generator G and psi those of the
discriminator D, a step minimises three losses, each with respect to its own parameters:

    theta:  CE(real pairs and [G_ema(z, c)] with their captions)           the contrastive loss, weighted
    psi:    BCE(D(x, c), 1) + BCE(D([G(z, c)], c), 0) / 2 + BCE(D(x, c'), 0) / 2 + R1      x real, c' hard negatives;
                                                                                    no R1 for the projected D
    phi:    BCE(D(G(z, c), c), 1) + mu (1 - cos(f(G(z, c)), g(c)))         f, g: encoders of a frozen EMA copy of CLIP

[.] stops the gradient. The gradients of each term:

    term                          theta   phi     psi
    CE of real pairs              yes     -       -
    CE of generated pairs         yes     no      -      otherwise CLIP and G could collude on invisible patterns
    BCE of D, R1                  no      no      yes    otherwise CLIP would learn to detect generated images
    BCE of G                      no      yes     no     it passes through D
    CLIP guidance of G            no      yes     -      it passes through the EMA copy of CLIP

A sum CE + lambda BCE over separate parameters would not couple them, and Adam, which normalises gradients, cancels
lambda. Here CLIP is trained on images from G, and G to match captions according to CLIP. In each step mu is chosen such
that, at the images, the gradient of the second term of phi is `gan_clip_weight` times as long as that of the first.
"""

from functools import partial

import torch

from config import InputError
from dataset import SIDED, TokenStore, pad_tokens
from gan import GAN, GANAugmentation, build_discriminator, clip_guidance
from utils.device import autocast
from utils.ema import EMA
from utils.gan_data import GANData, load_checkpoint, save_generator
from utils.gan_settings import gan_settings
from utils.runs import relative_path

CLIP_EMA_DECAY = 0.99  # per step, of the copy of CLIP that guides the generator


class JointGAN(GANAugmentation):
    """Generated pairs from the EMA of a generator that is trained along with CLIP."""

    def __init__(self, config, pairs, model, device, amp_dtype):
        super().__init__(config, pairs, model, device, amp_dtype)
        folder = self.run / "gan"
        if not (folder / "last.pt").exists():
            raise InputError(f"{folder} contains no last.pt to continue the training of the GAN from: pass --gan pairs")
        if (gan_settings(folder) or {}).get("gan_subset"):
            raise InputError(f"{folder} was trained on a subset of the images, which CLIP is not: pass --gan pairs")
        self.data = GANData(self.clip, pairs, config, SIDED, device)
        architecture = self.generator.architecture
        discriminator = build_discriminator(config, self.clip, architecture)
        self.gan = GAN(architecture, discriminator, self.data.embeddings, config.gan_lr, device, amp_dtype)
        load_checkpoint(self.gan, folder)
        self.gan.generator_optimizer.param_groups[0]["lr"] = config.gan_lr  # not the checkpoint's learning rate
        self.gan.discriminator_optimizer.param_groups[0]["lr"] = 2 * config.gan_lr
        self.generator = self.gan.ema
        self.ema = EMA(model, CLIP_EMA_DECAY)
        self.clip_ema = self.ema.module
        tokens = TokenStore(model.tokenizer, pairs.captions, model.max_length)
        tokens = pad_tokens([tokens[caption] for caption in range(len(tokens))], self.pad_id)
        self.input_ids, self.attention_mask = (x.to(torch.int32).to(device) for x in tokens)  # (T, L)

    def train_step(self, model, image_ids, step, progress):
        """Update the EMA of CLIP and, while generated pairs are added, train the GAN on images of CLIP's last batch."""
        self.ema.update(step)
        if not self.is_active(progress):  # early on, CLIP cannot yet guide the generator
            return
        batch = self.data.batch(image_ids[: self.config.gan_batch_size])
        texts, weight = batch.mix(self.encode), self.config.gan_clip_weight
        guidance = partial(clip_guidance, self.clip_ema, texts, weight, self.amp_dtype) if weight else None
        embeddings, mismatched = batch.mix(self.data.embed), self.data.embed(batch.hard_negatives)
        self.gan.train_step(batch.real, embeddings, mismatched, guidance)

    @torch.no_grad()
    def encode(self, captions):
        """(B, D) embeddings by the EMA of CLIP of the training captions with these indices (B,)."""
        with autocast(self.device, self.amp_dtype):
            return self.clip_ema.encode_text(self.input_ids[captions].long(), self.attention_mask[captions].long())

    def end_epoch(self, folder):
        save_generator(self.gan.ema, folder / "gan", conditioning_run=relative_path(self.clip_run, folder))
        return super().end_epoch(folder)

    def state_dict(self):
        return {**super().state_dict(), "gan": self.gan.state_dict(), "clip_ema": self.clip_ema.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.gan.load_state_dict(state["gan"])
        self.clip_ema.load_state_dict(state["clip_ema"])
