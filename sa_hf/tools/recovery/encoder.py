"""The encoder: the pretrained MiniLM, lengthened, and what is measured of its embeddings of long documents.

A document is a section of a file of the standard library from which a passage has been cut out, at a random depth; the
passage is the query that should find it among all the documents of the split.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.load import minilm_path
from sa_hf.tools.recovery.texts import sources_of

TOP = 10  # documents that a query may find its own among
TEMPERATURE = 0.05  # of the similarities in the contrastive loss


@dataclass(frozen=True)
class Sizes:
    """Tokens of a document and of a query with both special tokens, and how many are measured and trained on."""

    length: int = 768
    query: int = 66
    documents: int = 500
    batch: int = 4


QUICK = Sizes(length=128, query=18, documents=12, batch=2)


@dataclass(frozen=True, eq=False)
class Documents:
    """``documents [count, length]`` and ``queries [count, query]``, int64, row by row of each other; ``depths`` is how
    far into its document a query's passage was cut out, 0 to 1."""

    documents: Tensor
    queries: Tensor
    depths: list[float]


@dataclass
class Encoder:
    """The model, and documents by split."""

    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm_path()))
        self._documents: dict[str, Documents] = {}

    def model(self) -> Any:
        """The pretrained model, lengthened, without dropout (its mask would keep dense attention off its kernel)."""
        import transformers

        from sa_hf.hf.patching.extend import extend_positions

        options = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
        model = transformers.AutoModel.from_pretrained(str(minilm_path()), add_pooling_layer=False, **options)
        return (
            extend_positions(model, self.sizes.length, tokenizer=self.tokenizer) if self.sizes.length > 512 else model
        )

    def documents(self, split: str) -> Documents:
        """All documents of a split in an order that is drawn, to measure on at most ``sizes.documents``.

        Raises:
            SparseAttentionError: there are fewer to report on.
        """
        if split not in self._documents:
            self._documents[split] = self._made(split)
        return self._documents[split]

    def _made(self, split: str) -> Documents:
        sizes, rng = self.sizes, random.Random(f"documents {split}")
        body, passage = sizes.length - 2, sizes.query - 2
        start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        found = []
        for source in sources_of(split):
            ids = self.tokenizer(source.text, add_special_tokens=False, verbose=False)["input_ids"]
            for at in range(0, len(ids) - body - passage + 1, body + passage):
                section = ids[at : at + body + passage]
                cut = rng.randint(0, body)
                rest = section[:cut] + section[cut + passage :]
                query = section[cut : cut + passage]
                found.append(([start, *rest, end], [start, *query, end], cut / body))
        rng.shuffle(found)
        if split != "train":
            if split == "report" and len(found) < sizes.documents:
                raise SparseAttentionError(
                    f"documents={sizes.documents} of {sizes.length} tokens: the {split} split has {len(found)}"
                )
            found = found[: sizes.documents]
        documents, queries, depths = zip(*found, strict=True)
        return Documents(torch.tensor(documents), torch.tensor(queries), list(depths))

    def batches(self, seed: str) -> Iterator[dict[str, Tensor]]:
        """Training batches without end, ``{"documents", "queries"}``; batch ``i`` hangs on ``(seed, i)`` alone."""
        data, at = self.documents("train"), 0
        while True:
            chosen = random.Random(f"{seed} {at}").sample(range(len(data.depths)), self.sizes.batch)
            yield {"documents": data.documents[chosen], "queries": data.queries[chosen]}
            at += 1

    @torch.no_grad()
    def embeddings(self, model: nn.Module, split: str) -> tuple[Tensor, Tensor]:
        """Embeddings of the documents and of the queries, fp32 ``[count, hidden]`` of length 1."""
        data = self.documents(split)
        documents = [embedded(model, rows).cpu() for rows in data.documents.split(4)]
        return torch.cat(documents), torch.cat([embedded(model, rows).cpu() for rows in data.queries.split(50)])

    def measure(self, model: nn.Module, split: str, dense: Tensor | None) -> tuple[dict[str, list[float]], Tensor]:
        """By task the figure of each document: ``recall@10`` (1.0 where its query finds it among the first), and
        ``agreement``, the cosine similarity to its embedding by the dense model; and the embeddings ``[count,
        hidden]``.

        Args:
            dense: the dense model's embeddings; None where these are they.
        """
        documents, queries = self.embeddings(model, split)
        ranks = rank_of_own(queries @ documents.T)
        agreement = cosine_similarity(documents, documents if dense is None else dense)
        name = f"recall@{TOP}"
        found = {name: (ranks < TOP).float().tolist(), "agreement": agreement.tolist()}
        return found, documents


def embedded(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean of the last states of rows without padding, of length 1: ``[rows, hidden]`` of ``ids [rows, n]``."""
    states = model(input_ids=ids.to(next(model.parameters()).device)).last_hidden_state
    return normalize(states.float().mean(1), dim=-1)


def rank_of_own(similarity: Tensor) -> Tensor:
    """How many other documents are at least as near to each query as its own: int64 ``[n]`` of ``[n, n]``."""
    own = similarity.diagonal()[:, None]
    return (similarity >= own).sum(1) - 1


def contrastive_loss(queries: Tensor, documents: Tensor) -> Tensor:
    """Each query's own document among those of the batch: cross-entropy over similarities ``[n, hidden]``."""
    return cross_entropy(queries @ documents.T / TEMPERATURE, torch.arange(len(queries), device=queries.device))
