"""The Debian packages that the node is made of."""

import os
import shutil
from pathlib import Path

from cluster.layout import Layout
from cluster.shell import run, step, succeeds

PACKAGES = (
    "buildah",
    "ca-certificates",
    "containerd",
    "containernetworking-plugins",
    "debootstrap",
    "etcd-server",
    "iproute2",
    "nftables",
    "openssl",
    "prometheus",
    "runc",
)
_POLICY = Path("/usr/sbin/policy-rc.d")


def install(paths: Layout) -> None:
    """Install what is missing; packages that start a service of their own on installation are kept from it."""
    missing = [name for name in PACKAGES if not _installed(name)]
    if not missing:
        return
    apt = ["apt-get", "-y", "-o", "DPkg::Lock::Timeout=600"]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with step(f"Debian packages: {' '.join(missing)}"):
        run([*apt, "update"], env=env)
        keep_quiet = not _POLICY.exists()
        if keep_quiet:
            _POLICY.write_text("#!/bin/sh\nexit 101\n")
            _POLICY.chmod(0o755)
        try:
            install = [*apt, "install", "--no-install-recommends", *missing]
            run(install, env=env, log=paths.log_file("apt"))
        finally:
            if keep_quiet:
                _POLICY.unlink()


def _installed(name: str) -> bool:
    if shutil.which("dpkg-query") is None:
        return False
    return succeeds(["sh", "-c", f"dpkg-query -W -f '${{Status}}' {name} | grep -q '^install ok installed$'"])
