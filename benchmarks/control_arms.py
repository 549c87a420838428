"""Control arms of gan_ablation.py: what is added to the real pairs in place of generated images with their captions."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import gan  # noqa: E402
from dataset import SIDED, TrainTransform  # noqa: E402
from utils.embed import embed_captions  # noqa: E402
from utils.gan_data import GANData, resize_images  # noqa: E402


class Shuffled(gan.GANAugmentation):
    """Generated images that pass the filter, each with the caption of the next one."""

    def generate_batch(self, chosen, random):
        batch = super().generate_batch(chosen, random)
        if batch is not None:
            for name in ("input_ids", "attention_mask", "image_ids", "weights", "text_ids"):
                if (x := getattr(batch, name)) is not None:
                    setattr(batch, name, x.roll(1, 0))
        return batch


class Blurred(gan.GANAugmentation):
    """The real images of the captions, at the resolution of the generator, in place of generated ones.

    At half the resolution if the generator's is not below that of CLIP.
    """

    def __init__(self, config, pairs, model, device, amp_dtype):
        super().__init__(config, pairs, model, device, amp_dtype)
        size = self.generator.architecture["size"]
        config = dataclasses.replace(config, gan_size=size)
        self.real_images = GANData(self.clip, pairs, config, SIDED, device).images
        self.blurred_size = size if size < config.size else config.size // 2

    def generate_images(self, chosen, random):
        images = self.real_images[self.image_ids[chosen]].float() / 255
        return resize_images(resize_images(images, self.blurred_size), self.config.size)


class Duplicates(gan.GANAugmentation):
    """The real images of the captions, augmented as in training, in place of generated ones."""

    def __init__(self, config, pairs, model, device, amp_dtype):
        super().__init__(config, pairs, model, device, amp_dtype)
        self.pairs, self.transform = pairs, TrainTransform(config.size, config.crop_scale, config.color_jitter)
        self.sources = self.image_ids  # (T,) the image of each caption

    def generate_images(self, chosen, random):
        images = []
        seeds = torch.randint(2**31, chosen.shape, generator=random).tolist()
        for image, seed in zip(self.sources[chosen].tolist(), seeds, strict=True):
            sided = any(SIDED.search(self.pairs.captions[caption]) for caption in self.pairs.captions_of(image))
            flip = self.config.flip and not sided
            images.append(self.transform(self.pairs.images[image], [seed], flip))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device).float() / 255


class Nearest(Duplicates):
    """The real image of the most similar training caption, according to the CLIP of the GAN, for each caption."""

    def __init__(self, config, pairs, model, device, amp_dtype):
        super().__init__(config, pairs, model, device, amp_dtype)
        known = embed_captions(self.clip, pairs.captions, desc="embedding captions")
        nearest = torch.cat([(part @ known.T).argmax(1) for part in self.embeddings.split(4096)])
        self.sources = torch.from_numpy(pairs.image_index)[nearest.cpu()].to(device)
        self.image_ids = self.sources  # the image and its own captions are no negatives of the added pair


CONTROLS = {"shuffled": Shuffled, "blurred": Blurred, "duplicates": Duplicates, "nearest": Nearest}
