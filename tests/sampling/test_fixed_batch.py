import torch

from bidm_cli.sampling.fixed_batch import fixed_batch_size, split_in_batches


def test_a_cpu_batch_depends_on_the_image_size_alone():
    cpu = torch.device("cpu")
    sizes = {side: fixed_batch_size(cpu, (3, side, side), 64) for side in (4, 8, 16, 32, 64, 256)}
    assert sizes == {4: 32, 8: 32, 16: 8, 32: 2, 64: 1, 256: 1}
    assert fixed_batch_size(cpu, (3, 16, 16), 1) == 8
    assert fixed_batch_size(torch.device("cuda"), (3, 16, 16), 5) == 5


def test_an_image_keeps_its_slot():
    for first, n in ((0, 20), (3, 9), (7, 1), (8, 8), (15, 2)):
        batches = split_in_batches(first, n, 8, padded=True)
        assert [number for batch in batches for number in batch.numbers] == list(range(first, first + n))
        for batch in batches:
            assert batch.size == 8 and batch.slots == tuple(number % 8 for number in batch.numbers)


def test_a_gpu_batch_holds_what_it_has():
    batches = split_in_batches(3, 9, 8, padded=False)
    assert [(batch.numbers[0], batch.size) for batch in batches] == [(3, 5), (8, 4)]


def test_spread_and_collect_are_inverse():
    for padded in (True, False):
        (batch,) = split_in_batches(2, 3, 8, padded)
        values = torch.arange(3.0)[:, None]
        spread = batch.spread(values)
        assert len(spread) == batch.size
        assert torch.equal(batch.collect(spread), values)
