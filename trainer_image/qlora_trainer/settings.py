"""What the process is told by its environment, parsed once and frozen; and where it may write."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from qlorajob import names
from qlorajob.errors import Reason, StepError
from qlorajob.run import RunConfig
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import Prepared


@dataclass(frozen=True, slots=True)
class Settings:
    """The run's configuration and the folders of this process."""

    config: RunConfig
    metrics_port: int
    mount_root: Path
    work_dir: Path

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Parse the environment of the container (or of `qlora run`)."""
        try:
            config = RunConfig.from_json(env[names.ENV_RUN_CONFIG])
        except KeyError:
            raise StepError(Reason.INVALID_SPEC, f"{names.ENV_RUN_CONFIG} is not set: nothing to do") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise StepError(Reason.INVALID_SPEC, f"{names.ENV_RUN_CONFIG}: {where}: {first['msg']}") from None
        return cls(
            config=config,
            metrics_port=int(env.get(names.ENV_METRICS_PORT, names.METRICS_PORT)),
            mount_root=Path(env.get(names.ENV_MOUNT_ROOT, names.MOUNT_ROOT)),
            work_dir=Path(env.get(names.ENV_WORK_DIR, names.WORK_DIR)),
        )

    @property
    def spec(self) -> QLoRAJobSpec:
        """The manifest's spec."""
        return self.config.spec

    @property
    def prepared(self) -> Prepared:
        """What prepare found out: train and merge can't start without it."""
        if self.config.prepared is None:
            raise StepError(Reason.INVALID_SPEC, "the run config holds no result of prepare: run prepare first")
        return self.config.prepared

    @property
    def cache_dir(self) -> Path | None:
        """The shared volume for weights and kernels, where spec.model.cacheClaim names one and it is mounted."""
        folder = self.mount_root / Path(names.CACHE_DIR).relative_to(names.MOUNT_ROOT)
        return folder if self.spec.model.cache_claim and folder.is_dir() else None

    def folder(self, name: str) -> Path:
        """A folder for scratch files, made if need be."""
        path = self.work_dir / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def arrange_environment(env: MutableMapping[str, str], settings: Settings) -> None:
    """Point every library at the writable folders, before any of them is imported.

    The container's root file system is read-only and its user has no entry in /etc/passwd, which Hugging Face, torch
    and Triton otherwise stumble over. Values that are set already win, so `qlora run` uses the user's own caches.
    """
    work, cache = settings.work_dir, settings.cache_dir
    # The next pod needn't compile again. What a kernel was made from, and by which version, is in its file's name.
    compiled = cache / "compiled" if cache and os.access(cache, os.W_OK) else work
    defaults = {
        "HF_HOME": str(cache or work / "huggingface"),
        "HF_DATASETS_CACHE": str(work / "datasets"),
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that wait for each other sleep instead of spinning: on a node whose cores are shared, spinning made
        # a step cost three to five times the CPU.
        "OMP_WAIT_POLICY": "PASSIVE",
        "UNSLOTH_COMPILE_LOCATION": str(work / "unsloth"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "MPLCONFIGDIR": str(work / "matplotlib"),
        "USER": "qlora",
    }
    threads = usable_cpus()
    if threads < (os.cpu_count() or 1):
        defaults["OMP_NUM_THREADS"] = str(threads)  # else torch starts a thread for every core of the node
    for name, value in defaults.items():
        env.setdefault(name, value)
    if not os.access(env.get("HOME", "/"), os.W_OK):
        env["HOME"] = str(work)


def usable_cpus() -> int:
    """Cores that this process may really use: the smaller of its affinity and its cgroup's quota, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cpu_quota(Path("/sys/fs/cgroup"))
    return max(1, min(cores, round(quota))) if quota else cores


def usable_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this process may use: the smaller of its cgroup's limit (v2, then v1) and the machine's."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int((cgroup / name).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits)


def _cgroup_cpu_quota(root: Path) -> float | None:
    """CPUs that the cgroup may use (v2, then v1), None without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        return quota_us / int((root / "cpu" / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError):
        return None
