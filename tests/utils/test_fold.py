import pytest
import timm
import torch
from torch import nn

from modules import ImageEncoder
from utils.fold import fold_batchnorm


def randomise_batchnorm(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def count_batchnorm(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnet10t"])
def test_folding_removes_every_batchnorm_and_keeps_the_features(name):
    encoder = randomise_batchnorm(ImageEncoder(name, 32).to(memory_format=torch.channels_last))
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    folded = fold_batchnorm(encoder, images[:2])
    assert count_batchnorm(encoder) > 5 and count_batchnorm(folded) == 0
    expected = encoder(images)
    torch.testing.assert_close(folded(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_encoders_that_cannot_be_folded_exactly_are_returned_as_they_are():
    class Branched(nn.Module):
        """The convolution's output is used without BatchNorm, too."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, images):
            features = self.conv(images)
            return (self.bn(features) + features).mean((2, 3))

    branched = randomise_batchnorm(Branched())
    assert fold_batchnorm(branched, torch.randn(2, 3, 16, 16)) is branched
    vit = timm.create_model("test_vit", num_classes=0, img_size=32).eval()
    assert fold_batchnorm(vit, torch.randn(2, 3, 32, 32)) is vit
