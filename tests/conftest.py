"""Tiny random models with a tokenizer, sudden death, and the command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before anything imports torch: no network, and two workers do not fight over two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def save_llama(directory: Path, seed: int = 0, shard: str = "1GB", **options: Any) -> Path:
    """A random bf16 Llama of six blocks with a byte-level tokenizer, saved by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **options})).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=shard)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """Byte-level: one token a byte, and a few special ones after them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: token for token, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-file model with an untied head. Read-only: all tests share it."""
    return save_llama(tmp_path_factory.mktemp("models") / "tiny", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_llama_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head is the embedding and is not stored. Read-only."""
    return save_llama(tmp_path_factory.mktemp("models") / "tied", 1, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_llama_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `tiny_llama` in several files with an index. Read-only."""
    directory = tmp_path_factory.mktemp("models") / "sharded"
    return save_llama(directory, shard="100KB", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """`save_llama`, for a model of one's own."""
    return save_llama


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a directory, by relative path."""

    def read(directory: Path) -> dict[str, bytes]:
        files = (path for path in directory.rglob("*") if path.is_file())
        return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}

    return read


@pytest.fixture(scope="session")
def die_at() -> Callable[[Callable[[], object], int], bool]:
    """Run something in a forked process that dies, as by kill -9, at its n-th touch of a file.

    Returns whether it died; False means it had ended before.
    """
    touches = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}

    def run(work: Callable[[], object], n: int) -> bool:
        if (child := os.fork()) == 0:
            left = n

            def count(event: str, args: object) -> None:
                nonlocal left
                left -= event in touches
                if left < 0:
                    os._exit(137)

            sys.addaudithook(count)
            try:
                work()
            except BaseException:
                traceback.print_exc()  # pytest shows it with the failure
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 137)
        return status == 137

    return run


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python cli.py ARGS` from the root of the repository."""

    def run(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "cli.py", *map(str, args)]
        options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, **options}
        return subprocess.run(command, check=False, **options)

    return run
