"""Folding BatchNorm into convolutions, for faster inference on a CPU."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

MAX_ERROR = 1e-5  # relative to the largest feature


@torch.no_grad()
def fold_batchnorm(encoder, example):
    """A copy of an image encoder, in evaluation mode, with BatchNorm folded into the convolution before it.

    Returns the encoder itself if it has no such layers, or if features of the example differ by more than MAX_ERROR.
    example: (B, 3, H, W) a batch of images.
    """
    folded, outputs, pairs = copy.deepcopy(encoder).eval(), {}, []

    def after_convolution(convolution, _, output):
        outputs[id(output)] = convolution, output  # kept alive, so that the id stays unique

    def before_batchnorm(batchnorm, inputs):
        if id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], batchnorm))

    hooks = []
    for module in folded.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(before_batchnorm))
    expected = folded(example)
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in folded.named_modules()}
    for convolution, batchnorm in pairs:
        statistics = batchnorm.running_mean, batchnorm.running_var, batchnorm.eps, batchnorm.weight, batchnorm.bias
        weight, bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
        convolution.weight, convolution.bias = weight, bias
        # timm's BatchNormAct2d applies an activation, too.
        rest = [getattr(batchnorm, name) for name in ("drop", "act") if hasattr(batchnorm, name)]
        folded.set_submodule(names[batchnorm], nn.Sequential(*rest))
    exact = bool(pairs) and (folded(example) - expected).abs().max() <= MAX_ERROR * expected.abs().max()
    return folded if exact else encoder
