"""Images: built with buildah on a Debian base of our own, kept as archives, imported into containerd."""

import configparser
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster import binaries, layout, node
from cluster.layout import DEV, Layout, cache_directory
from cluster.shell import ClusterError, run, step, succeeds

_DOCKERFILES = DEV / "images"
_SUITE = "bookworm"
# python3-venv lets Dockerfiles install into a virtual environment; bitsandbytes and torch need the two libraries.
_BASE_PACKAGES = ("ca-certificates", "libgomp1", "libstdc++6", "python3", "python3-venv")
_STATIC = {
    layout.PAUSE_IMAGE: binaries.PAUSE,
    layout.COREDNS_IMAGE: binaries.COREDNS,
    layout.VERSITYGW_IMAGE: binaries.VERSITYGW,
}
_PROJECT = {layout.OPERATOR_IMAGE: "Dockerfile", layout.TRAINER_IMAGE: "trainer_image/Dockerfile"}
_CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
# Not the image's own bundle: an upgrade of ca-certificates inside a build must be able to replace that.
_BUILD_CA_BUNDLE = Path("/run/build-ca-certificates.crt")
# The base image names no Debian mirror of its own; it and this machine are of the same release.
_APT_SOURCES = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))
_PIP_CONFIGS = (Path("/etc/pip.conf"), Path.home() / ".pip/pip.conf", Path.home() / ".config/pip/pip.conf")


def buildah() -> list[str]:
    """The buildah command line: storage in the cache, so that layers outlive clusters and clones."""
    store = cache_directory() / "buildah"
    return ["buildah", "--root", str(store / "root"), "--runroot", str(store / "run"), "--storage-driver", _driver()]


def _driver() -> str:
    return "overlay" if "overlay" in Path("/proc/filesystems").read_text() else "vfs"


def build(context: Path, dockerfile: Path, tag: str, arguments: Mapping[str, str] | None = None) -> None:
    """Build an image from a Dockerfile, with this machine's settings for pip and apt but without keeping them."""
    # chroot isolation: RUN steps use the machine's network and need neither cgroups nor a bridge.
    command = [*buildah(), "bud", "--isolation", "chroot", "--pull-never", "--layers", "--format", "oci"]
    for name, value in (arguments or {}).items():
        command += ["--build-arg", f"{name}={value}"]
    with tempfile.TemporaryDirectory() as directory:
        for source, target in _build_mounts(Path(directory)).items():
            if source.exists():
                command += ["--volume", f"{source}:{target}:ro"]
        run([*command, "--tag", tag, "--file", str(dockerfile), str(context)])


def _build_mounts(directory: Path) -> dict[Path, Path]:
    """This machine's way to packages, for the time of a build: pip's settings, apt's sources, trusted certificates."""
    settings = _pip_settings()
    settings.set("global", "cert", str(_BUILD_CA_BUNDLE))
    pip_config, apt_config = directory / "pip.conf", directory / "apt.conf"
    with pip_config.open("w") as file:
        settings.write(file)
    apt_config.write_text(f'Acquire::https::CAInfo "{_BUILD_CA_BUNDLE}";\n')
    wheels = [Path(entry) for entry in settings.get("global", "find-links", fallback="").split()]
    return {
        pip_config: Path("/etc/pip.conf"),
        apt_config: Path("/etc/apt/apt.conf.d/99build"),
        _CA_BUNDLE: _BUILD_CA_BUNDLE,
        **{source: source for source in _APT_SOURCES},
        **{wheel: wheel for wheel in wheels if wheel.is_dir()},
    }


def _pip_settings() -> configparser.ConfigParser:
    """What pip reads on this machine, from its files and from the environment."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(_PIP_CONFIGS)
    if not settings.has_section("global"):
        settings.add_section("global")
    for name, value in os.environ.items():
        if name.startswith("PIP_") and name != "PIP_CONFIG_FILE":
            settings.set("global", name.removeprefix("PIP_").lower().replace("_", "-"), value)
    return settings


def push(tag: str, archive: Path, name: str | None = None) -> None:
    """Write an image to an archive; complete or not at all.

    Docker's format, since buildah leaves layers uncompressed there: gzip takes minutes for an image with torch in it.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_suffix(f".partial-{os.getpid()}")
    run([*buildah(), "push", tag, f"docker-archive:{partial}:{name or tag}"])
    partial.rename(archive)


def load(paths: Layout, image: str) -> None:
    """Import an image into the cluster: an (OCI or Docker) archive's path, or the name of an image that buildah has."""
    if Path(image).is_file():
        run([*node.ctr(paths), "images", "import", image])
        return
    if not is_stored(image):
        raise ClusterError(f"{image} is neither a file nor an image that buildah has")
    with tempfile.TemporaryDirectory(dir=paths.state) as directory:
        archive = Path(directory) / "image.tar"
        push(image, archive)
        run([*node.ctr(paths), "images", "import", archive])


def ensure_base() -> None:
    """Have the Debian base image as an archive for containerd, and in buildah's storage to build upon."""
    archive = _base_archive()
    exact = f"localhost/qlora/base:{archive.stem}"
    if not archive.exists():
        with step("base image (debootstrap)"), tempfile.TemporaryDirectory(dir=_archives()) as directory:
            context = Path(directory)
            _debootstrap(context / "rootfs")
            run(["tar", "--create", "--file", context / "rootfs.tar", "--directory", context / "rootfs", "."])
            build(context, _DOCKERFILES / "base.Dockerfile", exact)
        push(exact, archive, name=layout.BASE_IMAGE)
    elif not is_stored(exact):
        pulled = run([*buildah(), "pull", f"docker-archive:{archive}"]).strip()
        run([*buildah(), "tag", pulled, exact])
    run([*buildah(), "tag", exact, layout.BASE_IMAGE])


def ensure_all() -> list[Path]:
    """Make every image that the cluster itself needs, unless the cache has it; returns the archives."""
    archives = []
    static = _DOCKERFILES / "static.Dockerfile"
    for tag, tool in _STATIC.items():
        archive = _archive(tag, static, tool.digest())
        if not archive.exists():
            with step(f"image {tag}"):
                build(tool.cached.parent, static, tag, {"NAME": tool.cached.name})
                push(tag, archive)
        archives.append(archive)
    ensure_base()
    thin = _DOCKERFILES / "trainer-thin.Dockerfile"
    archive = _archive(layout.THIN_TRAINER_IMAGE, thin, _base_archive().name)
    if not archive.exists():
        with step(f"image {layout.THIN_TRAINER_IMAGE}"):
            build(_DOCKERFILES, thin, layout.THIN_TRAINER_IMAGE, {"BASE": layout.BASE_IMAGE})
            push(layout.THIN_TRAINER_IMAGE, archive)
    return [*archives, archive]


def is_stored(image: str) -> bool:
    """Whether buildah's storage has an image of that name."""
    return succeeds([*buildah(), "inspect", "--type", "image", image])


def build_project(paths: Layout) -> None:
    """Build the images that a release would publish, on the Debian base of our own, and load them into the cluster."""
    ensure_base()
    for tag, dockerfile in _PROJECT.items():
        with step(f"image {tag}"):
            build(paths.repository, paths.repository / dockerfile, tag, {"BASE_IMAGE": layout.BASE_IMAGE})
        if node.containerd_answers(paths):
            with step(f"loading {tag}"):
                load(paths, tag)


def import_all(paths: Layout, archives: Iterable[Path]) -> None:
    """Import archives that containerd has not imported yet."""
    stamps = paths.state / "imported"
    stamps.mkdir(exist_ok=True)
    missing = [archive for archive in archives if not (stamps / archive.name).exists()]
    if not missing:
        return
    for archive in missing:
        with step(f"importing {archive.stem.rpartition('-')[0]}"):
            run([*node.ctr(paths), "images", "import", archive])
            (stamps / archive.name).touch()


def _archives() -> Path:
    directory = cache_directory() / "images"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _archive(tag: str, dockerfile: Path, *inputs: str) -> Path:
    hashed = hashlib.sha256("\0".join(inputs).encode() + dockerfile.read_bytes())
    name = tag.rsplit("/", 1)[1].replace(":", "-")
    return _archives() / f"{name}-{hashed.hexdigest()[:16]}.tar"


def _base_archive() -> Path:
    return _archive(layout.BASE_IMAGE, _DOCKERFILES / "base.Dockerfile", _SUITE, *_BASE_PACKAGES)


def _debootstrap(target: Path) -> None:
    """A minimal Debian from the mirror that this machine's own apt uses."""
    packages = f"--include={','.join(_BASE_PACKAGES)}"
    run(["debootstrap", "--variant=minbase", packages, _SUITE, target, _mirror()])
    for directory in (
        "var/cache/apt",
        "var/lib/apt/lists",
        "var/log",
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
    ):
        for entry in (target / directory).iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    (target / "etc/apt/sources.list").unlink(missing_ok=True)
    (target / "etc/resolv.conf").unlink(missing_ok=True)
    (target / "etc/hostname").unlink(missing_ok=True)


def _mirror() -> str:
    fields = "$(REPO_URI)|$(ORIGIN)|$(LABEL)|$(RELEASE)|$(COMPONENT)"
    for line in run(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]).splitlines():
        uri, origin, label, _, component = line.split("|")
        if (origin, label, component) == ("Debian", "Debian", "main"):
            return uri
    raise ClusterError("apt knows no Debian archive to take the base image from (see `apt-get indextargets`)")
