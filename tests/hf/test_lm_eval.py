"""lm-eval's own `--model hf` evaluates a coded checkpoint as it does the dense one."""

from __future__ import annotations

import pytest
import tokenizers
import transformers

TEXTS = [("a b c", " d e"), ("b b", " a"), ("", "e d c b a")]


@pytest.fixture
def tokenizer():
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", *"abcdefgh"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>"
    )


def test_log_likelihoods_are_the_same(llama, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    requests = [
        Instance("loglikelihood", {}, arguments, index) for index, arguments in enumerate(TEXTS)
    ]
    results = []
    for directory in llama:
        tokenizer.save_pretrained(directory)
        model = HFLM(pretrained=str(directory), device="cpu", batch_size=1)
        results.append(model.loglikelihood(requests, disable_tqdm=True))
    assert results[0] == results[1]
    assert len({value for value, _ in results[0]}) == len(TEXTS)
