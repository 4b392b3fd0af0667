import os
import pickle
import struct
from dataclasses import replace
from hashlib import md5

import numpy as np
import pytest
import torch

from jackpot_kernels.data import cifar10, cifar100
from jackpot_kernels.data.cifar import CIFAR10, CIFAR100
from jackpot_kernels.data.pickled import read_pickled

SETS = {"cifar10": (cifar10, CIFAR10, 10), "cifar100": (cifar100, CIFAR100, 100)}
CASES = [(name, i) for name in SETS for i in range(2)]
IDS = ["cifar10-binary", "cifar10-python", "cifar100-binary", "cifar100-python"]


def samples(seed, classes, count=5):
    """Images as bytes in the order of the archives, fine labels and coarse ones."""
    random = np.random.default_rng(seed)
    images = random.integers(256, size=(count, 3072), dtype=np.uint8)
    return images, random.integers(classes, size=count), random.integers(20, size=count)


def binary_file(name, images, fine, coarse):
    """A record an image, byte by byte: the coarse label where there is one, the label, the image."""
    records = []
    for image, label, of_twenty in zip(images, fine, coarse, strict=True):
        head = bytes([of_twenty, label]) if name == "cifar100" else bytes([label])
        records.append(head + image.tobytes())
    return b"".join(records)


def text(value):
    return b"U" + bytes([len(value)]) + value


def numbers(values):
    return b"](" + b"".join(b"M" + struct.pack("<H", value) for value in values) + b"e"


def array(values, dtype=b"u1", column_major=False):
    """The opcodes with which Python 2 and its NumPy pickle an array."""
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values.shape) + b"t"
    kind = b"cnumpy\ndtype\n(" + text(dtype) + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xff"
    kind += b"J\xff\xff\xff\xffK\x00tb"
    raw = values.tobytes()
    order = b"\x88" if column_major else b"\x89"
    return made + b"(K\x01" + shape + kind + order + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"


def python_file(name, images, fine, coarse):
    labels = {b"labels": fine} if name == "cifar10" else {b"coarse_labels": coarse, b"fine_labels": fine}
    items = text(b"batch_label") + text(b"a batch") + text(b"data") + array(images)
    items += b"".join(text(key) + numbers(values.tolist()) for key, values in labels.items())
    return b"\x80\x02}(" + items + b"u."


@pytest.fixture
def archive(tmp_path, request):
    """A tiny archive in one of the layouts: where it is, the layout with its sums, and what it holds."""
    name, index = request.param
    _, layouts, classes = SETS[name]
    layout = layouts[index]
    folder = tmp_path / layout.folder
    folder.mkdir()
    write = (binary_file, python_file)[index]
    held, sums = {}, {}
    for seed, file in enumerate([*layout.train, *layout.test]):
        held[file] = samples(seed, classes)
        content = write(name, *held[file])
        (folder / file).write_bytes(content)
        sums[file] = md5(content).hexdigest()
    train, test = ({file: sums[file] for file in part} for part in (layout.train, layout.test))
    return name, tmp_path, replace(layout, train=train, test=test), held


def load(archive, root=None):
    name, path, layout, _ = archive
    others = [other for other in SETS[name][1] if other.folder != layout.folder]
    return SETS[name][0](path if root is None else root, (*others, layout))


@pytest.mark.parametrize("archive", CASES, ids=IDS, indirect=True)
def test_each_layout_gives_images_and_fine_labels_in_order(archive):
    *_, layout, held = archive
    for data, files in zip(load(archive), (layout.train, layout.test), strict=True):
        images, labels = data.tensors
        expected = np.concatenate([held[file][0] for file in files])
        assert images.shape == (5 * len(files), 3, 32, 32) and images.dtype == torch.uint8
        for i, image in enumerate(images):
            for channel, row, column in ((0, 0, 0), (0, 0, 7), (1, 5, 2), (2, 31, 31)):
                assert image[channel, row, column] == expected[i, channel * 1024 + row * 32 + column]
        assert torch.equal(images.flatten(1), torch.from_numpy(expected))
        assert labels.tolist() == np.concatenate([held[file][1] for file in files]).tolist()
        assert labels.dtype == torch.int64


@pytest.mark.parametrize("archive", [("cifar10", 0), ("cifar100", 0)], ids=["10", "100"], indirect=True)
def test_both_sets_are_normalized_as_cifar10_is(archive):
    data, _ = load(archive)
    image, label = data[3]
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2023, 0.1994, 0.2010])
    expected = (data.tensors[0][3].numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    assert np.allclose(image.numpy(), expected, atol=1e-6)
    assert label == data.tensors[1][3]


@pytest.mark.parametrize("archive", [("cifar10", 0)], indirect=True)
def test_the_environment_names_the_folder(archive, monkeypatch):
    _, path, layout, _ = archive
    monkeypatch.setenv("JACKPOT_DATA", str(path))
    assert len(cifar10(layouts=(layout,))[0]) == 25
    monkeypatch.delenv("JACKPOT_DATA")
    monkeypatch.chdir(path)
    with pytest.raises(FileNotFoundError, match="cifar10 must be in data/cifar-10-batches-bin"):
        cifar10()


def test_a_missing_set_says_what_to_put_where(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        cifar100(tmp_path)
    assert str(error.value) == (
        f"cifar100 must be in {tmp_path}/cifar-100-binary or {tmp_path}/cifar-100-python, got neither: "
        "unpack https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz or "
        f"https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz in {tmp_path}, "
        "or set JACKPOT_DATA to the folder that holds it"
    )


@pytest.mark.parametrize("archive", CASES, ids=IDS, indirect=True)
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_file_is_named(archive, damage):
    _, path, layout, _ = archive
    file = path / layout.folder / list(layout.train)[-1]
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
        sentence = f"{file} is missing: unpack"
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
        sentence = f"{file} must have the md5 sum {layout.train[file.name]}, got "
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        load(archive)
    assert str(error.value).startswith(sentence)
    assert str(error.value).endswith(f"{layout.archive} in {path} again")


def test_the_sums_are_those_of_the_published_files():
    for layouts, files in ((CIFAR10, (5, 1)), (CIFAR100, (1, 1))):
        for layout in layouts:
            assert (len(layout.train), len(layout.test)) == files
            sums = [*layout.train.values(), *layout.test.values()]
            assert all(len(bytes.fromhex(total)) == 16 for total in sums) and len(set(sums)) == sum(files)


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": Hostile()}, protocol=2),
        pickle.dumps({"data": Hostile()}, protocol=4),
        b"cos\nsystem\n(S'exit'\ntR.",
        b"cnumpy\nload\n(S'file'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"(S'exit'\niposix\nsystem\n.",
        b"\x80\x02\x82\x01.",
    ],
    ids=["protocol-2", "protocol-4", "global", "numpy", "builtin", "instance", "extension"],
)
def test_a_hostile_pickle_is_refused(content):
    with pytest.raises(ValueError, match="pickle must be whole and hold plain values and uint8 arrays"):
        read_pickled(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        python_file("cifar10", *samples(0, 10))[:-9],
        b"\x80\x02}(" + text(b"data") + array(np.zeros((2, 4), np.uint8), dtype=b"O8") + b"u.",
        b"\x80\x02}(" + text(b"data") + array(np.zeros((2, 4), np.uint8), column_major=True) + b"u.",
        b"\x80\x02}(" + text(b"data") + array(np.zeros((2, 4), np.uint8)).replace(b"u1", b"i1") + b"u.",
        b"\x80\x02Pname\n.",
    ],
    ids=["empty", "text", "cut", "objects", "column-major", "signed", "persistent"],
)
def test_a_pickle_of_anything_else_is_refused(content):
    with pytest.raises(ValueError, match="pickle must be whole and hold plain values and uint8 arrays"):
        read_pickled(content)


def test_a_pickle_must_hold_a_dictionary():
    with pytest.raises(ValueError, match="pickle must hold a dictionary, got list"):
        read_pickled(pickle.dumps([1, 2], protocol=2))


def test_a_pickled_batch_is_read_whole():
    images, fine, coarse = samples(1, 100)
    batch = read_pickled(python_file("cifar100", images, fine, coarse))
    assert list(batch) == [b"batch_label", b"data", b"coarse_labels", b"fine_labels"]
    assert batch[b"batch_label"] == b"a batch" and batch[b"coarse_labels"] == coarse.tolist()
    assert np.array_equal(batch[b"data"], images)


def real(name):
    root = os.environ.get("JACKPOT_DATA", "data")
    if not any(os.path.isdir(os.path.join(root, layout.folder)) for layout in SETS[name][1]):
        pytest.skip(f"needs {name} in JACKPOT_DATA")
    return SETS[name][0]()


@pytest.mark.parametrize("name", SETS)
def test_the_real_set_is_whole(name):
    train, test = real(name)
    classes = SETS[name][2]
    assert train.tensors[1].bincount().tolist() == [50_000 // classes] * classes
    assert test.tensors[1].bincount().tolist() == [10_000 // classes] * classes
    if name == "cifar10":
        mean = torch.stack([channel.double().mean() for channel in train.tensors[0].unbind(1)]) / 255
        assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
