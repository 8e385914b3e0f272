"""Commands and their options. Each command imports what it needs when it runs, so that `qlora --help` is instant."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qlora-operator")
def main() -> None:
    """Fine-tune language models in 4 bit from one QLoRAJob manifest."""


@main.command()
@click.argument("manifest", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".qlora"),
    show_default=True,
    help="Scratch space: downloads, checkpoints before their upload, step logs.",
)
@click.option("--allow-remote-code", is_flag=True, help="Let a manifest with trustRemoteCode run the model's code.")
def run(manifest: Path, work_dir: Path, allow_remote_code: bool) -> None:
    """Run MANIFEST here, as local processes: prepare, train, merge. Model, data and output may be file:// URIs.

    S3 credentials come from the usual AWS variables or files, a Hugging Face token from HF_TOKEN.
    """
    from qlora_cli.local import StepFailed, run_manifest
    from qlora_cli.manifests import ManifestError

    try:
        run_manifest(manifest, work_dir=work_dir, allow_remote_code=allow_remote_code)
    except (ManifestError, StepFailed) as error:
        click.secho(str(error), fg="red", err=True)
        sys.exit(error.exit_code)


@main.command()
@click.argument("name")
@click.option("--namespace", "-n", help="Namespace of the QLoRAJob; the current context's by default.")
@click.option("--timeout", type=float, help="Give up after this many seconds.")
def watch(name: str, namespace: str | None, timeout: float | None) -> None:
    """Show the progress of the QLoRAJob NAME on the cluster until it ends. Exits 1 when it failed."""
    from qlora_cli.watch import watch_job

    try:
        succeeded = watch_job(name, namespace=namespace, timeout=timeout)
    except (LookupError, TimeoutError) as error:
        raise click.ClickException(str(error)) from None
    sys.exit(0 if succeeded else 1)
