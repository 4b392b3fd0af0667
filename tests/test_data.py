import random

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from jackpot_kernels.data import Batches, as_dataset, digits

CPU = torch.device("cpu")


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
    ],
)
def test_unfit_data_is_named(value, error, sentence):
    with pytest.raises(error, match=f"training data must .*{sentence}"):
        as_dataset(value, "training data")
