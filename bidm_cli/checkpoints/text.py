"""Prompts to embeddings, with the text encoder that a checkpoint holds and a tokenizer from this machine.

    context = encode_prompts("sd-v1-4.ckpt", ["a lighthouse at night"])      # [1, 77, 768]

CompVis files hold the encoder's weights themselves (CLIP's in Stable Diffusion 1, OpenCLIP's in 2, LDM's own
in its text models); diffusers folders have them in ``text_encoder``. Tokenizers are only in the folders:
transformers reads them from ``tokenizer`` beside the weights, from a folder given, or from its own cache,
never the net.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.checkpoints.detect import sibling_config
from bidm_cli.checkpoints.reading.config import Section, read_section
from bidm_cli.checkpoints.reading.shapes import count
from bidm_cli.checkpoints.reading.state import load_strictly, state_dicts, with_prefix
from bidm_cli.checkpoints.reading.unpickle import existing_file, read_file
from bidm_cli.errors import BidmError

_NAMES = {
    "clip_text": (
        "embeddings.token_embedding.weight", "embeddings.position_embedding.weight",
        r"encoder\.layers\.(\d+)\..*", "encoder.layers.0.mlp.fc1.weight",
    ),
    "open_clip_text": (
        "token_embedding.weight", "positional_embedding",
        r"transformer\.resblocks\.(\d+)\..*", "transformer.resblocks.0.mlp.c_fc.weight",
    ),
    "ldm_text": (
        "token_emb.weight", "pos_emb.emb.weight",
        r"attn_layers\.layers\.(\d+)\..*", "attn_layers.layers.0.1.to_q.weight",
    ),
}  # fmt: skip
"""Names of an encoder's tables of tokens and positions, of its layers, and of a weight of the first."""
_ENOUGH = "; or give ready embeddings with `context`"
_LEFT_OUT = ("embeddings.position_ids", "to_logits.")
_NOT_TEXT = ("text_projection", "logit_scale", "logit_bias", "attn_mask", "visual.")
_CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
_FILES = ("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "pytorch_model.fp16.bin")


@torch.no_grad()
def encode_prompts(path: str | Path, prompts: Sequence[str], tokenizer: str | Path | None = None) -> Tensor:
    """Embeddings [n, L, D] of ``prompts`` as the model in ``path`` was trained to see them.

    Args:
        path: a CompVis checkpoint with its text encoder, or a diffusers folder.
        tokenizer: a folder with the tokenizer's files; None looks beside the weights, then in the cache.

    Raises:
        BidmError: no text encoder there, no transformers, or no tokenizer; the message names what is missing.
    """
    architecture, network, known = _encoder(Path(path))
    rows, length = architecture["args"]["vocabulary"], architecture["args"]["length"]
    tokens = _tokens(tokenizer or known, architecture["kind"], prompts, length)
    if int(tokens.max()) >= rows:
        raise BidmError(
            f"{tokenizer or known}: a tokenizer of more than the {rows} tokens that {path} knows; give "
            "its own with `tokenizer`"
        )
    return torch.cat([network(row[None]) for row in tokens])


def _encoder(path: Path) -> tuple[dict[str, Any], nn.Module, str | Path]:
    """(architecture, network, where its tokenizer is)."""
    if path.is_dir():
        return _from_folder(path)
    path = existing_file(path)
    stage: dict[str, Tensor] = {}
    for weights in state_dicts(read_file(path)):
        stage |= with_prefix(weights.tensors, "cond_stage_model.")
    tensors, open_clip = with_prefix(stage, "transformer."), with_prefix(stage, "model.")
    known = _CLIP_TOKENIZER
    if "token_embedding.weight" in open_clip and not tensors:
        tensors = {name: t for name, t in open_clip.items() if not name.startswith(_NOT_TEXT)}
        architecture = _architecture("open_clip_text", tensors)
        architecture["args"]["skip"] = _layers_left_out(path, architecture["args"]["layers"])
        return architecture, _loaded(architecture, tensors, path), known
    tensors = _kept(tensors, _LEFT_OUT)
    if "embeddings.token_embedding.weight" in tensors:
        architecture = _clip_architecture(tensors, Section({}, str(path)))
    elif "token_emb.weight" in tensors:
        known, architecture = "bert-base-uncased", _architecture("ldm_text", tensors)
    else:
        raise BidmError(
            f"{path} holds no text encoder that bidm knows; name a checkpoint or diffusers folder that does "
            f"with `text_encoder`{_ENOUGH}"
        )
    return architecture, _loaded(architecture, tensors, path), known


def _from_folder(root: Path) -> tuple[dict[str, Any], nn.Module, Path]:
    folder = root / "text_encoder" if (root / "text_encoder").is_dir() else root
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None or not (folder / "config.json").is_file():
        raise BidmError(
            f"{folder} has no text encoder (config.json and {_FILES[0]} or {_FILES[1]}); name one with "
            f"`text_encoder`{_ENOUGH}"
        )
    found = state_dicts(read_file(file), depth=0)
    tensors = _kept(found[0].tensors if found else {}, (*_LEFT_OUT, "text_projection"))
    if "embeddings.token_embedding.weight" not in tensors:
        raise BidmError(f"{folder} holds another text encoder than CLIP's, which bidm does not have{_ENOUGH}")
    architecture = _clip_architecture(tensors, read_section(folder / "config.json"))
    return architecture, _loaded(architecture, tensors, folder), root / "tokenizer"


def _kept(tensors: dict[str, Tensor], left_out: tuple[str, ...]) -> dict[str, Tensor]:
    tensors = with_prefix(tensors, "text_model.") or tensors
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}


def _clip_architecture(tensors: dict[str, Tensor], config: Section) -> dict[str, Any]:
    architecture = _architecture("clip_text", tensors)
    arguments = architecture["args"]
    arguments["heads"] = config.integer("num_attention_heads", arguments["heads"])
    arguments["activation"] = config.text("hidden_act", "quick_gelu")
    return architecture


def _architecture(kind: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Architecture by the weights' names and shapes; heads are 64 channels wide."""
    table, positions, layers, first_layer = _NAMES[kind]
    rows, width = tensors[table].shape
    arguments = {
        "vocabulary": rows,
        "width": width,
        "layers": count(tensors, layers),
        "length": len(tensors.get(positions, torch.empty(77))),
    }
    first = tensors.get(first_layer)
    if kind == "ldm_text":
        heads = 8 if first is None else first.shape[0] // 64
        return {"kind": kind, "args": arguments | {"layers": arguments["layers"] // 2, "heads": heads}}
    hidden = 4 * width if first is None else first.shape[0]
    return {"kind": kind, "args": arguments | {"heads": max(1, width // 64), "hidden": hidden}}


def _layers_left_out(path: Path, layers: int) -> int:
    """Number of OpenCLIP's last layers that the model does without.

    The configuration beside the file says it as "last" or "penultimate"; without one it is Stable Diffusion
    2's, penultimate. Files converted from diffusers folders come without the last of ViT-H's 24 layers.
    """
    config = sibling_config(path, "ldm", [])
    layer = "last" if layers == 23 else ""
    if config is not None:
        params = config.root.section("model").section("params").section("cond_stage_config")
        # The original's own default, where a configuration names the encoder and no layer.
        layer = layer or params.section("params").text("layer", "last" if "target" in params else "")
    return 0 if layer == "last" or layers < 2 else 1


def _loaded(architecture: dict[str, Any], tensors: dict[str, Tensor], where: Path) -> nn.Module:
    try:
        network = load_strictly(
            architecture, tensors, "text encoder", origin="inferred from names and shapes"
        )
    except BidmError as error:
        raise BidmError(f"{where}: {error}{_ENOUGH}") from error
    return network.eval().requires_grad_(False)


def _tokens(where: str | Path, kind: str, prompts: Sequence[str], length: int) -> Tensor:
    """Token numbers [n, length], padded as the encoder was trained."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise BidmError(
            f"prompts need the transformers library for their tokenizer: pip install transformers{_ENOUGH}"
        ) from error
    name = "BertTokenizerFast" if kind == "ldm_text" else "CLIPTokenizer"
    try:
        tokenizer = getattr(transformers, name).from_pretrained(str(where), local_files_only=True)
        found = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
    except Exception as error:  # transformers raises what its parts raise, by version
        raise BidmError(
            f"the tokenizer {where} is not on this machine; give the folder with its files with `tokenizer`"
            f"{_ENOUGH}"
        ) from error
    # OpenCLIP fills texts up with 0, CLIP's tokenizer with the token that ends them.
    return found["input_ids"] * found["attention_mask"] if kind == "open_clip_text" else found["input_ids"]
