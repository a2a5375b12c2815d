"""The steps that `compress` may be made of: each from a checkpoint to a checkpoint, combined in a list or done by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from lineshaft.base.stage import Stage
from lineshaft.compress.budget_stage import BUDGET, BudgetStepConfig
from lineshaft.compress.calibrated import AWQ, GPTQ, SMOOTH, STATIC
from lineshaft.compress.config import AwqConfig, CompressConfig, GptqConfig, SmoothConfig, StaticConfig
from lineshaft.compress.distil_stage import DISTIL, DistilConfig
from lineshaft.compress.prune_plan import PruneConfig
from lineshaft.compress.prune_stage import PRUNE
from lineshaft.compress.qat_stage import QAT, QatConfig
from lineshaft.compress.stage import COMPRESS

STEPS: Mapping[str, Stage[Any]] = {
    "round": COMPRESS,
    "gptq": GPTQ,
    "awq": AWQ,
    "smooth": SMOOTH,
    "static": STATIC,
    "budget": BUDGET,
    "prune": PRUNE,
    "distil": DISTIL,
    "qat": QAT,
}
"""What a step's `step` says, to its stage; `round` where it says nothing."""


def _kind(given: Any) -> str:
    """Of one step the name that it gives itself; of a list `steps`."""
    if isinstance(given, list):
        return "steps"
    return str(given.get("step", "round") if isinstance(given, Mapping) else getattr(given, "step", "round"))


_TOLD = Discriminator(_kind, custom_error_type="step", custom_error_message=f"step: one of {', '.join(STEPS)}")
_Round = Annotated[CompressConfig, Tag("round")]
_Gptq = Annotated[GptqConfig, Tag("gptq")]
_Awq = Annotated[AwqConfig, Tag("awq")]
_Smooth = Annotated[SmoothConfig, Tag("smooth")]
_Static = Annotated[StaticConfig, Tag("static")]
_Budget = Annotated[BudgetStepConfig, Tag("budget")]
_Prune = Annotated[PruneConfig, Tag("prune")]
_Distil = Annotated[DistilConfig, Tag("distil")]
_Qat = Annotated[QatConfig, Tag("qat")]
_Several = Annotated[list[Annotated[_Round | _Gptq | _Awq | _Smooth | _Static | _Budget | _Prune | _Distil | _Qat, _TOLD]], Tag("steps")]
Steps = Annotated[_Round | _Gptq | _Awq | _Smooth | _Static | _Budget | _Prune | _Distil | _Qat | _Several, _TOLD]
"""One step, or several in the order in which they are carried out."""
