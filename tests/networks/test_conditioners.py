import torch

from bidm_cli.networks.conditioners import ClassEmbedder


def test_one_token_a_label() -> None:
    embedder = ClassEmbedder(4, 6)
    out = embedder(torch.tensor([3, 0]))
    assert out.shape == (2, 1, 6)
    torch.testing.assert_close(out[0, 0], embedder.embedding.weight[3])
    assert list(embedder.state_dict()) == ["embedding.weight"]
