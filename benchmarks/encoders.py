"""Parameter counts of the paper's encoders: as built here, and as computed from the paper's tables 19 and 20.

The paper (Radford et al. 2021, arXiv:2103.00020) states one count, 63 million for the text Transformer (section 2.4).
Those of the image encoders are computed from its depths, widths and resolutions, including the linear projection to
the shared space. The models are built on the meta device, without memory for the weights.
"""

import argparse

from common import report

# name: (blocks or layers, width, patch size in pixels or 0, embedding dimension, image size)
IMAGE_ENCODERS = {
    "RN50": ((3, 4, 6, 3), 64, 0, 1024, 224),
    "RN101": ((3, 4, 23, 3), 64, 0, 512, 224),
    "RN50x4": ((4, 6, 10, 6), 80, 0, 640, 288),
    "RN50x16": ((6, 8, 18, 8), 96, 0, 768, 384),
    "RN50x64": ((3, 15, 36, 10), 128, 0, 1024, 448),
    "ViT-B/32": (12, 768, 32, 512, 224),
    "ViT-B/16": (12, 768, 16, 512, 224),
    "ViT-L/14": (24, 1024, 14, 768, 224),
}
VOCAB_SIZE, CONTEXT_LENGTH = 49_152, 76  # in the paper; the released models have 49,408 and 77


def resnet_count(blocks, width, dim, size):
    """Three stem convolutions, bottlenecks, attention pooling; convolutions have BatchNorm and no bias."""

    def conv(inputs, outputs, kernel):
        return inputs * outputs * kernel**2 + 2 * outputs

    total = conv(3, width // 2, 3) + conv(width // 2, width // 2, 3) + conv(width // 2, width, 3)
    inputs = width
    for stage, num_blocks in enumerate(blocks):
        inner = width * 2**stage
        total += conv(inputs, 4 * inner, 1)  # shortcut of the first block
        for _ in range(num_blocks):
            total += conv(inputs, inner, 1) + conv(inner, inner, 3) + conv(inner, 4 * inner, 1)
            inputs = 4 * inner
    positions = (size // 32) ** 2 + 1
    return total + positions * inputs + 3 * (inputs + 1) * inputs + (inputs + 1) * dim


def transformer_count(layers, width):
    """Per layer four projections and an MLP of four times the width, with biases, and two LayerNorms."""
    return layers * (12 * width**2 + 13 * width)


def vit_count(layers, width, patch, dim, size):
    """Patch embedding, class token, positions, LayerNorm before and after the layers, projection."""
    positions = (size // patch) ** 2 + 1
    return (3 * patch**2 + 1 + positions + 4 + dim) * width + transformer_count(layers, width)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0].replace("`", "")).parse_args()

    import torch

    from modules import ProjectionHead, build_image_encoder, build_text_encoder

    rows = []
    with torch.device("meta"):
        for name, (depth, width, patch, dim, size) in IMAGE_ENCODERS.items():
            encoder, image_config, _ = build_image_encoder(name, size, pretrained=False)
            head = ProjectionHead(encoder.width, dim, bias=encoder.projection_bias)
            shape = head(encoder(torch.zeros(1, 3, size, size))).shape
            assert shape == (1, dim), shape
            paper = vit_count(depth, width, patch, dim, size) if patch else resnet_count(depth, width, dim, size)
            total = count(encoder) + count(head)
            rows.append(make_row(name, image_config["architecture"], encoder, total, paper, size, dim))
        for name, model in (("transformer", "transformers CLIPTextModel"), ("cbow", "nn.Embedding")):
            encoder, _ = build_text_encoder(name, "mean", False, VOCAB_SIZE)
            layers = transformer_count(12, 512) + CONTEXT_LENGTH * 512 + 2 * 512 if name == "transformer" else 0
            rows.append(make_row(name, model, encoder, count(encoder), VOCAB_SIZE * 512 + layers, "", ""))
    note = (
        "paper: 63M is stated for the text Transformer (section 2.4); the other numbers are computed from tables 19 "
        "and 20, for image encoders with their projection, for text encoders without; the paper states no size for "
        "cbow, 512 is used here"
    )
    report("encoders", rows, note=note)


def make_row(name, model, encoder, here, paper, size, dim):
    return {
        "name": name,
        "built as": model,
        "parameters here": f"{here:,}",
        "from the paper": f"{paper:,}" if name != "cbow" else "not stated",
        "image size": size,
        "width": encoder.width,
        "embedding": dim,
    }


if __name__ == "__main__":
    main()
