"""Text encoders: CLIP's against transformers', LDM's against its description, and prompts end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from bidm_cli.checkpoints import text
from bidm_cli.checkpoints.reading.state import with_prefix
from bidm_cli.checkpoints.text import encode_prompts
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build
from tests.end_to_end.conditioned import TEXT_UNET, ldm

CLIP = {"vocabulary": 40, "width": 24, "layers": 2, "heads": 4, "hidden": 48, "length": 9}
WORDS = ["a", "lighthouse", "at", "night"]


def clip_state(prefix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    state = build({"kind": "clip_text", "args": CLIP}).state_dict()
    return {prefix + name: tensor for name, tensor in state.items()}


def stable_diffusion(folder: Path) -> Path:
    text_model = clip_state("cond_stage_model.transformer.text_model.")
    text_model["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(9)[None]
    stage = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    return ldm(folder, TEXT_UNET, stage, text_model)


def fake_tokens(where: object, kind: str, prompts: list[str], length: int) -> torch.Tensor:
    """Word numbers; 30 begins, 31 ends and pads, as CLIP's tokenizer does."""
    rows = [[30, *(WORDS.index(word) for word in prompt.split())] for prompt in prompts]
    return torch.tensor([(row + [31] * length)[:length] for row in rows])


def test_clip_is_causal_and_ends_with_a_norm():
    network = build({"kind": "clip_text", "args": CLIP})
    tokens = torch.tensor([[1, 2, 3, 4]])
    whole, start = network(tokens), network(tokens[:, :2])
    torch.testing.assert_close(whole[:, :2], start)
    assert whole.mean(dim=-1).abs().max() < 1e-5


def test_clip_is_transformers_clip():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=9, bos_token_id=1, eos_token_id=2, hidden_act="quick_gelu",
    )  # fmt: skip
    theirs = transformers.CLIPTextModel(config).eval()
    state = {name.removeprefix("text_model."): t for name, t in theirs.state_dict().items()}
    ours = build({"kind": "clip_text", "args": CLIP})
    ours.load_state_dict({name: t for name, t in state.items() if "position_ids" not in name})
    tokens = torch.randint(3, 40, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_ldms_encoder_is_as_described():
    """Pre-norm, all tokens see each other, heads of 64, GELU four times as wide, a norm at the end."""
    network = build({"kind": "ldm_text", "args": {"vocabulary": 40, "width": 32, "layers": 1, "length": 9}})
    state, tokens = network.state_dict(), torch.tensor([[1, 5, 2]])
    layer = {name.removeprefix("attn_layers.layers."): t for name, t in state.items()}
    h = state["token_emb.weight"][tokens] + state["pos_emb.emb.weight"][:3]
    x = F.layer_norm(h, (32,), layer["0.0.weight"], layer["0.0.bias"])
    q, k, v = (
        (x @ layer[f"0.1.to_{n}.weight"].T).reshape(1, 3, 8, 64).transpose(1, 2) for n in ("q", "k", "v")
    )
    attended = (torch.softmax(q @ k.mT / 8, dim=-1) @ v).transpose(1, 2).reshape(1, 3, 512)
    h = h + attended @ layer["0.1.to_out.weight"].T + layer["0.1.to_out.bias"]
    x = F.layer_norm(h, (32,), layer["1.0.weight"], layer["1.0.bias"])
    x = F.gelu(x @ layer["1.1.net.0.0.weight"].T + layer["1.1.net.0.0.bias"])
    h = h + x @ layer["1.1.net.2.weight"].T + layer["1.1.net.2.bias"]
    wanted = F.layer_norm(h, (32,), state["norm.weight"], state["norm.bias"])
    torch.testing.assert_close(network(tokens), wanted, atol=1e-5, rtol=1e-5)


def test_the_encoder_inside_a_checkpoint_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_tokens", fake_tokens)
    path = stable_diffusion(tmp_path / "sd")
    # Heads are the width over 64 in CompVis files: one here.
    found = encode_prompts(path, ["a lighthouse", ""])
    one_head = build({"kind": "clip_text", "args": {**CLIP, "heads": 1}})
    one_head.load_state_dict(clip_state())
    with torch.no_grad():
        wanted = one_head(fake_tokens(None, "", ["a lighthouse", ""], 9))
    torch.testing.assert_close(found, wanted)
    folder = tmp_path / "folder" / "text_encoder"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4, "hidden_act": "gelu"}))
    save_file(clip_state("text_model."), str(folder / "model.safetensors"))
    other = build({"kind": "clip_text", "args": {**CLIP, "activation": "gelu"}})
    other.load_state_dict(clip_state())
    with torch.no_grad():
        wanted = other(fake_tokens(None, "", ["at night"], 9))
    torch.testing.assert_close(encode_prompts(tmp_path / "folder", ["at night"]), wanted)


OPEN_CLIP = {"vocabulary": 40, "width": 128, "layers": 3, "heads": 2, "hidden": 192, "length": 9}


def open_clip_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    state = build({"kind": "open_clip_text", "args": OPEN_CLIP}).state_dict()
    return {name: 0.3 * torch.randn(tensor.shape) for name, tensor in state.items()}


def by_torchs_attention(state: dict[str, torch.Tensor], tokens: torch.Tensor, layers: int) -> torch.Tensor:
    """OpenCLIP's text tower of torch's own modules: heads of 64, causal, exact GELU, a norm at the end."""
    n, width = tokens.shape[1], 128
    h = state["token_embedding.weight"][tokens] + state["positional_embedding"][:n]
    mask = torch.full((n, n), float("-inf")).triu(1)
    for i in range(layers):
        part = with_prefix(state, f"transformer.resblocks.{i}.")
        attention = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        attention.load_state_dict(with_prefix(part, "attn."))
        x = F.layer_norm(h, (width,), part["ln_1.weight"], part["ln_1.bias"])
        h = h + attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        x = F.layer_norm(h, (width,), part["ln_2.weight"], part["ln_2.bias"])
        x = F.gelu(F.linear(x, part["mlp.c_fc.weight"], part["mlp.c_fc.bias"]))
        h = h + F.linear(x, part["mlp.c_proj.weight"], part["mlp.c_proj.bias"])
    return F.layer_norm(h, (width,), state["ln_final.weight"], state["ln_final.bias"])


@pytest.mark.parametrize(("layer", "layers"), [(None, 2), ("penultimate", 2), ("last", 3), ("unsaid", 3)])
def test_stable_diffusion_2_keeps_openclips_encoder(tmp_path, monkeypatch, layer, layers):
    """The last layer but one unless the configuration says another; what is not the text's is left."""
    monkeypatch.setattr(text, "_tokens", fake_tokens)
    state = open_clip_state()
    extra = {
        "text_projection": torch.zeros(128, 16),
        "logit_scale": torch.zeros(()),
        "attn_mask": torch.zeros(9, 9),
    }
    stored = {f"cond_stage_model.model.{name}": tensor for name, tensor in (state | extra).items()}
    params = {} if layer == "unsaid" else {"layer": layer}
    stage = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": params}
    path = ldm(tmp_path / "sd2", TEXT_UNET, stage, stored)
    if layer is None:
        for config in path.parent.glob("*.yaml"):
            config.unlink()
    with torch.no_grad():
        wanted = by_torchs_attention(state, fake_tokens(None, "", ["a lighthouse", ""], 9), layers)
    torch.testing.assert_close(encode_prompts(path, ["a lighthouse", ""]), wanted, atol=1e-4, rtol=1e-4)


def test_a_file_without_the_layer_that_is_not_used(tmp_path):
    """24 layers are ViT-H's; conversions from diffusers leave out the last one."""
    assert text._layers_left_out(tmp_path / "none.ckpt", 24) == 1
    assert text._layers_left_out(tmp_path / "none.ckpt", 23) == 0


def test_ldms_encoder_inside_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_tokens", fake_tokens)
    arguments = {"vocabulary": 40, "width": 24, "layers": 2, "length": 9, "heads": 2}
    encoder = build({"kind": "ldm_text", "args": arguments})
    state = {f"cond_stage_model.transformer.{name}": t for name, t in encoder.state_dict().items()}
    state["cond_stage_model.transformer.to_logits.weight"] = torch.zeros(40, 24)
    path = ldm(tmp_path / "txt", TEXT_UNET, {"target": "BERTEmbedder"}, state)
    with torch.no_grad():
        wanted = encoder(fake_tokens(None, "", ["night"], 9))
    torch.testing.assert_close(encode_prompts(path, ["night"]), wanted)


def test_what_is_missing_is_named_and_context_offered(tmp_path, monkeypatch):
    path = stable_diffusion(tmp_path / "sd")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BidmError, match=r"transformers.*`context`"):
        encode_prompts(path, ["night"])
    bare = ldm(tmp_path / "bare", TEXT_UNET, {"target": "BERTEmbedder"}, {})
    with pytest.raises(BidmError, match=r"holds no text encoder.*`text_encoder`.*`context`"):
        encode_prompts(bare, ["night"])
    with pytest.raises(BidmError, match=r"has no text encoder"):
        encode_prompts(tmp_path, ["night"])


def test_a_tokenizer_that_is_not_here(tmp_path):
    pytest.importorskip("transformers")
    path = stable_diffusion(tmp_path / "sd")
    with pytest.raises(BidmError, match=r"not on this machine.*`tokenizer`"):
        encode_prompts(path, ["night"], tmp_path / "nowhere")


def test_tokens_of_a_clip_tokenizer(tmp_path):
    """A tokenizer of letters alone: what begins and ends a text, and what fills it up."""
    pytest.importorskip("transformers")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    found = text._tokens(tmp_path, "clip_text", ["Ab c", "", "abcdefghijkl"], 7)
    assert found.tolist() == [[52, 0, 27, 28, 53, 53, 53], [52] + [53] * 6, [52, 0, 1, 2, 3, 4, 53]]
    found = text._tokens(tmp_path, "open_clip_text", ["Ab c", ""], 7)
    assert found.tolist() == [[52, 0, 27, 28, 53, 0, 0], [52, 53, 0, 0, 0, 0, 0]]


def test_prompts_on_the_command_line(tmp_path, monkeypatch, bidm):
    monkeypatch.setattr(text, "_tokens", fake_tokens)
    path = stable_diffusion(tmp_path / "sd")
    common = ("--steps", 2, "-n", 2, "--raw", "--guidance", 3)
    called = bidm("sample", path, *common, "--prompt", "a lighthouse", "--out", tmp_path / "p")
    assert called.code == 0, called.err
    embedded = encode_prompts(path, ["a lighthouse", ""]).numpy()
    np.save(tmp_path / "c.npy", embedded[0])
    np.save(tmp_path / "u.npy", embedded[1])
    files = ("--context", tmp_path / "c.npy", "--unconditional-context", tmp_path / "u.npy")
    assert bidm("sample", path, *common, *files, "--out", tmp_path / "c").code == 0
    drawn = [np.load(tmp_path / name / "samples.npy") for name in "pc"]
    assert np.array_equal(*drawn)
    called = bidm("sample", path, *common, "--prompt", "night", "--out", tmp_path / "p")
    assert called.code == 1 and "prompt" in called.err and "--overwrite" in called.err
    negative = ("--prompt", "a lighthouse", "--negative-prompt", "night")
    assert bidm("sample", path, *common, *negative, "--out", tmp_path / "n").code == 0
    assert not np.array_equal(np.load(tmp_path / "n" / "samples.npy"), drawn[0])
    called = bidm("sample", path, *files, "--prompt", "night")
    assert called.code == 2 and "exclude" in called.err


def test_training_on_a_file_of_prompts(tmp_path, monkeypatch, bidm):
    monkeypatch.setattr(text, "_tokens", fake_tokens)
    monkeypatch.chdir(tmp_path)
    path = stable_diffusion(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a lighthouse\n\nnight\n")
    (tmp_path / "quick.yaml").write_text(
        "name: quick\nlayers:\n  - {role: [stem, head, time_embedding], keep: float}\n"
        "  - {role: '*', binarize: {activation_scale: none, shortcut: none}}\n"
        "train: {steps: 1, batch_size: 1, synthetic_steps: 2}\nsampler: {steps: 2}\n"
    )
    called = bidm("compress", path, "--recipe", "quick.yaml", "--prompts", "prompts.txt", "-o", "x.bidm")
    assert called.code == 0, called.err
    called = bidm("sample", "x.bidm", "--prompt", "night", "--raw")
    assert called.code == 1 and "--text-encoder" in called.err
    options = ("--prompt", "night", "--text-encoder", path, "--guidance", 2, "--raw", "-n", 1, "--steps", 2)
    assert bidm("sample", "x.bidm", *options).code == 0
