"""The device at hand, and whether a policy was measured on it."""

import platform
import warnings
from pathlib import Path

import torch

from .policy.policy import Policy


def without_plans(device: torch.device) -> None:
    """Leaves cuDNN's attention out on a GPU, in the whole process.

    It builds a plan for every new shape, which takes tenths of a second (github.com/modelscope/FunASR/issues/3704,
    torch 2.11), and while one decodes every pass has a shape of its own.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def event(device: torch.device) -> torch.cuda.Event:
    """A moment that the GPU will reach: when what was asked of it so far has been done."""
    moment = torch.cuda.Event(enable_timing=True)
    moment.record(torch.cuda.current_stream(device))
    return moment


def device_name(device: torch.device) -> str:
    """What a GPU or CPU calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def warn_if_elsewhere(policy: Policy, device: torch.device) -> None:
    """Warns where the policy's latencies are another device's: its output is right, its speed perhaps not."""
    measured = policy.measured_on.get("device") or {}
    here = {"name": device_name(device), "threads": torch.get_num_threads()}
    differs = [name for name in here if name in measured and measured[name] != here[name]]
    if device.type == "cuda":
        differs = [name for name in differs if name != "threads"]
    if differs:
        what = ", ".join(f"{name} {measured[name]}, not {here[name]}" for name in differs)
        warnings.warn(
            f"the policy was calibrated for {what}; to measure this device alone, in under a minute, run "
            "graft calibrate policy.latency_only=true, delete the bundle, and run graft export",
            stacklevel=3,
        )
