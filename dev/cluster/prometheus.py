"""Debian's Prometheus on this machine, scraping the project's pods by label."""

import shutil

from cluster import discovery, layout, processes, templates
from cluster.layout import Layout
from cluster.shell import ClusterError, step

URL = f"http://127.0.0.1:{layout.PROMETHEUS_PORT}"


def start(paths: Layout) -> None:
    """Start Prometheus; it finds pods as they come and go."""
    executable = shutil.which("prometheus")
    if executable is None:
        raise ClusterError("prometheus is not installed")
    config = templates.write(paths, "config/prometheus.yml", discovery_url=discovery.URL)
    command = [
        executable,
        f"--config.file={config}",
        f"--storage.tsdb.path={paths.state / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{layout.PROMETHEUS_PORT}",
        "--web.enable-lifecycle",
    ]
    with step(f"Prometheus at {URL}"):
        discovery.start(paths)
        processes.start(paths, "prometheus", command, ready=lambda: processes.answers(f"{URL}/-/ready"))
