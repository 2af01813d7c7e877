"""The papers' claims, reproduced small: one file a claim, run by scripts/claims.py, shown in the systems' cards."""

from sa_hf.tools.claims.claim import Claim
from sa_hf.tools.claims.expire_corridor import EXPIRE_CORRIDOR
from sa_hf.tools.claims.longnet_segments import LONGNET_SEGMENTS
from sa_hf.tools.claims.strided_periods import FIXED_TEXT, STRIDED_PERIODS

CLAIMS: dict[str, Claim] = {
    claim.name: claim for claim in (LONGNET_SEGMENTS, EXPIRE_CORRIDOR, STRIDED_PERIODS, FIXED_TEXT)
}

__all__ = ["CLAIMS", "Claim"]
