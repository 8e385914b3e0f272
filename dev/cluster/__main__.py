"""The command line: `python -m cluster VERB`. The standard library is enough for it, so `down` needs no environment."""

import argparse
import sys
from pathlib import Path

from cluster import environment, images, status, storage, teardown, up
from cluster.layout import Layout
from cluster.shell import ClusterError, say, step


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster", description="A real one-node Kubernetes without Docker.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("up", help="start the cluster, or whatever of it doesn't run")
    verbs.add_parser("down", help="stop the cluster and remove everything of it but the caches")
    verbs.add_parser("status", help="show what runs; fails unless everything does")
    verbs.add_parser("tools", help="make kubectl and helm under .cluster/bin, without a cluster")
    verbs.add_parser("images", help="build the project's own images and load them into the cluster")
    image = verbs.add_parser("image", help="build or load one image").add_subparsers(dest="action", required=True)
    load = image.add_parser("load", help="import an image that buildah has, or an archive of one, into the cluster")
    load.add_argument("image")
    build = image.add_parser("build", help="build an image with buildah")
    build.add_argument("context", type=Path)
    build.add_argument("dockerfile", type=Path)
    build.add_argument("tag")
    build.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    claim = verbs.add_parser("env-claim", help="make the claim qlora-env (sources and environment) in a namespace")
    claim.add_argument("namespace")
    secret = verbs.add_parser("s3-secret", help="put the S3 gateway's credentials into a Secret of a namespace")
    secret.add_argument("namespace")
    secret.add_argument("--name", default="s3-credentials")
    return parser


def _image(paths: Layout, arguments: argparse.Namespace) -> None:
    if arguments.action == "load":
        images.load(paths, arguments.image)
        return
    images.ensure_base()
    build_arguments = dict(pair.split("=", 1) for pair in arguments.build_arg)
    with step(f"image {arguments.tag}"):
        images.build(arguments.context, arguments.dockerfile, arguments.tag, build_arguments)


def _run(paths: Layout, arguments: argparse.Namespace) -> None:
    match arguments.verb:
        case "up":
            up.up(paths)
        case "down":
            teardown.down(paths)
        case "status":
            status.status(paths)
        case "tools":
            up.tools(paths)
        case "images":
            images.build_project(paths)
        case "image":
            _image(paths, arguments)
        case "env-claim":
            environment.claim(paths, arguments.namespace)
        case "s3-secret":
            storage.write_credentials(paths, arguments.namespace, arguments.name)


def main() -> None:
    """Run one verb; an error that the user can act on is printed without a traceback."""
    try:
        _run(Layout(), _parser().parse_args())
    except ClusterError as error:
        say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
