"""Images through DALI against Pillow and NumPy; where DALI is missing, nothing here can run."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from jackpot_kernels.data import Batches, as_dataset, imagenet
from jackpot_kernels.data.image_files import View

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("nvidia.dali", reason="needs DALI, which neither torch nor this package brings along")
from_dali = pytest.importorskip("jackpot_kernels.data.dali")
DaliImages, draw = from_dali.DaliImages, from_dali.draw

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Height and width; of the two last, hardly any crop fits into the former, and the latter must be enlarged.
SHAPES = ((75, 100), (101, 76), (83, 125), (125, 93), (64, 91), (99, 74), (17, 200), (30, 25))
SIZE, RESIZE = 56, 64
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# In grey levels: between the two passes of a resize Pillow rounds, and cuts off what bicubic weights exceed.
LARGEST, AVERAGE = {"bilinear": 1.1, "bicubic": 8}, 0.4
# Pixels of an enlarged or reduced crop that depend on what a filter takes for the pixels beyond its edge.
RIM = 2


def save_images(folder, suffix):
    """Write noise, so that every pixel and every filter counts."""
    generator = np.random.default_rng(0)
    for i, (height, width) in enumerate(SHAPES):
        coarse = generator.integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.{suffix}")
    return [str(folder / f"{i}.{suffix}") for i in range(len(SHAPES))]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), "png")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), "jpg")


def images(paths, augmented, interpolation="bilinear"):
    view = View(SIZE, RESIZE, MEAN, STD, interpolation)
    return DaliImages(paths, torch.arange(len(paths)), view, augmented=augmented)


def levels(image):
    """A normalised image [C, H, W] back as grey levels [H, W, C]."""
    return (image.permute(1, 2, 0).numpy() * STD + MEAN) * 255


def require_same_pixels(image, expected, interpolation="bilinear", rim=0):
    """Compare a normalised image with grey levels, but for a rim of so many pixels."""
    error = np.abs(levels(image) - expected)[rim : SIZE - rim, rim : SIZE - rim]
    assert error.max() < LARGEST[interpolation] and error.mean() < AVERAGE


def middle(path, interpolation="bilinear"):
    """torchvision's Resize, which truncates the longer side, and CenterCrop, which rounds halves to even."""
    image = Image.open(path).convert("RGB")
    width, height = (int(RESIZE * side / min(image.size)) for side in image.size)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    resized = image.resize((width, height), FILTERS[interpolation])
    return np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)))


def window(shape, sides, place):
    """torchvision's RandomResizedCrop from given draws: top, left, height, width, and whether one did fit."""
    height, width = shape
    for a, b in np.float64(sides).T:
        h, w = round(a * (height * width) ** 0.5), round(b * (height * width) ** 0.5)
        if h <= height and w <= width:
            return int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w, True
    h, w = height, width
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w, False


@pytest.mark.parametrize("interpolation", FILTERS)
def test_test_images_are_resized_and_cropped_in_the_middle(paths, interpolation):
    found = list(images(paths, False, interpolation).batches(torch.arange(len(paths)), 3, CPU, 0))
    assert [len(labels) for _, labels in found] == [3, 3, 2]
    assert torch.equal(torch.cat([labels for _, labels in found]), torch.arange(len(paths)))
    for inputs, labels in found:
        assert inputs.dtype == torch.float32 and inputs.is_contiguous(memory_format=torch.channels_last)
        for image, i in zip(inputs, labels.tolist(), strict=True):
            require_same_pixels(image, middle(paths[i], interpolation), interpolation)


def require_drawn_crops(paths, interpolation="bilinear"):
    """Compare augmented images with what the draws of their batches say; return which crops fitted."""
    order = torch.arange(len(paths)).repeat(6)
    fitted = []
    for number, (inputs, labels) in enumerate(images(paths, True, interpolation).batches(order, 5, CPU, 7)):
        draws = draw(len(labels), 7 * 1_000_003 + number)
        for j, i in enumerate(labels.tolist()):
            top, left, height, width, fits = window(SHAPES[i], draws.sides[j], draws.place[j].tolist())
            image = Image.open(paths[i]).crop((left, top, left + width, top + height))
            expected = np.asarray(image.resize((SIZE, SIZE), FILTERS[interpolation]))
            expected = expected[:, ::-1] if draws.flipped[j] else expected
            require_same_pixels(inputs[j], expected, interpolation, RIM)
            fitted.append(fits)
    assert len(fitted) == len(order)
    return fitted


@pytest.mark.parametrize("interpolation", FILTERS)
def test_training_images_are_cropped_and_flipped_as_drawn(paths, interpolation):
    assert len(set(require_drawn_crops(paths, interpolation))) == 2


def test_jpegs_are_decoded_as_pillow_does(jpegs):
    whole = images(jpegs, False).batches(torch.arange(len(jpegs)), len(jpegs), CPU, 0)
    for image, path in zip(next(whole)[0], jpegs, strict=True):
        require_same_pixels(image, middle(path))
    require_drawn_crops(jpegs)


def test_crops_are_drawn_from_torchvisions_distribution():
    draws = draw(4000, 3)
    height, width = draws.sides[:, 0], draws.sides[:, 1]
    area, ratio = (height * width).double(), (width / height).double()
    # Uniform in [0.08, 1], log-uniform in [3/4, 4/3]; mean and deviation within four standard errors.
    assert 0.0799 < area.min() < 0.081 and 0.999 < area.max() < 1.001
    assert abs(area.mean() - 0.54) < 0.0054 and abs(area.std() - 0.92 / 12**0.5) < 0.003
    assert 0.7499 < ratio.min() < 0.751 and 1.332 < ratio.max() < 1.3334
    assert abs(ratio.log().mean()) < 0.0034 and abs(ratio.log().std() - np.log(16 / 9) / 12**0.5) < 0.002
    assert abs(draws.place.mean() - 0.5) < 0.013 and draws.place.min() >= 0 and draws.place.max() < 1
    assert abs(draws.flipped.double().mean() - 0.5) < 0.032 and set(draws.flipped.tolist()) == {0, 1}


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_epoch_goes_on_where_it_was_interrupted(paths, start):
    whole = list(Batches(images(paths, True), 2, CPU, seed=1).shuffled(4))
    part = list(Batches(images(paths, True), 2, CPU, seed=1, workers=2).shuffled(4, start))
    assert len(whole) == 4 and len(part) == 4 - start
    for (inputs, labels), (again, same_labels) in zip(whole[start:], part, strict=True):
        assert torch.equal(inputs, again) and torch.equal(labels, same_labels)
    other = list(Batches(images(paths, True), 2, CPU, seed=1).shuffled(5))
    assert not torch.equal(whole[0][0], other[0][0])


def test_every_test_image_comes_once_and_generators_are_left_alone(paths):
    before = torch.get_rng_state(), random.getstate()
    batches = Batches(images(paths, False), 5, CPU, workers=2)
    for _ in range(2):
        assert [labels.tolist() for _, labels in batches.ordered()] == [[0, 1, 2, 3, 4], [5, 6, 7]]
    list(Batches(images(paths, True), 5, CPU).shuffled(0))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_images_are_an_ordinary_data_set(paths):
    data = as_dataset(images(paths, False), "test data")
    ((inputs, labels),) = data.batches(torch.tensor([3]), 1, CPU, 0)
    assert torch.equal(data[3][0], inputs[0]) and data[3][1] == labels[0] == 3
    assert torch.equal(data[-1][1], torch.tensor(7))
    with pytest.raises(IndexError):
        data[8]
    varied = images(paths, True)
    torch.manual_seed(0)
    first, second = varied[0][0], varied[0][0]
    torch.manual_seed(0)
    assert torch.equal(varied[0][0], first) and not torch.equal(first, second)


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"no image" + b])
def test_damaged_image_is_named_after_the_whole_ones(jpegs, augmented, damage, tmp_path):
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(damage(Path(jpegs[0]).read_bytes()))
    data = images([*jpegs[:3], str(damaged)], augmented)
    batches = data.batches(torch.arange(4), 2, CPU, 0)
    assert next(batches)[1].tolist() == [0, 1]
    with pytest.raises(ValueError, match=f"images must be whole, got {damaged}$"):
        next(batches)


def test_orientation_of_the_camera_is_ignored_as_pillow_does(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(pixels).resize((120, 80)).save(tmp_path / "0.jpg", exif=exif)
    ((inputs, _),) = images([str(tmp_path / "0.jpg")], False).batches(torch.arange(1), 1, CPU, 0)
    require_same_pixels(inputs[0], middle(tmp_path / "0.jpg"))


def test_imagenet_takes_dali_where_it_is_installed(paths, tmp_path):
    for part in ("train", "val"):
        for i, path in enumerate(paths):
            folder = tmp_path / part / "abc"[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.open(path).save(folder / f"{i}.png")
    train, test = imagenet(tmp_path, size=SIZE, resize=RESIZE)
    assert isinstance(train, DaliImages) and isinstance(test, DaliImages)
    ((inputs, labels),) = Batches(test, 8, CPU).ordered()
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    for image, i in zip(inputs, (0, 3, 6, 1, 4, 7, 2, 5), strict=True):
        require_same_pixels(image, middle(paths[i]))
    inputs, labels = next(Batches(train, 8, CPU).shuffled(0))
    assert inputs.shape == (8, 3, SIZE, SIZE) and labels.bincount().tolist() == [3, 3, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("augmented", [False, True])
def test_images_are_decoded_on_the_gpu(jpegs, augmented):
    order = torch.arange(len(jpegs))
    on_cpu = images(jpegs, augmented).batches(order, 3, CPU, 2)
    on_gpu = images(jpegs, augmented).batches(order, 3, torch.device("cuda"), 2)
    for (expected, labels), (inputs, same_labels) in zip(on_cpu, on_gpu, strict=True):
        assert inputs.is_cuda and inputs.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(same_labels.cpu(), labels)
        # By another decoder.
        assert all(
            np.abs(levels(a.cpu()) - levels(b)).mean() < 2 for a, b in zip(inputs, expected, strict=True)
        )
