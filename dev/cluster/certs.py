"""Keys, certificates and kubeconfigs: the cluster's own authority signs an identity for each component."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from cluster import layout
from cluster.layout import Layout
from cluster.shell import Command, run

_DAYS = "3650"
_API_NAMES = (
    "DNS:kubernetes",
    "DNS:kubernetes.default",
    "DNS:kubernetes.default.svc",
    f"DNS:kubernetes.default.svc.{layout.DNS_DOMAIN}",
    "DNS:localhost",
    "IP:127.0.0.1",
    f"IP:{layout.NODE_ADDRESS}",
    f"IP:{layout.API_SERVICE_ADDRESS}",
)
_KUBELET_NAMES = (f"DNS:{layout.NODE_NAME}", f"IP:{layout.NODE_ADDRESS}", "IP:127.0.0.1")


@dataclass(frozen=True)
class Identity:
    """One certificate: who it is for Kubernetes' authorizer, and under which names it serves."""

    name: str
    user: str
    group: str = ""
    serves: tuple[str, ...] = ()
    authority: str = "ca"

    @property
    def subject(self) -> str:
        """The subject in OpenSSL's notation: Kubernetes reads the user from CN and the group from O."""
        return (f"/O={self.group}" if self.group else "") + f"/CN={self.user}"


IDENTITIES = (
    Identity("apiserver", "kube-apiserver", serves=_API_NAMES),
    Identity("apiserver-kubelet-client", "kube-apiserver-kubelet-client", "system:masters"),
    Identity("front-proxy-client", "front-proxy-client", authority="front-proxy-ca"),
    Identity("admin", "kubernetes-admin", "system:masters"),
    Identity("kube-controller-manager", "system:kube-controller-manager"),
    Identity("kube-scheduler", "system:kube-scheduler"),
    Identity("kube-proxy", "system:kube-proxy"),
    Identity("kubelet", f"system:node:{layout.NODE_NAME}", "system:nodes"),
    Identity("kubelet-server", f"system:node:{layout.NODE_NAME}", "system:nodes", serves=_KUBELET_NAMES),
)
KUBECONFIGS = ("kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet")


def make_all(paths: Layout) -> None:
    """Make whatever is missing: authorities first, then the identities they sign, then the kubeconfigs."""
    for authority in ("ca", "front-proxy-ca"):
        _authority(paths.pki, authority)
    for identity in IDENTITIES:
        _identity(paths.pki, identity)
    signing_key = paths.pki / "service-accounts.key"
    if not signing_key.exists():
        _key(signing_key)
        run(["openssl", "ec", "-in", signing_key, "-pubout", "-out", paths.pki / "service-accounts.pub"])
    for name in KUBECONFIGS:
        _kubeconfig(paths, name, paths.config / f"{name}.kubeconfig")
    _kubeconfig(paths, "admin", paths.kubeconfig)


def _key(path: Path) -> None:
    run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path])
    path.chmod(0o600)


def _authority(pki: Path, name: str) -> None:
    certificate, key = pki / f"{name}.crt", pki / f"{name}.key"
    if certificate.exists():
        return
    _key(key)
    subject = ["-subj", f"/CN=qlora-operator local cluster {name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    run(["openssl", "req", "-x509", "-new", "-key", key, "-days", _DAYS, *subject, "-out", str(certificate)])


def _identity(pki: Path, identity: Identity) -> None:
    certificate, key = pki / f"{identity.name}.crt", pki / f"{identity.name}.key"
    if certificate.exists():
        return
    _key(key)
    request, extensions = pki / f"{identity.name}.csr", pki / f"{identity.name}.ext"
    run(["openssl", "req", "-new", "-key", key, "-subj", identity.subject, "-out", request])
    lines = ["keyUsage=critical,digitalSignature", "extendedKeyUsage=clientAuth,serverAuth"]
    if identity.serves:
        lines.append(f"subjectAltName={','.join(identity.serves)}")
    extensions.write_text("\n".join(lines) + "\n")
    signer: Command = ["-CA", pki / f"{identity.authority}.crt", "-CAkey", pki / f"{identity.authority}.key"]
    signed: Command = ["-in", request, "-days", _DAYS, "-extfile", extensions, "-out", certificate]
    run(["openssl", "x509", "-req", *signer, "-CAcreateserial", *signed])
    request.unlink()
    extensions.unlink()


def _kubeconfig(paths: Layout, name: str, target: Path) -> None:
    """Write a kubeconfig (JSON is YAML) that needs no other file."""

    def data(file: str) -> str:
        return base64.b64encode((paths.pki / file).read_bytes()).decode()

    cluster = {"server": paths.endpoints.api, "certificate-authority-data": data("ca.crt")}
    user = {"client-certificate-data": data(f"{name}.crt"), "client-key-data": data(f"{name}.key")}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "qlora-local", "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "qlora-local", "context": {"cluster": "qlora-local", "user": name}}],
        "current-context": "qlora-local",
    }
    target.touch(mode=0o600)
    target.write_text(json.dumps(config, indent=2) + "\n")
