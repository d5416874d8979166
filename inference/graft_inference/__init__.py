"""Graft: lossless hybrid tree speculation (arXiv 2605.20104) for transformers causal LMs.

Shape suffixes: B batch, S sequence, N tree rows (the root included), T template rows, D depth (0..max),
A accepted or newly committed positions, P places of the output, K keys or successors per token, V target vocabulary,
D in `logp_BD` draft vocabulary, H hidden size, E tapped states concatenated, k beam width.
"""

from .engine import GraftEngine
from .errors import GraftError
from .policy.acceptance import AcceptanceModel, SourceModel
from .policy.plan import Checkpoint, Plan, QuotaCheckpoint, QuotaPlan, ScoredPlan
from .policy.policy import METHODS, Policy, paper_policy
from .request import Request
from .stats import Generation, GenerationStats

__all__ = [
    "METHODS",
    "AcceptanceModel",
    "Checkpoint",
    "Generation",
    "GenerationStats",
    "GraftEngine",
    "GraftError",
    "Plan",
    "Policy",
    "QuotaCheckpoint",
    "QuotaPlan",
    "Request",
    "ScoredPlan",
    "SourceModel",
    "paper_policy",
]
