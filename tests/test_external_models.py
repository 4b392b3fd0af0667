import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import jackpot_kernels as jk
from benchmarks.shapes import NETWORKS
from jackpot_kernels.models import MODELS, external

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
LIBRARY = {
    "resnet50": "torchvision",
    "efficientnet_b4": "torchvision",
    "mobilenet_v1": "timm",
    "vit_b16": "transformers",
    "bert_base": "transformers",
}


def tiny_vit():
    return external.vit_b16(image_size=32, patch_size=8, num_labels=10, **TINY)


def tiny_bert():
    return external.bert_base(vocab_size=50, num_labels=10, **TINY)


def pixels():
    return torch.randn(8, 3, 32, 32)


def tokens():
    return torch.randint(1, 50, (8, 12))


TRANSFORMERS = pytest.mark.parametrize(
    ("build", "inputs"), [(tiny_vit, pixels), (tiny_bert, tokens)], ids=["vit", "bert"]
)


@TRANSFORMERS
def test_a_transformer_is_searched(build, inputs):
    pytest.importorskip("transformers")
    model, x, labels = build().eval(), inputs(), torch.arange(8)
    dense = model(x)
    assert dense.shape == (8, 10)
    jk.convert(model)
    assert torch.allclose(model(x), dense, atol=1e-5)
    jk.initialize(model, sparsity=0.5)
    before = {name: layer.mask.clone() for name, layer in jk.masked_layers(model).items()}
    weights = {name: layer.weight.clone() for name, layer in jk.masked_layers(model).items()}
    optimizer = jk.SRPopup(model, lr=100.0, total_steps=10)
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    layers = jk.masked_layers(model)
    assert list(layers)[-1] == "model.classifier" and layers["model.classifier"].sparsity == 0
    assert any(not torch.equal(layer.mask, before[name]) for name, layer in layers.items())
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in layers.items())
    assert all(layer.num_kept == before[name].sum() for name, layer in layers.items())


@TRANSFORMERS
def test_every_linear_layer_of_a_transformer_is_masked(build, inputs):
    pytest.importorskip("transformers")
    model = jk.convert(build())
    # Query, key, value, output and two layers of the perceptron in each of two blocks.
    inside = [name for name in jk.masked_layers(model) if "layer" in name.split("classifier")[0]]
    assert len(inside) == 2 * 6
    outside = [name.rpartition(".")[2] for name in jk.masked_layers(model) if name not in inside]
    assert outside == (["projection", "classifier"] if build is tiny_vit else ["dense", "classifier"])


def test_padding_is_not_attended_to():
    pytest.importorskip("transformers")
    model, x = tiny_bert().eval(), tokens()
    padded = torch.cat([x, torch.zeros(8, 5, dtype=torch.int64)], dim=1)
    assert torch.allclose(model(padded), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("build", "weights", "layers"),
    [
        # 12 blocks of 4 D² + 2 D 4D for D = 768, then what stands before and after them.
        (external.vit_b16, 12 * 12 * 768**2 + 3 * 16**2 * 768 + 1000 * 768, 12 * 6 + 2),
        (external.bert_base, 12 * 12 * 768**2 + 768**2 + 2 * 768, 12 * 6 + 2),
    ],
    ids=["vit", "bert"],
)
def test_transformers_have_their_published_size(build, weights, layers):
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model = build()
    sizes = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert (sum(sizes), len(sizes)) == (weights, layers)


def test_images_of_another_size_are_refused_by_name():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="Input image size"):
        tiny_vit()(torch.zeros(2, 3, 16, 16))


def test_resnet50_has_the_papers_weights():
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = external.resnet50()
    found = [tuple(p.shape) for p in model.parameters() if p.dim() > 1]
    assert sorted(found) == sorted(NETWORKS["ResNet-50"])
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == 25_502_912


@pytest.mark.parametrize("name", ["efficientnet_b4", "mobilenet_v1"])
def test_other_external_networks_convert(name):
    pytest.importorskip(LIBRARY[name])
    model = jk.convert(getattr(external, name)().eval())
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b4"])
def test_torchvision_is_asked_for_the_first_recipe(name, monkeypatch):
    asked = []
    fake = SimpleNamespace(get_model=lambda *args, **options: asked.append((args, options)))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=fake))
    getattr(external, name)()
    getattr(external, f"{name}_pretrained")()
    assert asked == [((name,), {"weights": None}), ((name,), {"weights": "IMAGENET1K_V1"})]


@pytest.mark.parametrize("name", LIBRARY)
def test_a_missing_library_is_one_sentence(name, monkeypatch):
    library = LIBRARY[name]
    for module in [m for m in sys.modules if m.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError) as error:
        getattr(external, name)()
    assert (
        str(error.value) == f'{name} needs {library}; install it with: pip install "jackpot_kernels[models]"'
    )


def test_every_external_network_has_a_name_with_and_without_weights():
    named = {entry.partition(":")[2] for entry in MODELS.values() if "external" in entry}
    assert named == {*LIBRARY, *(f"{name}_pretrained" for name in LIBRARY)}
    assert all(callable(getattr(external, name)) for name in named)
