"""The papers' claims, reproduced small: one file a claim, run by scripts/claims.py, shown in the systems' cards."""

from sa_hf.tools.claims.bigbird_parts import BIGBIRD_PARTS
from sa_hf.tools.claims.claim import Claim
from sa_hf.tools.claims.expire_corridor import EXPIRE_CORRIDOR
from sa_hf.tools.claims.logsparse_piecewise import LOGSPARSE_PIECEWISE
from sa_hf.tools.claims.longnet_context import LONGNET_CONTEXT
from sa_hf.tools.claims.longnet_segments import LONGNET_SEGMENTS
from sa_hf.tools.claims.routing_clusters import ROUTING_CLUSTERS
from sa_hf.tools.claims.sparsebert_masks import SPARSEBERT_DIAGONAL, SPARSEBERT_LEARNED
from sa_hf.tools.claims.star_summation import STAR_SUMMATION
from sa_hf.tools.claims.strided_periods import FIXED_TEXT, STRIDED_PERIODS

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        LONGNET_CONTEXT,
        LONGNET_SEGMENTS,
        LOGSPARSE_PIECEWISE,
        STRIDED_PERIODS,
        FIXED_TEXT,
        SPARSEBERT_DIAGONAL,
        SPARSEBERT_LEARNED,
        EXPIRE_CORRIDOR,
        ROUTING_CLUSTERS,
        BIGBIRD_PARTS,
        STAR_SUMMATION,
    )
}

__all__ = ["CLAIMS", "Claim"]
