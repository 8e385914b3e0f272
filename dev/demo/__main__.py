"""`python -m demo install | run`: what `make cluster-up` and `make demo` call."""

from __future__ import annotations

import sys

import click

from cluster.shell import ClusterError
from demo.install import install
from demo.run import run
from demo.target import find
from demo.verify import VerificationError


@click.command()
@click.argument("verb", type=click.Choice(["install", "run"]))
def main(verb: str) -> None:
    """Install the operator on the cluster, or run the demo there."""
    try:
        {"install": install, "run": run}[verb](find())
    except (ClusterError, VerificationError, TimeoutError, LookupError) as error:
        click.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
