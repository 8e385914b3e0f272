"""Executables that Debian has not: built from pinned Go modules, once per machine."""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster.layout import DEV, KUBERNETES_VERSION, Layout, cache_directory
from cluster.shell import ClusterError, locked, run, step

_VERSION = "k8s.io/component-base/version"
_KUBERNETES_FLAGS = " ".join(
    f"-X {_VERSION}.{name}={value}"
    for name, value in {
        "gitVersion": KUBERNETES_VERSION,
        "gitMajor": KUBERNETES_VERSION.lstrip("v").split(".")[0],
        "gitMinor": KUBERNETES_VERSION.split(".")[1],
        "gitTreeState": "clean",
    }.items()
)
# Neither debug information nor inlining: the build takes a third less time, and a cluster of one node isn't busy.
_COMPILER_FLAGS = "-gcflags=all=-dwarf=false -l"
# The executable becomes the component by whose name it is called.
COMPONENTS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")


@dataclass(frozen=True)
class Tool:
    """One executable: the module that pins it, the package it is made of, and the names it is called by."""

    name: str
    module: Path
    package: str = "."
    linker_flags: str = ""
    links: tuple[str, ...] = ()

    def digest(self) -> str:
        """Changes with everything that the executable is made from."""
        hashed = hashlib.sha256(f"{self.package} {_COMPILER_FLAGS} {self.linker_flags}".encode())
        for file in sorted(self.module.iterdir()):
            if file.name in ("go.mod", "go.sum") or file.suffix == ".go":
                hashed.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        return hashed.hexdigest()[:16]

    @property
    def cached(self) -> Path:
        """Where the built executable is, or will be."""
        return cache_directory() / "bin" / f"{self.name}-{self.digest()}"


KUBERNETES = Tool("kubernetes", DEV / "kubernetes", linker_flags=_KUBERNETES_FLAGS, links=COMPONENTS)
HELM = Tool("helm", DEV / "tools/helm", package="helm.sh/helm/v3/cmd/helm", links=("helm",))
PAUSE = Tool("pause", DEV / "tools/pause")
COREDNS = Tool("coredns", DEV / "tools/coredns")
VERSITYGW = Tool("versitygw", DEV / "tools/versitygw", package="github.com/versity/versitygw/cmd/versitygw")
TOOLS = (KUBERNETES, PAUSE, HELM, COREDNS, VERSITYGW)


def build_all(paths: Layout) -> None:
    """Build what is not in the cache, and link the executables under `.cluster/bin`."""
    for tool in TOOLS:
        with locked(cache_directory() / "locks" / tool.name, f"another build of {tool.name}"):
            if not tool.cached.exists():
                build(tool)
        for name in tool.links:
            link = paths.bin / name
            if not link.is_symlink() or link.readlink() != tool.cached:
                link.unlink(missing_ok=True)
                link.symlink_to(tool.cached)


def build(tool: Tool) -> None:
    """Compile one executable without cgo, so that it runs in an image that holds nothing else."""
    if shutil.which("go") is None:
        raise ClusterError(
            "Go 1.26 or newer is needed to build Kubernetes, and `go` is not on the PATH (https://go.dev/dl)"
        )
    tool.cached.parent.mkdir(parents=True, exist_ok=True)
    partial = tool.cached.with_suffix(f".partial-{os.getpid()}")
    # A lazy garbage collector: the compiler is many short processes.
    env = {"GOGC": "800", **os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false", "GOWORK": "off"}
    minutes = " (a few minutes, once per machine)" if tool is KUBERNETES else ""
    with step(f"go build {tool.name}{minutes}"):
        command = ["go", "build", "-trimpath", _COMPILER_FLAGS, f"-ldflags=-s -w {tool.linker_flags}"]
        run([*command, "-o", partial, tool.package], env=env, cwd=tool.module)
        partial.rename(tool.cached)
