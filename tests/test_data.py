import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from jackpot_kernels.data import Batches, DataError, Images, as_dataset, digits, imagenet
from jackpot_kernels.data.image_files import ImageFiles, files_by_class
from jackpot_kernels.data.imagenet import imagenet_380, imagenet_signed
from jackpot_kernels.models import resnet20, vgg19
from jackpot_kernels.search.evaluation import require_fit

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Noisy(Dataset):
    """Ten samples with augmentation from both generators."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((2,), float(index)) + torch.rand(2) + random.random(), index


def collect(batches):
    return [(x.clone(), y.clone()) for x, y in batches]


def same(a, b):
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def test_digits_are_the_real_ones_in_a_fixed_split():
    train, test = digits()
    assert [tuple(t.shape) for t in train.tensors] == [(1297, 1, 8, 8), (1297,)]
    assert [tuple(t.shape) for t in test.tensors] == [(500, 1, 8, 8), (500,)]
    both = torch.cat([train.tensors[0], test.tensors[0]])
    assert both.amin() == 0 and both.amax() == 1
    assert torch.equal(digits()[1].tensors[1], test.tensors[1])
    assert set(test.tensors[1].tolist()) == set(range(10))
    seen = {tuple(image.flatten().tolist()) for image in train.tensors[0]}
    assert not any(tuple(image.flatten().tolist()) in seen for image in test.tensors[0])


def test_shuffled_epoch_has_full_batches_of_distinct_samples():
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    batches = Batches(data, 3, CPU, seed=5)
    epoch = collect(batches.shuffled(0))
    labels = torch.cat([y for _, y in epoch])
    assert batches.shuffled_batches == len(epoch) == 3
    assert len(set(labels.tolist())) == 9
    assert torch.equal(torch.cat([x for x, _ in epoch]), labels.float())
    assert not same(epoch, collect(batches.shuffled(1)))
    assert not same(epoch, collect(Batches(data, 3, CPU, seed=6).shuffled(0)))
    assert Batches(data, 64, CPU).shuffled_batches == 1
    assert torch.equal(torch.cat([y for _, y in batches.ordered()]), torch.arange(10))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_augmentation_depends_on_neither_workers_nor_interruption(workers, start):
    whole = collect(Batches(Noisy(), 3, CPU, seed=1).shuffled(4))
    torch.rand(7)
    random.random()
    part = collect(Batches(Noisy(), 3, CPU, seed=1, workers=workers).shuffled(4, start))
    assert same(whole[start:], part)
    assert not same(whole, collect(Batches(Noisy(), 3, CPU, seed=1).shuffled(5)))


def test_loading_leaves_the_generators_alone():
    before = torch.get_rng_state(), random.getstate()
    collect(Batches(Noisy(), 3, CPU).ordered())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_pair_of_tensors_is_a_data_set():
    data = as_dataset((torch.zeros(4, 2), torch.arange(4)), "training data")
    assert len(data) == 4 and data[3][1] == 3
    assert as_dataset(data, "training data") is data


@pytest.mark.parametrize(
    ("value", "error", "sentence"),
    [
        ((torch.zeros(4, 2), torch.arange(3)), ValueError, r"one label an input, got \[4, 2\] and \[3\]"),
        ((torch.zeros(0, 2), torch.arange(0)), ValueError, "at least one sample"),
        (iter([]), TypeError, "map-style Dataset or a pair of tensors"),
        ([torch.zeros(2)] * 3, TypeError, "pairs .input tensor, label., got Tensor"),
        ([("image", 3)], TypeError, "got .str, int."),
        ([(torch.zeros(2), "cat")], TypeError, "labels that are numbers, got .Tensor, str."),
        ([(torch.zeros(2), None)], TypeError, "labels that are numbers, got .Tensor, NoneType."),
    ],
)
def test_unfit_data_is_named(value, error, sentence):
    with pytest.raises(error, match=f"training data must .*{sentence}"):
        as_dataset(value, "training data")


def pictures(count=10, size=8, classes=10, **options):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Images(images, torch.arange(count) % classes, MEAN, STD, **options)


def augmented(image, top, left, flipped, padding):
    """One image by the textbook: pad with black, cut out, mirror, scale to [0, 1], normalise."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding))
    padded[:, padding : padding + height, padding : padding + width] = image
    cut = padded[:, top : top + height, left : left + width]
    cut = cut[:, :, ::-1] if flipped else cut
    return (cut / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]


@pytest.mark.parametrize("padding", [0, 2, 4])
@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (40, 3, 6, 9)])
def test_augmentation_is_the_textbooks_image_by_image(padding, shape):
    images = torch.randint(256, shape, dtype=torch.uint8)
    data = Images(images, torch.zeros(len(images), dtype=torch.int64), MEAN, STD, crop_padding=padding)
    draws = data.draw(len(images), torch.Generator().manual_seed(1))
    found = data.augmented(images, draws)
    for image, draw, result in zip(images, draws.tolist(), found, strict=True):
        assert np.allclose(result.numpy(), augmented(image.numpy(), *draw, padding), atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last) and found.dtype == torch.float32


def test_each_crop_and_flip_is_drawn_as_often():
    draws = pictures(crop_padding=1).draw(18_000, torch.Generator().manual_seed(0))
    counts = (draws * torch.tensor([6, 2, 1])).sum(1).bincount()
    assert len(counts) == 3 * 3 * 2
    # Mean 1000 and deviation 31.
    assert counts.min() > 850 and counts.max() < 1150
    plain = pictures(crop_padding=0, flip=False).draw(50, torch.Generator().manual_seed(0))
    assert not plain.any()


def test_shuffled_batches_are_augmented_as_seed_and_epoch_say():
    data = pictures(count=10)
    generator = torch.Generator().manual_seed(5 * 1_000_003 + 2)
    order = torch.randperm(10, generator=generator)[:9]
    draws = data.draw(9, generator)
    for i, (inputs, labels) in enumerate(Batches(data, 3, CPU, seed=5).shuffled(2)):
        index = order[3 * i : 3 * i + 3]
        assert torch.equal(labels, data.tensors[1][index])
        for j, k in enumerate(index):
            expected = augmented(data.tensors[0][k].numpy(), *draws[3 * i + j].tolist(), 4)
            assert np.allclose(inputs[j].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_augmented_epoch_goes_on_where_it_was_interrupted(start):
    batches = Batches(pictures(), 3, CPU, seed=1)
    whole = collect(batches.shuffled(4))
    torch.rand(7)
    assert same(whole[start:], collect(Batches(pictures(), 3, CPU, seed=1).shuffled(4, start)))
    assert not same(whole, collect(batches.shuffled(5)))
    assert not same(whole, collect(Batches(pictures(), 3, CPU, seed=2).shuffled(4)))


def test_images_come_in_the_order_of_any_other_data():
    data = pictures()
    plain = Batches(TensorDataset(torch.zeros(10), data.tensors[1]), 4, CPU, seed=3)
    labels = [y.tolist() for _, y in Batches(data, 4, CPU, seed=3).shuffled(1)]
    assert labels == [y.tolist() for _, y in plain.shuffled(1)]


def test_ordered_batches_are_normalized_only():
    data = pictures()
    batches = Batches(data, 4, CPU)
    for begin, (inputs, labels) in zip((0, 4, 8), batches.ordered(), strict=True):
        assert inputs.is_contiguous(memory_format=torch.channels_last)
        for i, (image, label) in enumerate(zip(inputs, labels, strict=True), begin):
            expected = augmented(data.tensors[0][i].numpy(), 0, 0, 0, padding=0)
            assert np.allclose(image.numpy(), expected, atol=1e-5)
            assert torch.equal(image, data[i][0]) and label == data[i][1]
    assert torch.equal(batches.labels, data.tensors[1])


def test_sampled_batches_come_from_everywhere_or_are_all():
    data = TensorDataset(torch.arange(100.0), torch.arange(100) // 10)
    batches = Batches(data, 8, CPU, seed=3)
    first, second = (torch.cat([x for x, _ in batches.sampled(5)]) for _ in range(2))
    assert torch.equal(first, second) and len(first.unique()) == 40
    assert len((first // 10).unique()) == 10  # every class, which lie one after the other
    everything = [x for x, _ in batches.sampled(13)]
    assert all(map(torch.equal, everything, [x for x, _ in batches.ordered()])) and len(everything) == 13


def test_images_are_an_ordinary_data_set():
    data = as_dataset(pictures(), "training data")
    ((inputs, labels),) = DataLoader(data, batch_size=10)
    ((expected, same_labels),) = Batches(data, 10, CPU).ordered()
    assert torch.equal(inputs, expected) and torch.equal(labels, same_labels)


def test_images_stay_as_they_are():
    data = pictures()
    before = data.tensors[0].clone()
    collect(Batches(data, 3, CPU).shuffled(0))
    collect(Batches(data, 3, CPU).ordered())
    assert torch.equal(data.tensors[0], before)


@pytest.mark.gpu
def test_images_are_augmented_on_the_gpu_with_the_bits_of_the_cpu():
    data = pictures(count=64, size=32)
    on_gpu = Batches(data, 16, torch.device("cuda"), seed=1)
    for way in (lambda b: b.shuffled(3, 1), Batches.ordered):
        found = [(x.cpu(), y.cpu()) for x, y in way(on_gpu)]
        assert same(found, collect(way(Batches(data, 16, CPU, seed=1))))


def test_subset_takes_the_first_or_as_many_of_each_class():
    data = pictures(count=60, classes=6, crop_padding=2, flip=False)
    first = data.subset(13)
    assert all(torch.equal(a, b[:13]) for a, b in zip(first.tensors, data.tensors, strict=True))
    assert (first.crop_padding, first.flip, first.mean) == (2, False, MEAN)
    balanced = data.subset(20, seed=1)
    assert balanced.tensors[1].bincount().tolist() == [4, 4, 3, 3, 3, 3]
    places = [int((data.tensors[0] == image).flatten(1).all(1).nonzero()) for image in balanced.tensors[0]]
    assert places == sorted(set(places)) and len(places) == 20
    assert [int(data.tensors[1][place]) for place in places] == balanced.tensors[1].tolist()
    assert torch.equal(data.subset(20, seed=1).tensors[0], balanced.tensors[0])
    assert not torch.equal(data.subset(20, seed=2).tensors[0], balanced.tensors[0])
    assert torch.equal(data.subset(60, seed=2).tensors[0], data.tensors[0])


@pytest.mark.parametrize("count", [0, 61])
def test_subset_must_be_there(count):
    with pytest.raises(ValueError, match=rf"count must be in \[1, 60\], got {count}"):
        pictures(count=60).subset(count)


def test_balanced_subset_must_be_there():
    data = Images(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.tensor([0] * 8 + [1]), MEAN, STD)
    assert data.subset(3, seed=0).tensors[1].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="count must ask 2 classes for no more images than each has, got 4"):
        data.subset(4, seed=0)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"images": torch.zeros(4, 3, 8, 8)}, TypeError, "images must be uint8, got float32"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be int64, got float32"),
        ({"labels": torch.arange(3)}, ValueError, r"labels must have shape \[4\], got \[3\]"),
        (
            {"images": torch.zeros(4, 8, 8, dtype=torch.uint8)},
            ValueError,
            r"images must have shape \[N, C, H",
        ),
        ({"mean": (0.5,)}, ValueError, "mean must have a value for each of 3 channels, got 1"),
        ({"std": (0.5,) * 4}, ValueError, "std must have a value for each of 3 channels, got 4"),
        ({"std": (0.5, 0, 0.5)}, ValueError, r"std must be positive, got \(0.5, 0, 0.5\)"),
        ({"crop_padding": -1}, ValueError, "crop_padding must not be negative, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unfit_images_are_named(change, error, sentence):
    good = {"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "labels": torch.arange(4)}
    with pytest.raises(error, match=sentence):
        Images(**{**good, "mean": MEAN, "std": STD, **change})


@pytest.mark.parametrize(
    ("model", "data", "sentence"),
    [
        (resnet20, pictures(count=12, classes=11), r"labels must be in \[0, 10\) .* 10 outputs, got 10"),
        (
            lambda: vgg19(width=1 / 16),
            pictures(size=8),
            r"inputs of shape \[4, 3, 8, 8\], but fails: [^\n]*$",
        ),
    ],
    ids=["classes", "size"],
)
def test_images_that_do_not_fit_the_network_are_named(model, data, sentence):
    with pytest.raises(ValueError, match=sentence):
        require_fit(model(), Batches(data, 4, CPU))


def test_samples_of_several_sizes_are_named():
    data = [(torch.zeros(3, 32, 32 + i), i) for i in range(2)]
    with pytest.raises(ValueError, match=r"samples must fit in one batch, .* \[3, 32, 33\] at entry 1"):
        require_fit(resnet20(), Batches(data, 2, CPU))


def test_labels_below_zero_are_named():
    data = Images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, -1, 2]), MEAN, STD)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\) .*, got -1"):
        require_fit(resnet20(), Batches(data, 2, CPU))


def test_loaded_images_are_channels_last():
    class Loaded(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.full((3, 4, 4), float(index)), index

    ((inputs, labels),) = Batches(Loaded(), 3, CPU).ordered()
    assert inputs.is_contiguous(memory_format=torch.channels_last) and labels.tolist() == [0, 1, 2]
    assert torch.equal(inputs[:, 2, 3, 1], torch.arange(3.0))


def save_image(path, size=(40, 30), color=(100, 50, 7), mode="RGB"):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, size, color).save(path)


def image_folder(path, classes=("cat", "dog"), size=(40, 30)):
    for part in ("train", "val"):
        for i, name in enumerate(classes):
            for j in range(3):
                save_image(path / part / name / f"{j}.png", size, (100 * i, 50 * j, 7))
    return path


def module_of_imagenet():
    """The module, whose name in the package is that of its function."""
    return sys.modules["jackpot_kernels.data.imagenet"]


def forget(monkeypatch, *packages):
    """Let packages, imported or not, be missing."""
    for module in [m for m in sys.modules if m.startswith(tuple(f"{p}." for p in packages))]:
        monkeypatch.delitem(sys.modules, module)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_imagenet_is_read_from_folders(tmp_path):
    pytest.importorskip("torchvision")
    train, test = imagenet(
        image_folder(tmp_path), size=16, resize=20, mean=(0,) * 3, std=(1,) * 3, loader="torchvision"
    )
    batches = Batches(as_dataset(train, "training data"), 4, CPU, seed=1, workers=2)
    assert same(collect(batches.shuffled(0)), collect(Batches(train, 4, CPU, seed=1).shuffled(0)))
    inputs, labels = next(Batches(test, 6, CPU).ordered())
    assert inputs.shape == (6, 3, 16, 16) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.tensor([[100.0 * (i // 3), 50.0 * (i % 3), 7] for i in range(6)]) / 255
    assert torch.allclose(inputs, expected[:, :, None, None].expand_as(inputs))


def test_images_are_found_in_the_order_of_classes_folders_and_names(tmp_path):
    names = ["b/2.PNG", "b/10.jpeg", "b/deep/0.png", "a/9.jpg", "a/8.webp", "c/deep/deeper/1.bmp"]
    for name in [*names, "a/notes.txt", "stray.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = files_by_class(tmp_path)
    assert list(found) == ["a", "b", "c"]
    assert [str(tmp_path / name) for name in (names[4], names[3])] == found["a"]
    assert [str(tmp_path / name) for name in (names[1], names[0], names[2])] == found["b"]
    assert [str(tmp_path / names[5])] == found["c"]


@pytest.mark.parametrize("empty", ["", "eel", "eel/deep"])
def test_classes_without_images_are_named(empty, tmp_path):
    if empty:
        save_image(tmp_path / "cat" / "0.png")
        (tmp_path / empty).mkdir(parents=True)
    place = tmp_path / empty.partition("/")[0]
    with pytest.raises(FileNotFoundError, match=f"in the folder of each class, got none in {place}$"):
        files_by_class(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_files_are_read_as_colours(workers, tmp_path):
    images = (("RGB", (1, 2, 3)), ("L", 77), ("RGBA", (4, 5, 6, 128)))
    for i, (mode, color) in enumerate(images):
        save_image(tmp_path / f"{i}.png", color=color, mode=mode)
    files = ImageFiles(
        [str(tmp_path / f"{i}.png") for i in range(3)],
        torch.tensor([2, 1, 0]),
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    )
    ((inputs, labels),) = Batches(as_dataset(files, "training data"), 3, CPU, workers=workers).ordered()
    assert inputs.shape == (3, 3, 30, 40) and labels.tolist() == [2, 1, 0]
    expected = torch.tensor([(1, 2, 3), (77, 77, 77), (4, 5, 6)], dtype=torch.uint8)
    assert torch.equal(inputs, expected[:, :, None, None].expand_as(inputs))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"no image" + b])
def test_damaged_images_are_named(damage, suffix, tmp_path):
    path = tmp_path / f"0.{suffix}"
    save_image(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"images must be whole, got {path} "):
        ImageFiles([str(path)], torch.zeros(1, dtype=torch.int64), np.array)[0]


def test_imagenet_folders_must_hold_the_same_classes(tmp_path):
    (image_folder(tmp_path) / "val" / "dog").rename(tmp_path / "val" / "eel")
    with pytest.raises(ValueError, match="the same classes in train and val, got 'dog' in one alone"):
        imagenet(tmp_path)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_missing_imagenet_says_what_to_put_where(missing, tmp_path, monkeypatch):
    for part in {"train", "val"} - {missing}:
        (tmp_path / "imagenet" / part).mkdir(parents=True)
    monkeypatch.setenv("JACKPOT_DATA", str(tmp_path))
    sentence = f"imagenet must be in {tmp_path}/imagenet as train and val .*, got no .*/{missing}"
    with pytest.raises(FileNotFoundError, match=sentence):
        imagenet()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loader": "pillow"}, "loader must be one of auto, torchvision, dali, got 'pillow'"),
        ({"interpolation": "box"}, "interpolation must be one of bilinear, bicubic, got 'box'"),
        ({"resize": 223}, "resize must be at least size, which is 224, got 223"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unfit_views_of_imagenet_are_named(options, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"{sentence}$"):
        imagenet(tmp_path, **options)


@pytest.mark.parametrize(
    ("loader", "sentence"),
    [
        ("auto", r'imagenet needs torchvision; .*pip install "jackpot_kernels\[models\]"$'),
        ("torchvision", r'imagenet needs torchvision; .*pip install "jackpot_kernels\[models\]"$'),
        ("dali", r'loader "dali" needs DALI; install it with: pip install nvidia-dali-cuda130'),
    ],
)
def test_imagenet_without_its_loader_is_one_sentence(loader, sentence, tmp_path, monkeypatch):
    forget(monkeypatch, "torchvision", "nvidia")
    monkeypatch.delitem(sys.modules, "jackpot_kernels.data.dali", raising=False)
    with pytest.raises(ModuleNotFoundError, match=sentence):
        imagenet(image_folder(tmp_path), loader=loader)


@pytest.mark.parametrize(("loader", "installed", "chosen"), [("auto", True, "dali"), ("dali", False, "dali")])
def test_dali_is_told_what_torchvision_would_be(loader, installed, chosen, tmp_path, monkeypatch):
    def dali(paths, labels, view, augmented):
        return SimpleNamespace(paths=paths, labels=labels.tolist(), view=view, augmented=augmented)

    monkeypatch.setattr(module_of_imagenet(), "find_spec", lambda name: installed or None)
    monkeypatch.setitem(sys.modules, "jackpot_kernels.data.dali", SimpleNamespace(DaliImages=dali))
    parts = imagenet_380(image_folder(tmp_path), loader=loader)
    for name, part in zip(("train", "val"), parts, strict=True):
        files = [str(tmp_path / name / kind / f"{i}.png") for kind in ("cat", "dog") for i in range(3)]
        assert part.paths == files and part.labels == [0, 0, 0, 1, 1, 1]
        assert part.augmented == (name == "train")
        assert part.view == (380, 384, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic")


@pytest.mark.parametrize(
    ("build", "size", "resize", "how", "mean"),
    [
        (imagenet, 224, 256, "bilinear", (0.485, 0.456, 0.406)),
        (imagenet_380, 380, 384, "bicubic", (0.485, 0.456, 0.406)),
        (imagenet_signed, 224, 256, "bilinear", (0.5, 0.5, 0.5)),
    ],
)
def test_imagenet_asks_torchvision_for_the_usual_transforms(
    build, size, resize, how, mean, tmp_path, monkeypatch
):
    def named(name):
        return lambda *args, **options: (name, *args, *options.values())

    names = ("InterpolationMode", "ToTensor", "Normalize", "RandomResizedCrop", "RandomHorizontalFlip")
    transforms = SimpleNamespace(**{name: named(name) for name in (*names, "Resize", "CenterCrop")})
    transforms.Compose = lambda steps: lambda image: (steps, image.getpixel((0, 0)))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(transforms=transforms))
    parts = build(image_folder(tmp_path), loader="torchvision")
    mode = ("InterpolationMode", how)
    std = (0.229, 0.224, 0.225) if build is not imagenet_signed else mean
    cuts = (
        [("RandomResizedCrop", size, mode), ("RandomHorizontalFlip",)],
        [("Resize", resize, mode), ("CenterCrop", size)],
    )
    for part, cut in zip(parts, cuts, strict=True):
        (steps, pixel), label = part[5]
        assert steps == [*cut, ("ToTensor",), ("Normalize", mean, std)]
        assert pixel == (100, 100, 7) and label == 1 and len(part) == 6
