"""The style generator."""

import torch

from extras.stylegan import ModulatedConv


def test_modulated_convolution_equals_one_with_separate_weights_per_sample():
    layer = ModulatedConv(5, 7)
    h, w = torch.randn(3, 5, 6, 6), torch.randn(3, layer.style.in_features)
    torch.nn.init.normal_(layer.bias)
    for sample, style, result in zip(h, layer.style(w), layer(h, w), strict=True):
        weight = layer.weight * style[None, :, None, None]
        weight = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        expected = torch.nn.functional.conv2d(sample[None], weight, layer.bias, padding=1)[0]
        torch.testing.assert_close(result, expected)
