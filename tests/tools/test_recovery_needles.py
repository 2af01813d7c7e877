"""What scripts/recovery.py measures by itself: lines found in a text, and the pairs that layers read."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import sa_hf
from sa_hf.tools.recovery import decoder, encoder, grid
from sa_hf.tools.recovery.decoder import loss_of
from sa_hf.tools.recovery.density import densities, pairs_read
from sa_hf.tools.recovery.needles import DEPTHS, KEY, LINE, NAMES, NUMBERS, Needles, Retrieval

NEEDLES = Needles(50)
TEXT = list(range(50)) * 20

# -- retrieval -------------------------------------------------------------------------------------------------------


class Copier(nn.Module):
    """Continues each two tokens with what followed their last occurrence; ``off`` shifts that answer by one."""

    def __init__(self, vocab_size: int, off: int = 0) -> None:
        super().__init__()
        self.vocab_size, self.off = vocab_size, off
        self.anything = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for at in range(1, len(ids)):
                # Two lines may share a number, so that one token does not say which is meant.
                before = [i for i in range(1, at) if ids[i - 1 : i + 1] == ids[at - 1 : at + 1]]
                guess = ids[before[-1] + 1] + self.off if before else 0
                logits[row, at, guess % self.vocab_size] = 1.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


@pytest.mark.parametrize("lines", [1, 5])
def test_a_model_that_copies_answers_all_and_one_that_is_off_by_one_none(lines: int) -> None:
    task = Retrieval(lines, (64, 96), each=3)
    right = task.hits(Copier(NEEDLES.vocab_size), NEEDLES, TEXT)
    assert right == [True] * (2 * len(DEPTHS) * 3)
    assert task.hits(Copier(NEEDLES.vocab_size, off=1), NEEDLES, TEXT) == [False] * len(right)


def test_a_prompt_has_its_line_at_its_depth_and_ends_with_the_question() -> None:
    for depth in DEPTHS:
        prompt, key = NEEDLES.prompt(TEXT, 80, depth, 4, random.Random(3))
        assert len(prompt) == 80
        assert prompt[-2] == NEEDLES.first
        asked = prompt[-2:]
        places = [i for i in range(len(prompt) - 2) if prompt[i : i + 2] == asked]
        assert len(places) == 1
        assert prompt[places[0] + 2 : places[0] + LINE] == key
        own_text = [t for t in prompt[: places[0]] if t < NEEDLES.first]
        assert len(own_text) == round(depth * (80 - 4 * LINE - 2))
        assert [t for t in prompt if t < NEEDLES.first] == TEXT[: 80 - 4 * LINE - 2]


def test_a_training_row_has_each_line_twice_in_whole_text() -> None:
    for seed in range(20):
        row = NEEDLES.row(TEXT, 100, 6, random.Random(seed))
        assert len(row) == 100
        starts = [i for i, token in enumerate(row) if token == NEEDLES.first]
        told = sorted(tuple(row[i : i + LINE]) for i in starts)
        assert len(told) == 12
        assert told[::2] == told[1::2]
        assert len({line[1] for line in told}) == 6
        assert [t for t in row if t < NEEDLES.first] == TEXT[: 100 - 12 * LINE]
        again = NEEDLES.repeated(row)
        assert len(again) == 6 * KEY
        assert all(row[: at - 2].count(row[at]) >= 1 for at in again)
    assert NEEDLES.vocab_size == 50 + 1 + NAMES + KEY * NUMBERS


def test_the_copied_share_counts_what_stands_a_second_time() -> None:
    torch.manual_seed(0)
    row = NEEDLES.row([], 2 * LINE * 3, 3, random.Random(0))
    ids = torch.tensor([row])

    class Knows(nn.Module):
        def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
            self.labels = labels
            logits = nn.functional.one_hot(input_ids.roll(-1, 1), NEEDLES.vocab_size).float()
            logits[0, NEEDLES.repeated(row)[0] - 1] = 0.0
            return SimpleNamespace(logits=logits, loss=logits.sum())

    model = Knows()
    _, share = loss_of(model, ids, NEEDLES, copies_alone=True)
    assert share == pytest.approx(1 - 1 / (3 * KEY))
    assert torch.nonzero(model.labels[0] >= 0).flatten().tolist() == NEEDLES.repeated(row)


# -- density ---------------------------------------------------------------------------------------------------------


def llama(length: int) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=length,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    [
        sa_hf.SlidingWindowAttentionConfig(window=9, num_sink_tokens=2),
        sa_hf.BigBirdAttentionConfig(block_size=8, num_random_blocks=1),
        sa_hf.LogSparseAttentionConfig(local_window=3),
        sa_hf.SparseBertAttentionConfig(mask_length=17),
        {"heads": {"0-1": "dense", "2-": sa_hf.SlidingWindowAttentionConfig(window=5)}},
        {"1": sa_hf.StarAttentionConfig(ring=False)},
    ],
    ids=lambda p: getattr(p, "name", "mixture"),
)
def test_pairs_counted_where_they_are_read_are_those_of_the_summary(pattern: Any) -> None:
    model = sa_hf.patch_model(llama(70), pattern)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 3000  # so that most weights of pairs that are read underflow to 0
    ids = torch.randint(0, 60, (1, 70), generator=torch.Generator().manual_seed(1))
    read = pairs_read(model, ids)
    layers = sa_hf.summary(model, 70).layers
    assert read
    for index, share in read.items():
        assert share == pytest.approx(layers[index].density)
    assert densities(model, ids) == pytest.approx([layer.density for layer in layers])
    assert densities(llama(70), ids) == [1.0] * 3


def test_densities_of_what_is_chosen_by_content() -> None:
    ids = torch.randint(0, 60, (1, 64), generator=torch.Generator().manual_seed(1))
    chosen = sa_hf.BlockTopKAttentionConfig(
        block_size=8, top_k=2, num_window_blocks=1, num_sink_blocks=1, selection="query"
    )
    model = sa_hf.patch_model(llama(64), chosen)
    rows = torch.arange(64)
    blocks = torch.minimum(rows // 8, torch.tensor(3))  # others that it reads: sink and two chosen
    expected = float((blocks * 8 + rows % 8 + 1).sum()) / (64 * 65 / 2)
    assert densities(model, ids) == pytest.approx([expected] * 3)
    with_indexer = sa_hf.patch_model(llama(64), replace(chosen, indexer=True))
    assert densities(with_indexer, ids) == pytest.approx([expected] * 3)
    spans = sa_hf.ExpireSpanAttentionConfig(max_span=64, ramp=1, initial_span=10.5)
    model = sa_hf.patch_model(llama(64), spans)
    assert densities(model, ids) == pytest.approx([sum(min(i + 1, 12) for i in range(64)) / (64 * 65 / 2)] * 3)


def with_heads(part: str, layers: int) -> tuple[Any, int]:
    """A model with the heads and the length of a part of the grid, else tiny."""
    length, heads = (1024, 8) if part == "decoder" else (768, 12)
    sizes = {
        "vocab_size": 9, "hidden_size": 16 * heads, "intermediate_size": 8, "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": length,
    }  # fmt: skip
    if part == "decoder":
        return transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_key_value_heads=4)).eval(), length
    return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False).eval(), length


@pytest.mark.parametrize("part", grid.PARTS)
def test_every_pattern_of_the_grid_keeps_a_quarter_at_most(part: grid.Part) -> None:
    models = {layers: with_heads(part, layers) for layers in (1, 6)}
    systems = set()
    for name, assigned in grid.PATTERNS[part].items():
        if name == grid.DENSE:
            continue
        by_layers = isinstance(assigned, dict) and "heads" not in assigned
        model, length = models[6 if by_layers else 1]
        sa_hf.patch_model(model, assigned)
        found = densities(model, torch.randint(0, 9, (1, length), generator=torch.Generator().manual_seed(0)))
        assert 0 < sum(found) / len(found) <= grid.MAX_DENSITY, (name, found)
        systems.add(name.partition(",")[0])
    assert systems | set(grid.NOT_SERVED[part]) >= set(grid.SYSTEMS)
    assert length == (decoder.Sizes() if part == "decoder" else encoder.Sizes()).length
