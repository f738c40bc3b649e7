import torch

from bidm_cli.sampling.fixed_batch import fixed_batch_size, split_in_lanes


def test_a_cpu_lane_depends_on_the_image_size_alone():
    cpu = torch.device("cpu")
    sizes = {side: fixed_batch_size(cpu, (3, side, side), 64) for side in (4, 8, 16, 32, 64, 256)}
    assert sizes == {4: 32, 8: 32, 16: 8, 32: 2, 64: 1, 256: 1}
    assert fixed_batch_size(cpu, (3, 16, 16), 1) == 8
    assert fixed_batch_size(torch.device("cuda"), (3, 16, 16), 5) == 5


def test_an_image_keeps_its_slot():
    for first, n in ((0, 20), (3, 9), (7, 1), (8, 8), (15, 2)):
        lanes = split_in_lanes(first, n, 8, padded=True)
        assert [number for lane in lanes for number in lane.numbers] == list(range(first, first + n))
        for lane in lanes:
            assert lane.size == 8 and lane.slots == tuple(number % 8 for number in lane.numbers)


def test_a_gpu_lane_holds_what_it_has():
    lanes = split_in_lanes(3, 9, 8, padded=False)
    assert [(lane.numbers[0], lane.size) for lane in lanes] == [(3, 5), (8, 4)]


def test_spread_and_collect_are_inverse():
    for padded in (True, False):
        (lane,) = split_in_lanes(2, 3, 8, padded)
        values = torch.arange(3.0)[:, None]
        spread = lane.spread(values)
        assert len(spread) == lane.size
        assert torch.equal(lane.collect(spread), values)
