from __future__ import annotations

from typing import Any

import pytest
import torch

from bidm_cli.checkpoints.reading.state import load_strictly, shapes_of, state_dicts, with_prefix
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import LDM_UNET, weights

ARCHITECTURE: dict[str, Any] = {"kind": "class_embedder", "args": {"n_classes": 3, "embed_dim": 2}}


def _load(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    return load_strictly(ARCHITECTURE, tensors, "embedder", origin="from a test")


def test_state_dicts_are_found_wherever_they_are() -> None:
    tensor = torch.ones(1)
    contents = {
        "step": 3,
        "model": {"a": tensor},
        "ema": {"shadow": {"module.a": tensor, "module.b": tensor}},
        "too": {"deep": {"down": {"a": tensor}}},
        7: {"a": tensor},
    }
    assert [(found.where, list(found.tensors)) for found in state_dicts(contents)] == [
        ("model", ["a"]),
        ("ema.shadow", ["a", "b"]),
    ]
    assert [found.where for found in state_dicts([{"a": tensor}, 3, {"a": tensor}])] == ["[0]", "[2]"]
    assert [found.where for found in state_dicts({"a": tensor})] == [""]
    assert state_dicts("nothing") == []


def test_wrapper_prefixes_are_removed_only_where_all_have_them() -> None:
    tensor = torch.ones(1)
    assert list(state_dicts({"module._orig_mod.a": tensor})[0].tensors) == ["a"]
    assert list(state_dicts({"module.a": tensor, "b": tensor})[0].tensors) == ["module.a", "b"]


def test_with_prefix() -> None:
    tensors = {"a.b": torch.ones(1), "ab": torch.ones(2)}
    assert shapes_of(with_prefix(tensors, "a.")) == {"b": (1,)}


def test_float32_weights_are_taken_over_without_a_copy() -> None:
    weight = torch.randn(3, 2)
    module = _load({"embedding.weight": weight})
    assert module.get_parameter("embedding.weight").data_ptr() == weight.data_ptr()
    assert not module.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32_when_used(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 2).to(dtype)
    module = _load({"embedding.weight": weight})
    assert module.get_parameter("embedding.weight").data_ptr() == weight.data_ptr()
    assert torch.equal(module(torch.tensor([1])), weight[None, 1:2].float())
    assert torch.equal(module.get_parameter("embedding.weight"), weight.float())


def test_views_and_tied_weights_get_memory_of_their_own() -> None:
    whole = torch.randn(6, 2)
    loaded = _load({"embedding.weight": whole[:3]}).get_parameter("embedding.weight")
    assert loaded.untyped_storage().nbytes() == 24
    transposed = torch.randn(2, 3).T
    loaded = _load({"embedding.weight": transposed}).get_parameter("embedding.weight")
    assert loaded.is_contiguous()
    assert torch.equal(loaded, transposed)


def test_tied_weights_are_untied() -> None:
    linear = {"kind": "ldm_unet", "args": LDM_UNET}
    tensors = weights("ldm_unet", LDM_UNET)
    first, second = "middle_block.0.out_layers.3.weight", "middle_block.2.out_layers.3.weight"
    tensors[second] = tensors[first]
    network = load_strictly(linear, tensors, "U-Net", origin="")
    one, other = network.get_parameter(first), network.get_parameter(second)
    assert torch.equal(one, other)
    assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize(
    ("weight", "word"),
    [
        (torch.ones(1).expand(3, 2), "claims 24 bytes and has 4"),
        (torch.ones(3, 2, dtype=torch.int64), "floats"),
        (torch.ones(3, 2, dtype=torch.bool), "floats"),
        (torch.ones(3, 2, device="meta"), "floats"),
        (torch.ones(3, 2).to_sparse(), "floats"),
    ],
)
def test_what_is_no_plain_weight_is_refused(weight: torch.Tensor, word: str) -> None:
    with pytest.raises(BidmError, match=word):
        _load({"embedding.weight": weight})


def test_what_does_not_fit_is_listed() -> None:
    tensors = {f"surplus{i}": torch.ones(1) for i in range(5)} | {"embedding.weight": torch.ones(4, 2)}
    with pytest.raises(BidmError) as caught:
        _load(tensors)
    message = str(caught.value)
    assert "5 unexpected: surplus0, surplus1, surplus2, ..." in message
    assert "1 of another shape: embedding.weight (file [4, 2], network [3, 2])" in message
    assert "from a test" in message
    with pytest.raises(BidmError, match=r"1 missing: embedding\.weight"):
        _load({})


def test_names_that_may_be_left_over() -> None:
    tensors = {"embedding.weight": torch.ones(3, 2), "loss.x": torch.ones(1)}
    load_strictly(ARCHITECTURE, tensors, "embedder", origin="", ignored=lambda name: name.startswith("loss."))
