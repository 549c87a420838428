"""Find images for a sentence: python example.py "two dogs" FOLDER (needs onnxruntime, tokenizers, Pillow, numpy)."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
config = json.loads((HERE / "preprocessor_config.json").read_text())
size = config["size"]["height"]
image_encoder, text_encoder = (
    onnxruntime.InferenceSession(HERE / f"{name}_encoder.onnx") for name in ("image", "text")
)
tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
tokenizer.enable_truncation(config["max_length"])
stored = round(size * 8 / 7)
edges, pixel = np.arange(size + 1)[:, None] * stored / size, np.arange(stored)
area = (
    np.clip(np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel), 0, None) * size / stored
)  # (size, stored)


def embed_text(sentence):
    """(1, D) unit vector of a sentence."""
    ids = np.array([tokenizer.encode(sentence).ids], np.int64)
    return text_encoder.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]


def embed_image(file):
    """(1, D) unit vector of an image file: the whole image, resized to a square in two steps, as in training."""
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    pixels = np.asarray(image.resize((stored, stored), Image.Resampling.BICUBIC, reducing_gap=2.0), np.float32)
    pixels = np.einsum("ih,jw,hwc->cij", area, area, pixels, optimize=True).round()[None] / 255
    return image_encoder.run(None, {"pixel_values": pixels.astype(np.float32)})[0]


if __name__ == "__main__":
    sentence, folder = sys.argv[1:3]
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
    scores = np.concatenate([embed_image(file) for file in files]) @ embed_text(sentence)[0]
    for row in (-scores).argsort()[:9]:
        print(f"{scores[row]:.4f}\t{files[row]}")
