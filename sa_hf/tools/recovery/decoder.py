"""The decoder: a small Llama that this script trains dense, and what is measured of it."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sa_hf import patch_model, unpatch_model
from sa_hf.errors import SparseAttentionError
from sa_hf.patterns import SlidingWindowAttentionConfig
from sa_hf.tasks.synthetic import IGNORED
from sa_hf.tools.recovery.needles import LINE, Needles, Retrieval
from sa_hf.tools.recovery.texts import corpus_digest, sources_of, trained_tokenizer

LN2 = math.log(2)


@dataclass(frozen=True)
class Stage:
    """``steps`` steps of the base's training on ``rows`` rows of ``length`` tokens with ``lines`` lines each.

    Without text (``lines`` fill the row) the loss is that of what can be copied alone, and half the heads of the first
    two layers read two tokens, their own and the one before: found so, copying stays when they read all.
    """

    length: int
    rows: int
    lines: int
    steps: int
    rate: float

    @property
    def copies_alone(self) -> bool:
        return 2 * LINE * self.lines == self.length


@dataclass(frozen=True)
class Sizes:
    """The model, its training, and how much is measured."""

    vocab_size: int = 1024
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    key_heads: int = 4
    inner: int = 704
    length: int = 1024
    # Short rows of nothing but lines first: copying from earlier in the row forms there within minutes, and lengthens.
    stages: tuple[Stage, ...] = (
        Stage(16, 128, 2, 200, 2e-3),
        Stage(32, 64, 4, 200, 2e-3),
        Stage(64, 32, 8, 200, 2e-3),
        Stage(256, 16, 8, 150, 2e-3),
        Stage(512, 8, 12, 150, 2e-3),
        Stage(1024, 4, 16, 600, 1e-3),
    )
    batch: int = 4
    lines: int = 12  # of a row of the training that follows
    chunks: int = 64
    retrieval_lengths: tuple[int, ...] = (256, 512, 1024)
    each: int = 34
    needles: int = 8


QUICK = Sizes(
    vocab_size=300, hidden=32, layers=2, heads=4, key_heads=2, inner=64, length=128,
    stages=(Stage(32, 4, 4, 2, 1e-3), Stage(128, 2, 2, 2, 1e-3)), batch=2, lines=2, chunks=2,
    retrieval_lengths=(64, 128), each=1, needles=2,
)  # fmt: skip


@dataclass
class Decoder:
    """The base, and the tokens of the splits.

    Args:
        folder: where the tokenizer and the weights are kept.
    """

    folder: Path
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        self.tokenizer = trained_tokenizer(self.sizes.vocab_size, self.folder / "tokenizer.json")
        self.needles = Needles(self.tokenizer.get_vocab_size())
        self._tokens: dict[str, list[int]] = {}

    def tokens(self, split: str) -> list[int]:
        """The files of a split one after the other."""
        if split not in self._tokens:
            texts = [source.text for source in sources_of(split)]
            self._tokens[split] = [i for found in self.tokenizer.encode_batch(texts) for i in found.ids]
        return self._tokens[split]

    def rows(self, length: int, count: int, lines: int, seed: str) -> Iterator[Tensor]:
        """Batches of training rows without end, int64 ``[count, length]``; batch ``i`` hangs on ``(seed, i)`` alone."""
        text, at = self.tokens("train"), 0
        while True:
            rng = random.Random(f"{seed} {at}")
            batch = []
            for _ in range(count):
                start = rng.randrange(len(text) - length)
                batch.append(self.needles.row(text[start : start + length], length, lines, rng))
            yield torch.tensor(batch)
            at += 1

    def fresh(self) -> Any:
        """The model before its training, the same at every call."""
        import transformers

        sizes = self.sizes
        config = transformers.LlamaConfig(
            vocab_size=self.needles.vocab_size, hidden_size=sizes.hidden, intermediate_size=sizes.inner,
            num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.key_heads,
            max_position_embeddings=sizes.length, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
            initializer_range=sizes.hidden**-0.5,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.LlamaForCausalLM(config)

    def model(self) -> Any:
        """The trained base.

        Raises:
            SparseAttentionError: it has not been trained yet, or by other files or sizes.
        """
        import transformers

        about = self.folder / "base.json"
        if not about.exists():
            raise SparseAttentionError(f"{self.folder} has no base; run without --patterns, or with --base, first")
        known = json.loads(about.read_text())
        if known["corpus"] != corpus_digest() or known["sizes"] != json.loads(json.dumps(asdict(self.sizes))):
            raise SparseAttentionError(
                f"the base in {self.folder} was made of another corpus or in other sizes; give another --out"
            )
        return transformers.LlamaForCausalLM.from_pretrained(self.folder / "base", dtype=torch.float32)

    def digest(self) -> str:
        """Twelve hexadecimal digits of the base's weights: figures of another base are no neighbours."""
        return hashlib.sha256((self.folder / "base" / "model.safetensors").read_bytes()).hexdigest()[:12]

    def train_base(self) -> dict[str, Any]:
        """Train the dense base and keep it, where it is not there yet; what is known of its training."""
        about = self.folder / "base.json"
        if about.exists():
            self.model()
            found: dict[str, Any] = json.loads(about.read_text())
            return found
        model, started = self.fresh().train(), time.perf_counter()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95))
        log: list[dict[str, float]] = []
        half = self.sizes.heads // 2
        heads = {f"0-{half - 1}": SlidingWindowAttentionConfig(window=2), f"{half}-": "dense"}
        patch_model(model, {"0-1": {"heads": heads}, **({"2-": "dense"} if self.sizes.layers > 2 else {})})
        local = True
        for number, stage in enumerate(self.sizes.stages):
            last = number == len(self.sizes.stages) - 1
            if local and not stage.copies_alone:
                unpatch_model(model)
                local = False
            log += self._train_stage(model, optimizer, stage, number, last)
        # Half the bytes, so that the weights may be committed; what is measured is what was saved.
        model.eval().to(torch.bfloat16).save_pretrained(self.folder / "base")
        known = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(time.perf_counter() - started), "threads": torch.get_num_threads(),
            "corpus": corpus_digest(), "sizes": asdict(self.sizes), "log": log,
        }  # fmt: skip
        about.write_text(json.dumps(known, indent=1))
        return known

    def _train_stage(self, model: Any, optimizer: Any, stage: Stage, number: int, last: bool) -> list[dict[str, float]]:
        batches = self.rows(stage.length, stage.rows, stage.lines, f"base {number}")
        log = []
        for step, ids in zip(range(stage.steps), batches, strict=False):
            # Warm from the first step of all, down to nothing over the last stage.
            warm = min(1.0, (step + 1) / 100) if number == 0 else 1.0
            down = 1 - step / stage.steps if last else 1.0
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * warm * down
            loss, copied = loss_of(model, ids, self.needles, copies_alone=stage.copies_alone)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 25 == 24 or step == stage.steps - 1:
                log.append({"length": stage.length, "step": step + 1, "loss": float(loss.detach()), "copied": copied})
                print(f"base: {log[-1]}", flush=True)
        return log

    @torch.no_grad()
    def measure(self, model: nn.Module, split: str) -> dict[str, list[float]]:
        """By task the figure of each item: ``bits per byte`` of held-out chunks, and whether each prompt of
        ``passkey`` and ``multi-needle`` is answered (1.0 or 0.0, by length and depth)."""
        sizes, text = self.sizes, self.tokens(split)
        rng = random.Random(f"chunks {split}")
        starts = sorted(rng.randrange(len(text) - sizes.length) for _ in range(sizes.chunks))
        found: dict[str, list[float]] = {"bits per byte": []}
        for start in starts:
            ids = text[start : start + sizes.length]
            # A token of a byte-level BPE is written with one letter per byte.
            data = sum(len(self.tokenizer.id_to_token(i)) for i in ids[1:])
            row = torch.tensor([ids], device=next(model.parameters()).device)
            loss = model(input_ids=row, labels=row, use_cache=False).loss
            found["bits per byte"].append(float(loss) * (sizes.length - 1) / LN2 / data)
        for name, lines in (("passkey", 1), ("multi-needle", sizes.needles)):
            task = Retrieval(lines, sizes.retrieval_lengths, sizes.each)
            found[name] = [float(hit) for hit in task.hits(model, self.needles, text)]
        return found


def loss_of(model: Any, ids: Tensor, needles: Needles, *, copies_alone: bool = False) -> tuple[Tensor, float]:
    """The mean loss over training rows, and the share of the repeated keys' numbers that are the first choice.

    Args:
        copies_alone: count the loss of these numbers alone.
    """
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    for at, row in enumerate(ids.tolist()):
        repeated[at, needles.repeated(row)] = True
    labels = ids.masked_fill(~repeated, IGNORED) if copies_alone else ids
    answer = model(input_ids=ids, labels=labels, use_cache=False)
    right = answer.logits[:, :-1].argmax(-1) == ids[:, 1:]
    return answer.loss, float(right[repeated[:, 1:]].float().mean())
