"""lm-eval's model type for images and text, over the one that reads text."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.hf_vlms import HFMultimodalLM

from compress.evaluate.lm import EntropressLM
from compress.evaluate.processor import load_processor


class EntropressVLM(EntropressLM, HFMultimodalLM):
    """A model that sees, coded or not, pruned or not, for requests to generate with images.

    Requests of text alone are answered as by `EntropressLM`, and so are options taken. Raises
    `BadInput` also where a prompt with its images does not fit into the model, since cutting it
    would part images from their tokens, and as `load_processor`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # lm-eval's guess by the config is the wrong one of two tokens for Gemma 3.
        if token := getattr(self.processor, "image_token", None):
            self.image_token = token

    def _create_tokenizer(self, *args: Any, **options: Any) -> None:
        self.processor = load_processor(self.source.path)
        self.tokenizer = self.processor.tokenizer

    def tok_batch_multimodal_encode(
        self,
        strings: list[str],
        images: list[list[Any]],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        found = super().tok_batch_multimodal_encode(strings, images, padding_side, None, truncation)
        length = found["input_ids"].shape[1]
        if left_truncate_len and length > left_truncate_len:
            answer = self.max_length - left_truncate_len
            raise self._misfit("a prompt with images", f"{length} tokens and {answer} to generate")
        return found

    def _model_multimodal_generate(
        self, inputs: Any, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        return super()._model_multimodal_generate(
            inputs, max_length, stop, logits_processor=[self._check_step], **options
        )
