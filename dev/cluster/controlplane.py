"""etcd, API server, controller manager and scheduler."""

import shutil
import ssl

from cluster import layout, processes
from cluster.layout import Layout
from cluster.shell import ClusterError, Command, step

DAEMONS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


def start(paths: Layout) -> None:
    """Start the control plane; returns when the API server serves."""
    tls = ssl.create_default_context(cafile=str(paths.pki / "ca.crt"))
    with step("etcd and the API server"):
        _start_etcd(paths)
        _start_api_server(paths, tls)
    with step("controller manager and scheduler"):
        _start_controller_manager(paths)
        _start_scheduler(paths)


def _start_etcd(paths: Layout) -> None:
    client = f"http://127.0.0.1:{paths.endpoints.etcd_port}"
    peer = f"http://127.0.0.1:{paths.endpoints.etcd_peer_port}"
    executable = shutil.which("etcd")
    if executable is None:
        raise ClusterError("etcd is not installed")
    command: Command = [
        executable,
        *("--name", "default", "--data-dir", str(paths.state / "etcd"), "--logger", "zap"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"),
        # Nothing in here has to survive a power failure.
        "--unsafe-no-fsync",
    ]
    processes.start(paths, "etcd", command, ready=lambda: processes.answers(f"{client}/health"))


def _start_api_server(paths: Layout, tls: ssl.SSLContext) -> None:
    pki, listen = paths.pki, paths.endpoints
    command: Command = [
        paths.bin / "kube-apiserver",
        f"--etcd-servers=http://127.0.0.1:{listen.etcd_port}",
        f"--bind-address={listen.api_address}",
        f"--advertise-address={listen.api_address}",
        f"--secure-port={listen.api_port}",
        f"--service-cluster-ip-range={layout.SERVICE_CIDR}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--client-ca-file={pki}/ca.crt",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--kubelet-certificate-authority={pki}/ca.crt",
        f"--kubelet-client-certificate={pki}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={pki}/apiserver-kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-issuer=https://kubernetes.default.svc.{layout.DNS_DOMAIN}",
        f"--service-account-key-file={pki}/service-accounts.pub",
        f"--service-account-signing-key-file={pki}/service-accounts.key",
        # The aggregation layer: what extension API servers (Kueue's visibility, metrics) trust.
        f"--requestheader-client-ca-file={pki}/front-proxy-ca.crt",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={pki}/front-proxy-client.crt",
        f"--proxy-client-key-file={pki}/front-proxy-client.key",
        "--enable-aggregator-routing=true",
        f"--audit-policy-file={layout.SOURCE}/config/audit.yaml",
        f"--audit-log-path={paths.log_file('audit')}",
    ]
    processes.start(paths, "kube-apiserver", command, ready=lambda: processes.answers(f"{listen.api}/readyz", tls))


def _start_controller_manager(paths: Layout) -> None:
    kubeconfig, pki = paths.config / "kube-controller-manager.kubeconfig", paths.pki
    port = paths.endpoints.controller_manager_port
    command: Command = [
        paths.bin / "kube-controller-manager",
        *(f"--{use}kubeconfig={kubeconfig}" for use in ("", "authentication-", "authorization-")),
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        "--leader-elect=false",
        "--use-service-account-credentials",
        f"--service-account-private-key-file={pki}/service-accounts.key",
        f"--root-ca-file={pki}/ca.crt",
        f"--cluster-signing-cert-file={pki}/ca.crt",
        f"--cluster-signing-key-file={pki}/ca.key",
        f"--cluster-cidr={layout.POD_CIDR}",
        f"--service-cluster-ip-range={layout.SERVICE_CIDR}",
    ]
    healthy = f"https://127.0.0.1:{port}/healthz"
    processes.start(paths, "kube-controller-manager", command, ready=lambda: _healthy(healthy))


def _start_scheduler(paths: Layout) -> None:
    kubeconfig, port = paths.config / "kube-scheduler.kubeconfig", paths.endpoints.scheduler_port
    command: Command = [
        paths.bin / "kube-scheduler",
        *(f"--{use}kubeconfig={kubeconfig}" for use in ("", "authentication-", "authorization-")),
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        "--leader-elect=false",
    ]
    processes.start(paths, "kube-scheduler", command, ready=lambda: _healthy(f"https://127.0.0.1:{port}/readyz"))


def _healthy(url: str) -> bool:
    """Whether a component says it is well; it does so on the loopback, under a certificate of its own making."""
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    return processes.answers(url, unverified)
