"""Networks of torchvision, timm and transformers, which are imported when one of theirs is asked for."""

from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor, nn


def resnet50(pretrained: bool = False) -> nn.Module:
    """Return torchvision's ResNet-50: 25,502,912 weights in 54 layers, for ImageNet.

    Args:
        pretrained: load the weights of the first recipe, as the paper does, instead of random ones.
    """
    return _from_torchvision("resnet50", pretrained)


def efficientnet_b4(pretrained: bool = False) -> nn.Module:
    """Return torchvision's EfficientNet-B4, whose pre-trained weights expect images of 380x380 pixels."""
    return _from_torchvision("efficientnet_b4", pretrained)


def mobilenet_v1(pretrained: bool = False) -> nn.Module:
    """Return timm's MobileNet-V1, whose pre-trained weights expect pixels in [-1, 1]."""
    return _library("timm", "mobilenet_v1").create_model("mobilenetv1_100", pretrained=pretrained)


def vit_b16(pretrained: bool = False, **config: Any) -> nn.Module:
    """Return transformers' ViT-B/16 for ImageNet, whose pre-trained weights expect pixels in [-1, 1].

    Args:
        pretrained: load Google's weights, fine-tuned on ImageNet, instead of random ones.
        config: of a ``ViTConfig``, where the network is to be another.
    """
    library = _library("transformers", "vit_b16")
    if pretrained:
        name = "google/vit-base-patch16-224"
        return Logits(library.ViTForImageClassification.from_pretrained(name, **config))
    settings = library.ViTConfig(**{"num_labels": 1000, **config})
    return Logits(library.ViTForImageClassification(settings))


def bert_base(pretrained: bool = False, **config: Any) -> nn.Module:
    """Return transformers' BERT as a classifier of token sequences; padding is not attended to.

    Args:
        pretrained: load Google's uncased weights, but for the classifier, which they lack.
        config: of a ``BertConfig``, such as ``num_labels``, which is 2 by default.
    """
    library = _library("transformers", "bert_base")
    if pretrained:
        name = "google-bert/bert-base-uncased"
        model = library.BertForSequenceClassification.from_pretrained(name, **config)
    else:
        model = library.BertForSequenceClassification(library.BertConfig(**config))
    return Logits(model, padding=model.config.pad_token_id)


class Logits(nn.Module):
    """A classifier of transformers as a function from one tensor to logits.

    Args:
        model: the classifier.
        padding: the token that is not attended to, where inputs are tokens.
    """

    def __init__(self, model: nn.Module, padding: int | None = None) -> None:
        super().__init__()
        self.model, self.padding = model, padding

    def forward(self, x: Tensor) -> Tensor:  # pixels [N, C, H, W] or tokens [N, L] -> [N, classes]
        if self.padding is None:
            return self.model(x).logits
        return self.model(x, attention_mask=(x != self.padding).long()).logits


def _from_torchvision(name: str, pretrained: bool) -> nn.Module:
    weights = "IMAGENET1K_V1" if pretrained else None
    return _library("torchvision", name).models.get_model(name, weights=weights)


def _library(library: str, network: str) -> Any:
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        message = f'{network} needs {library}; install it with: pip install "jackpot_kernels[models]"'
        raise ModuleNotFoundError(message, name=library) from None


resnet50_pretrained = partial(resnet50, pretrained=True)
efficientnet_b4_pretrained = partial(efficientnet_b4, pretrained=True)
mobilenet_v1_pretrained = partial(mobilenet_v1, pretrained=True)
vit_b16_pretrained = partial(vit_b16, pretrained=True)
bert_base_pretrained = partial(bert_base, pretrained=True)
