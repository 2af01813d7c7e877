"""lm-eval's HFLM on patched models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from used_inside import checks

pytest.importorskip("lm_eval")
from hf_cases import tiny_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from words import word_tokenizer

import sa_hf

pytestmark = pytest.mark.filterwarnings("ignore")
WINDOW = sa_hf.SlidingWindowAttentionConfig(window=3)
EXPIRING = sa_hf.ExpireSpanAttentionConfig(max_span=12, ramp=4, initial_span=6)
PAIRS = (
    (" ".join(f"w{i}" for i in range(3, 23)), " w30 w31 w32"),
    ("w40 w41 w42 w43", " w44 w45 w46 w47 w48"),
    (" ".join(f"w{i}" for i in range(50, 62)), " w9"),
)


def harness(model: Any, **options: Any) -> Any:
    tokenizer = word_tokenizer(eos_token="</s>", model_max_length=64)
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", **{"batch_size": 3, "max_length": 64, **options})


def asked(kind: str, arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(arguments)]


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@torch.no_grad()
def own_loglikelihood(model: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation, from one forward of the pair alone."""
    before, after = ids(context), ids(continuation)
    scores = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(after)
    return float(scores.gather(1, wanted[:, None]).sum()), bool((scores.argmax(-1) == wanted).all())


@pytest.mark.parametrize("pattern", [WINDOW, EXPIRING], ids=lambda c: c.name)
@checks(
    "lm-eval", "HFLM: loglikelihood of a padded batch equals the model's own, pair by pair, and is not the dense one"
)
def test_loglikelihood(pattern: Any) -> None:
    model = tiny_model("llama")
    dense = [own_loglikelihood(model, *pair)[0] for pair in PAIRS]
    sa_hf.patch_model(model, pattern)
    found = harness(model).loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    for pair, (value, greedy), other in zip(PAIRS, found, dense, strict=True):
        own, own_greedy = own_loglikelihood(model, *pair)
        assert value == pytest.approx(own, rel=1e-4)
        assert greedy == own_greedy
        assert abs(value - other) > 1e-2


@checks("lm-eval", "HFLM by the name of a sparse folder (trust_remote_code=True): the same loglikelihoods")
def test_a_folder_by_its_name(tmp_path: Path) -> None:
    model = sa_hf.patch_model(tiny_model("llama"), EXPIRING)
    model.save_pretrained(tmp_path / "sparse")
    word_tokenizer(eos_token="</s>").save_pretrained(tmp_path / "sparse")
    lm = HFLM(
        pretrained=str(tmp_path / "sparse"), device="cpu", dtype="float32", batch_size=1, max_length=64,
        trust_remote_code=True,
    )  # fmt: skip
    found = lm.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    for pair, (value, _) in zip(PAIRS, found, strict=True):
        assert value == pytest.approx(own_loglikelihood(model, *pair)[0], rel=1e-4)


@checks("lm-eval", "HFLM: generate_until of a left-padded batch gives each row's own greedy continuation")
def test_generate_until() -> None:
    model = sa_hf.patch_model(tiny_model("llama"), WINDOW)
    lm = harness(model)
    contexts = [context for context, _ in PAIRS]
    options = {"until": ["</s>"], "max_gen_toks": 6, "do_sample": False}
    found = lm.generate_until(asked("generate_until", tuple((c, options) for c in contexts)), disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        given = torch.tensor([ids(context)])
        whole = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=6, do_sample=False, eos_token_id=1,
            pad_token_id=0,
        )  # fmt: skip
        own = lm.tok_decode(whole[0, given.shape[1] :].tolist()).split("</s>")[0]
        assert text.split() == own.split()
        assert own.strip()


def test_the_words_ids_are_their_numbers() -> None:
    assert isinstance(word_tokenizer(), tf.PreTrainedTokenizerFast)
    assert word_tokenizer()("w3 w98").input_ids == ids("w3 w98")
