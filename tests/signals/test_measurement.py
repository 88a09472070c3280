from __future__ import annotations

from pathlib import Path

import pytest
from transformers import ViTConfig, ViTModel

from compress import checkpoint
from compress.errors import BadInput
from compress.signals import load_float32


def test_a_model_that_reads_no_text_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    ViTModel(ViTConfig(num_hidden_layers=2, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="does not read, got a model of pixel_values"):
        load_float32(checkpoint.open(tmp_path))
