"""Centroids of routing attention: their start, their movement over micro-batches and ranks, reseeding, saving."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from learned_cases import attention_inputs, cosine, draw, layer_spec, normalised, rms_ratio
from learned_cases import build_routing as build
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sa_hf
from sa_hf.layer import AttentionInputs
from sa_hf.ops.sequences import Sequences
from sa_hf.patterns.centroids import update_centroids
from sa_hf.patterns.routing import RoutingAttention, RoutingAttentionConfig


def test_start_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = build(), build(), build(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)
    assert abs(float(first.centroids.norm(dim=-1).mean()) - 4.0) < 0.01  # sqrt(head_dim), as the vectors
    layer = RoutingAttentionConfig(num_clusters=4).build(layer_spec(layer=1))
    assert not torch.equal(first.centroids, layer.centroids)


def _train(module: RoutingAttention, inputs: AttentionInputs) -> None:
    module.train()
    module.advance_step()
    module(inputs)


def test_running_mean_moves_once_per_update_over_all_micro_batches() -> None:
    module = build(2, 1, decay=0.9)
    module.initialized.fill_(True)
    before = module.centroids.clone()
    calls = [attention_inputs(2, 2, 1, 20, seed=s) for s in (0, 50)]
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    calls[1].sequences = Sequences.from_mask(2, 20, 20, mask)
    for call in calls:
        _train(module, call)
        if call is calls[0]:
            module(call)  # a recomputation: counted once
    assert torch.equal(module.centroids, before)
    module.update_centroids()
    sums, counts = torch.zeros(4, 16, dtype=torch.float64), torch.zeros(4)
    for call, real in zip(calls, ([20, 20], [20, 12]), strict=True):
        for b, n in enumerate(real):
            for vectors in (call.query[b, 0], call.query[b, 1], call.key[b, 0]):
                x = normalised(vectors[:n].detach().double())
                for vector, c in zip(x, cosine(vectors[:n].double(), before[0].double()).argmax(-1), strict=True):
                    sums[c] += vector
                    counts[c] += 1
    assert bool((counts > 0).all())
    expected = 0.9 * before[0].double() + 0.1 * sums / counts[:, None]
    assert rms_ratio(module.centroids[0], expected) < 1e-6
    after = module.centroids.clone()
    module.update_centroids()
    module.eval()(calls[0])
    module.update_centroids()
    assert torch.equal(module.centroids, after)  # nothing gathered: nothing moves


def planted(seed: int, centres: Tensor, n: int = 64) -> AttentionInputs:
    """Queries and keys near the planted centres."""
    inputs = attention_inputs(2, 1, length=n, seed=seed)
    which = torch.randint(len(centres), (2, 2, n), generator=torch.Generator().manual_seed(seed))
    inputs.query = centres[which[0]][:, None] + 0.3 * inputs.query.detach()
    inputs.key = centres[which[1]][:, None] + 0.3 * inputs.key.detach()
    return inputs


def test_centroids_converge_on_planted_clusters() -> None:
    centres = 3 * draw(4, 16, seed=77)
    module = build(1, decay=0.8)
    for step in range(30):
        _train(module, planted(100 * step, centres))
        module.update_centroids()
    closeness = cosine(centres, module.centroids[0])
    assert sorted(closeness.argmax(-1).tolist()) == [0, 1, 2, 3]
    assert float(closeness.amax(-1).min()) > 0.99
    assert bool(module.initialized)
    assert module.figures()["cluster_entropy"] > 1.3  # log 4 = 1.386


def test_empty_clusters_stay_and_are_reseeded() -> None:
    module = build(1, decay=0.5, reseed_after=3)
    module.initialized.fill_(True)
    centres = 3 * draw(4, 16, seed=77)
    with torch.no_grad():
        module.centroids[0, :3] = centres[0]  # 1 and 2 lose every tie to 0; 3 stands opposite to all
        module.centroids[0, 3] = -centres.mean(0)
    kept = module.centroids[0, 3].clone()
    for step in range(2):
        _train(module, planted(step, centres[:1]))
        module.update_centroids()
        assert torch.equal(module.centroids[0, 3], kept)
    assert module.empty_steps[0].tolist() == [0, 2, 2, 2]
    _train(module, planted(2, centres[:1]))
    module.update_centroids()
    assert module.empty_steps[0].tolist() == [0, 0, 0, 0]
    assert float(cosine(centres[:1], module.centroids[0])[0, 3]) > 0.9


@pytest.mark.parametrize("coefficient", [0.0, 0.25])
@pytest.mark.parametrize("causal", [False, True])
def test_evaluation_leaves_no_figures_of_the_training_before(causal: bool, coefficient: float) -> None:
    module, fresh = (build(2, causal=causal, commitment_coef=coefficient) for _ in range(2))
    _train(module, attention_inputs(seed=0, causal=causal))
    assert module.unscaled_losses().keys() == {"routing_commitment"}
    inputs = attention_inputs(seed=50, causal=causal)
    for one in (module, fresh):
        one.eval()(inputs)
    assert module.unscaled_losses() == fresh.unscaled_losses()
    assert module.figures() == fresh.figures()
    assert bool(module.unscaled_losses()) is (coefficient > 0)
    assert bool(module.figures()) is (causal or coefficient > 0)


def test_commitment_loss_and_its_gradient() -> None:
    module = build(2, 1, commitment_coef=0.25).train()
    inputs = attention_inputs(1, 2, 1, 18)
    mask = torch.ones(1, 18, dtype=torch.long)
    mask[0, :4] = 0
    inputs.sequences = Sequences.from_mask(1, 18, 18, mask)
    module(inputs)
    loss = module.aux_losses()["routing_commitment"]
    leaves = [inputs.query, inputs.key]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    terms = []
    for x in (exact[0][0, 0, 4:], exact[0][0, 1, 4:], exact[1][0, 0, 4:]):
        mu = module.centroids[0].double()
        terms.append((normalised(x) - mu[cosine(x, mu).argmax(-1)]).square().mean())
    expected = 0.25 * sum(terms) / 3
    assert math.isclose(float(loss.detach()), float(expected.detach()), rel_tol=1e-5)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact), strict=True):
        assert rms_ratio(a, b) < 1e-5


def test_state_is_saved_and_evaluation_equals_training_outputs() -> None:
    module = build(2, causal=True)
    inputs = attention_inputs(length=40, causal=True)
    for _ in range(2):
        _train(module, inputs)
        module.update_centroids()
    trained = module(inputs)
    assert torch.equal(trained, module.eval()(inputs))
    other = build(2, causal=True).eval()
    other.load_state_dict(module.state_dict())
    assert sorted(module.state_dict()) == ["centroids", "empty_steps", "initialized", "step"]
    assert torch.equal(other(inputs), trained)
    assert not other._needs_kmeans()
    assert list(module.parameters()) == []


def test_checkpointing_gathers_once() -> None:
    inputs = attention_inputs(length=30, causal=True)
    modules = [build(2, causal=True, commitment_coef=0.1).train() for _ in range(2)]
    grads = []
    for module, checkpointed in zip(modules, (False, True), strict=True):
        module.initialized.fill_(True)
        module.advance_step()

        def layer(query: Tensor, module: RoutingAttention = module) -> Tensor:
            call = copy.copy(inputs)
            call.query = query
            return module(call)

        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(layer, inputs.query, use_reentrant=False)
        else:
            out = layer(inputs.query)
        loss = out.square().sum() + module.aux_losses()["routing_commitment"]
        module.drop_graph()
        grads.append(torch.autograd.grad(loss, inputs.query)[0])
        module.update_centroids()
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(modules[0].centroids, modules[1].centroids)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layers = [RoutingAttentionConfig(num_clusters=4, decay=0.9).build(layer_spec(layer=i)) for i in range(2)]
    for step in range(3):
        for layer in layers:
            _train(layer, attention_inputs(length=24, seed=10 * step + 1000 * rank))
        update_centroids(layers)
    torch.save({"centroids": [layer.centroids for layer in layers]}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_ranks_hold_equal_centroids(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True)["centroids"] for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # Rank 0 alone, k-means included, then the mean over both ranks: not what rank 0 would have reached by itself.
    alone = RoutingAttentionConfig(num_clusters=4, decay=0.9).build(layer_spec())
    for step in range(3):
        _train(alone, attention_inputs(length=24, seed=10 * step))
        alone.update_centroids()
    assert not torch.equal(alone.centroids, first[0])


def test_what_is_gathered_takes_bounded_memory() -> None:
    kept, summed = build(2, decay=0.9), build(2, decay=0.9)
    for module in (kept, summed):
        module.initialized.fill_(True)
    calls = [attention_inputs(length=20, seed=10 * s) for s in range(6)]
    for call in calls:
        _train(kept, call)
        held = [x for x in (kept._latest, kept._earlier) if x is not None]
        assert all(x.sums.shape == kept.centroids.shape for x in held)
    kept.update_centroids()
    batch = attention_inputs(12, length=20)
    batch.query, batch.key = (torch.cat([getattr(c, name) for c in calls]) for name in ("query", "key"))
    _train(summed, batch)
    summed.update_centroids()
    assert rms_ratio(kept.centroids, summed.centroids) < 1e-6


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize("pattern", ["routing", {"heads": {"0-1": "sliding_window", "2-": "routing"}}], ids=str)
def test_a_plain_loop_moves_them_with_each_step(pattern: object) -> None:
    """By hand: micro-batches of one step count together, a step that trains another model moves nothing."""
    model = sa_hf.patch_model(small_llama(), pattern).train()
    other = sa_hf.patch_model(small_llama(), pattern).train()
    ids = torch.randint(1, 32, (2, 24), generator=torch.Generator().manual_seed(1))
    routed = [m for m in model.modules() if isinstance(m, RoutingAttention)]
    assert len(routed) == 2
    optimizer, elsewhere = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    seen = [m.centroids.clone() for m in routed]

    def moved() -> list[bool]:
        now = [m.centroids.clone() for m in routed]
        changed = [not torch.equal(a, b) for a, b in zip(seen, now, strict=True)]
        seen[:] = now
        return changed

    for step in range(2):
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
        other(ids, labels=ids).loss.backward()
        elsewhere.step()
        assert moved() == [False, False]
        optimizer.step()
        assert moved() == [True, True]
        assert all(bool(m.initialized) and int(m.step) == 2 * step + 2 for m in routed)
    assert routed[0]._gathered() is None
    copied = copy.deepcopy(model)
    copied(ids, labels=ids).loss.backward()
    torch.optim.SGD(copied.parameters(), lr=0.1).step()
    assert moved() == [False, False]
    assert not torch.equal(next(m for m in copied.modules() if isinstance(m, RoutingAttention)).centroids, seen[0])


def test_two_forwards_and_one_backward_count_each_once() -> None:
    """Under gradient checkpointing the first of them is recomputed after the second."""
    moved = []
    for checkpointing in (False, True):
        model = sa_hf.patch_model(small_llama(), "routing", decay=0.5).train()
        routed = [m for m in model.modules() if isinstance(m, RoutingAttention)]
        for layer in routed:
            layer.initialized.fill_(True)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        losses = []
        for seed in (1, 2):
            ids = torch.randint(1, 32, (2, 24), generator=torch.Generator().manual_seed(seed))
            losses.append(model(ids, labels=ids, use_cache=False).loss)
        torch.stack(losses).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        moved.append([layer.centroids for layer in routed])
    for plain, checkpointed in zip(*moved, strict=True):
        torch.testing.assert_close(checkpointed, plain)
