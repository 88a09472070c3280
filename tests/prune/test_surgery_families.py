"""Blocks removed from the files, against blocks removed from the model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress import checkpoint as room
from compress.checkpoint import Checkpoint
from compress.prune import cut_config, output_without, remove_blocks
from compress.signals import find_blocks

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "smollm3",
    "llama4_text",
    "deepseek_v3",
    "lfm2_moe",
    "afmoe",
)
REMOVED = (1, 4)


def cut_in_memory(model: Any, removed: tuple[int, ...]) -> Any:
    """Shorten the model's own list of blocks and renumber what is left."""
    stack = find_blocks(model)
    keep = [i for i in range(len(stack)) if i not in removed]
    blocks = [stack[i] for i in keep]
    config = AutoConfig.for_model(**cut_config(model.config.to_dict(), keep))
    config._attn_implementation = model.config._attn_implementation
    for part in model.modules():
        for name, child in list(part._modules.items()):
            if child is stack:
                setattr(part, name, torch.nn.ModuleList(blocks))
        if hasattr(part, "config"):
            part.config = config
    for index, block in enumerate(blocks):
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = index
    return model


def integers(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.int32).flatten().tolist()


def reload(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def bytes_of(checkpoint: Checkpoint, name: str) -> bytes:
    return b"".join(map(bytes, checkpoint.chunks(name)))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_files_are_the_pruned_model(
    family: str, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family(family, tmp_path / "model")
    original = room.open(tmp_path / "model")
    tokens = torch.arange(40)[None] * 7 % 97
    whole = model(tokens, use_cache=False).logits

    pruned, renamed, removed = remove_blocks(original, REMOVED, tmp_path / "pruned")

    reloaded = reload(tmp_path / "pruned")
    with torch.no_grad():
        skipped = output_without(model, tokens[0], frozenset(("block", i) for i in REMOVED))
        logits = reloaded(tokens, use_cache=False).logits
        assert integers(output_without(reloaded, tokens[0], frozenset())) == integers(skipped)
        assert integers(cut_in_memory(model, REMOVED)(tokens, use_cache=False).logits) == integers(
            logits
        )
    assert not torch.equal(logits, whole)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (
        reloaded.generate(tokens[:, :12], use_cache=cache, **options) for cache in (True, False)
    )
    assert cached.tolist() == uncached.tolist()

    before, after = original.tensor_infos(), pruned.tensor_infos()
    assert set(before) == {renamed.get(name, name) for name in after} | set(removed)
    assert len(before) == len(after) + len(removed)
    for name in after:
        assert bytes_of(pruned, name) == bytes_of(original, renamed.get(name, name))


def test_shards_shrink_or_vanish_and_the_index_follows(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("llama", tmp_path / "model")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    original = room.open(tmp_path / "sharded")
    pruned, _, removed = remove_blocks(original, (1, 2, 3), tmp_path / "pruned")
    emptied = {
        file
        for file in original.files
        if all(
            name in removed for name, info in original.tensor_infos().items() if info.file == file
        )
    }
    assert emptied
    assert set(pruned.files) == set(original.files) - emptied
    assert reload(tmp_path / "pruned").config.num_hidden_layers == 3


def test_an_interrupted_removal_goes_on(
    make_family: Callable[..., Any],
    tmp_path: Path,
    die_at: Callable[..., bool],
    contents: Callable[[Path], dict[str, bytes]],
) -> None:
    make_family("llama", tmp_path / "model").save_pretrained(
        tmp_path / "sharded", max_shard_size="60KB"
    )
    original = room.open(tmp_path / "sharded")
    remove_blocks(original, (2,), tmp_path / "whole")
    assert die_at(lambda: remove_blocks(original, (2,), tmp_path / "resumed"), 25)
    remove_blocks(original, (2,), tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
