"""The S3 server of the cluster: VersityGW as a pod under the restricted Pod Security Standard."""

import json
import os
import secrets

from cluster import kubectl, layout, templates
from cluster.layout import Layout
from cluster.shell import ClusterError, step

SERVICE = "s3"
PORT = 9000
IN_CLUSTER_ENDPOINT = f"http://{SERVICE}.{layout.DEV_NAMESPACE}.svc:{PORT}"
REGION = "us-east-1"
_ROOT_SECRET = "s3-root"  # noqa: S105 - the Secret's name
_NOBODY = 65532


def start(paths: Layout) -> None:
    """Deploy the gateway, wait for it, and write its address and credentials for the host."""
    for directory in (paths.s3_data, paths.s3_data / "buckets", paths.s3_data / "iam"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chown(directory, _NOBODY, _NOBODY)
    with step(f"S3 gateway at {IN_CLUSTER_ENDPOINT}"):
        if not kubectl.exists(paths, "secret", _ROOT_SECRET, layout.DEV_NAMESPACE):
            generated = {"AWS_ACCESS_KEY_ID": "qlora-local-root", "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30)}
            _write_secret(paths, layout.DEV_NAMESPACE, _ROOT_SECRET, generated)
        kubectl.apply(paths, templates.render(paths, "manifests/s3.yaml", s3_data=paths.s3_data))
        kubectl.wait_for_deployment(paths, layout.DEV_NAMESPACE, SERVICE)
    service = kubectl.get(paths, "-n", layout.DEV_NAMESPACE, "service", SERVICE)
    values = {
        **credentials(paths),
        "AWS_ENDPOINT_URL": f"http://{service['spec']['clusterIP']}:{PORT}",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
    }
    paths.s3_env.touch(mode=0o600)
    paths.s3_env.write_text("".join(f"{name}={value}\n" for name, value in values.items()))


def credentials(paths: Layout) -> dict[str, str]:
    """The gateway's root credentials under the names that every AWS client reads."""
    if not kubectl.exists(paths, "secret", _ROOT_SECRET, layout.DEV_NAMESPACE):
        raise ClusterError("the S3 gateway has no credentials yet: run `make cluster-up`")
    template = '{{range $name, $value := .data}}{{$name}}={{$value | base64decode}}{{"\\n"}}{{end}}'
    secret = ("-n", layout.DEV_NAMESPACE, "get", "secret", _ROOT_SECRET, "-o", f"go-template={template}")
    lines = kubectl.kubectl(paths, *secret).splitlines()
    return dict(line.split("=", 1) for line in lines if line)


def write_credentials(paths: Layout, namespace: str, name: str) -> None:
    """Put the credentials into a namespace's Secret, for jobs to refer to."""
    _write_secret(paths, namespace, name, credentials(paths))


def _write_secret(paths: Layout, namespace: str, name: str, values: dict[str, str]) -> None:
    metadata = {"name": name, "namespace": namespace}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values}
    kubectl.apply(paths, json.dumps(secret))
