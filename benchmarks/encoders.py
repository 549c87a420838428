"""The paper's encoders: their parameters here, and as counted from the paper's tables 19 and 20 (nothing is trained).

The paper (Radford et al. 2021, arXiv:2103.00020) states one count, the text Transformer's 63 million (section 2.4);
those of its image encoders are worked out here from the depths, widths and resolutions it gives, each with its linear
projection to the shared space. Everything is built without memory for the weights.
"""

from common import report

# name: (blocks or layers, width, patch in pixels or 0, embedding dimension, image size)
IMAGE = {
    "RN50": ((3, 4, 6, 3), 64, 0, 1024, 224),
    "RN101": ((3, 4, 23, 3), 64, 0, 512, 224),
    "RN50x4": ((4, 6, 10, 6), 80, 0, 640, 288),
    "RN50x16": ((6, 8, 18, 8), 96, 0, 768, 384),
    "RN50x64": ((3, 15, 36, 10), 128, 0, 1024, 448),
    "ViT-B/32": (12, 768, 32, 512, 224),
    "ViT-B/16": (12, 768, 16, 512, 224),
    "ViT-L/14": (24, 1024, 14, 768, 224),
}
WORDS, TOKENS = 49_152, 76  # the paper's vocabulary and context; the released models have 49,408 and 77


def resnet_count(blocks, width, dim, size):
    """Three stem convolutions, bottlenecks, attention pooling: every convolution with BatchNorm and without a bias."""

    def conv(inputs, outputs, kernel):
        return inputs * outputs * kernel**2 + 2 * outputs

    total = conv(3, width // 2, 3) + conv(width // 2, width // 2, 3) + conv(width // 2, width, 3)
    inputs = width
    for stage, number in enumerate(blocks):
        inner = width * 2**stage
        total += conv(inputs, 4 * inner, 1)  # the shortcut of the stage's first block
        for _ in range(number):
            total += conv(inputs, inner, 1) + conv(inner, inner, 3) + conv(inner, 4 * inner, 1)
            inputs = 4 * inner
    positions = (size // 32) ** 2 + 1
    return total + positions * inputs + 3 * (inputs + 1) * inputs + (inputs + 1) * dim


def transformer_count(layers, width):
    """Per layer four projections and an MLP of four times the width, with biases, and two LayerNorms."""
    return layers * (12 * width**2 + 13 * width)


def vit_count(layers, width, patch, dim, size):
    """Patches and a class token with positions, LayerNorm before and after the layers, the projection."""
    positions = (size // patch) ** 2 + 1
    return (3 * patch**2 + 1 + positions + 4 + dim) * width + transformer_count(layers, width)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def main():
    import torch

    from modules import ProjectionHead, load_image_encoder, load_text_encoder

    rows = []
    with torch.device("meta"):
        for name, (depth, width, patch, dim, size) in IMAGE.items():
            encoder, recipe, _ = load_image_encoder(name, size, pretrained=False)
            head = ProjectionHead(encoder.width, dim, bias=encoder.projection_bias)
            shape = head(encoder(torch.zeros(1, 3, size, size))).shape
            assert shape == (1, dim), shape
            paper = vit_count(depth, width, patch, dim, size) if patch else resnet_count(depth, width, dim, size)
            rows.append(row(name, recipe["architecture"], encoder, count(encoder) + count(head), paper, size, dim))
        for name, model in (("transformer", "transformers CLIPTextModel"), ("cbow", "nn.Embedding")):
            encoder, _ = load_text_encoder(name, "mean", False, WORDS)
            layers = transformer_count(12, 512) + TOKENS * 512 + 2 * 512 if name == "transformer" else 0
            rows.append(row(name, model, encoder, count(encoder), WORDS * 512 + layers, "", ""))
    note = (
        "paper: 63M is stated for the text Transformer (section 2.4); the other numbers are counted from tables 19 and "
        "20, image encoders with their projection, text encoders without; the paper gives cbow no size, 512 is ours"
    )
    report("encoders", rows, note=note)


def row(name, model, encoder, here, paper, size, dim):
    return {
        "name": name,
        "built as": model,
        "parameters here": f"{here:,}",
        "from the paper": f"{paper:,}" if name != "cbow" else "no size given",
        "image size": size,
        "width": encoder.width,
        "embedding": dim,
    }


if __name__ == "__main__":
    main()
