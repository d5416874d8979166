"""Graft: lossless hybrid tree speculation (arXiv 2605.20104) for transformers causal LMs.

Shape suffixes: B batch, S sequence, N nodes of a tree (the root included), T nodes of a template, D depth (0..max),
A accepted or newly committed positions, P places of the output, K keys or successors per token, V target vocabulary,
D in `logp_BD` draft vocabulary, H hidden size, E aux hidden states side by side, k topk.
"""

from .engine import GraftEngine
from .errors import GraftError
from .policy.acceptance import AcceptanceModel, SourceModel
from .policy.plan import ChainPlan, Checkpoint, Plan, QuotaCheckpoint, QuotaPlan, ScoredPlan
from .policy.policy import METHODS, Policy, paper_policy
from .request import Request
from .runner import EngineSettings
from .stats import Generation, GenerationStats

__all__ = [
    "METHODS",
    "AcceptanceModel",
    "ChainPlan",
    "Checkpoint",
    "EngineSettings",
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
