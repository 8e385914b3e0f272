"""Configuration files and manifests are real files beside this package, with `${name}` where a value is put in."""

from pathlib import Path
from string import Template

from cluster import layout
from cluster.layout import Layout


def render(paths: Layout, source: str, **values: object) -> str:
    """Fill in one file of `config/` or `manifests/`; an unknown name in the file is an error."""
    common = {
        "state": paths.state,
        "run": paths.run,
        "repository": paths.repository,
        "node_name": layout.NODE_NAME,
        "node_address": layout.NODE_ADDRESS,
        "pod_cidr": layout.POD_CIDR,
        "dns_address": layout.DNS_ADDRESS,
        "dns_domain": layout.DNS_DOMAIN,
        "bridge": layout.BRIDGE,
        "cgroup": layout.CGROUP,
        "kubelet_port": layout.KUBELET_PORT,
        "pause_image": layout.PAUSE_IMAGE,
        "coredns_image": layout.COREDNS_IMAGE,
        "versitygw_image": layout.VERSITYGW_IMAGE,
        "dev_namespace": layout.DEV_NAMESPACE,
    }
    text = (layout.SOURCE / source).read_text()
    return Template(text).substitute({**common, **values})


def write(paths: Layout, source: str, target: Path | None = None, **values: object) -> Path:
    """Render a configuration file to where the component reads it."""
    target = target or paths.config / Path(source).name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(paths, source, **values))
    return target
