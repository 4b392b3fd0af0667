"""The start of weights that are to be trained."""

from torch import nn


def kaiming_(model: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers as He et al. do for ReLU; biases become zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
