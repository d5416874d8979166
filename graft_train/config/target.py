"""Settings of the target."""

from dataclasses import dataclass

from graft_inference.errors import GraftError

DTYPES = ("float32", "bfloat16", "float16")
"""Names of what its weights may be in."""
MEASURED = "auto"
"""The name of whichever is measured to be faster."""


@dataclass(slots=True)
class TargetConfig:
    """Which model is accelerated.

    Attributes:
        name_or_path: a local directory, a GGUF file or a Hub id; one of them has to be named.
        gguf_file: which GGUF file of that directory, installed Python package or Hub repository is the target. It is
            dequantised once, in `dtype` (auto: float32), into the run directory.
        dtype: float32, bfloat16 or float16. auto measures once, on a CPU, whether float32 or bfloat16 is faster and
            with how many threads; elsewhere it is bfloat16.
        device: auto (CUDA where there is one, else the CPU), or a device as torch writes it.
        device_map: "auto" spreads a target that is larger than one GPU over all that the process sees.
        tp_plan: "auto" lets the processes that torchrun started compute it together, in `calibrate` and `evaluate`;
            for `distill` see `head.shard_target`.
    """

    name_or_path: str | None = None
    gguf_file: str | None = None
    dtype: str = MEASURED
    device: str = "auto"
    device_map: str | None = None
    tp_plan: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (*DTYPES, MEASURED):
            raise GraftError(f"target.dtype={self.dtype} is unknown; choose one of {', '.join((*DTYPES, MEASURED))}")
        if self.gguf_file is not None and (self.name_or_path is None or not self.gguf_file.endswith(".gguf")):
            raise GraftError(f"target.gguf_file={self.gguf_file} must name a .gguf file of target.name_or_path")
        if self.device_map not in (None, "auto"):
            raise GraftError(f"target.device_map={self.device_map} must be auto or null")
        if self.tp_plan not in (None, "auto"):
            raise GraftError(f"target.tp_plan={self.tp_plan} must be auto or null")
