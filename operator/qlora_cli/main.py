"""Commands and their options. Each command imports what it needs when it runs, so that `qlora --help` is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

# pydantic looks for plugins in every package that is installed: a tenth of a second in the trainer's environment.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


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


@main.command()
@click.argument("manifest", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--gpu", metavar="NAME", help="Plan for this GPU class, whatever the manifest says.")
@click.option(
    "--what-if",
    "questions",
    metavar="FIELD=VALUE",
    multiple=True,
    help="Plan as if a field of the spec were another, such as training.maxSequenceLength=8192. May be repeated.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, path_type=Path),
    help="The model's config.json, or its folder, for models that aren't in the catalogue.",
)
@click.option("--output", "-o", type=click.Choice(["table", "json"]), default="table", show_default=True)
def plan(manifest: Path, gpu: str | None, questions: tuple[str, ...], config: Path | None, output: str) -> None:
    """Show how MANIFEST would be trained, without a cluster: GPU class, memory by component, speed, and why.

    Exits 64 where no GPU class holds it; the message names changes that would do.
    """
    from qlora_cli.manifests import ManifestError
    from qlora_cli.plan import show_plan

    try:
        found = show_plan(manifest, gpu=gpu, questions=questions, config=config, as_json=output == "json")
    except ManifestError as error:
        click.secho(str(error), fg="red", err=True)
        sys.exit(error.exit_code)
    sys.exit(0 if found else ManifestError.exit_code)


@main.command()
@click.argument("manifest", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--config",
    type=click.Path(exists=True, path_type=Path),
    help="The model's config.json, or its folder, for models that aren't in the catalogue.",
)
def render(manifest: Path, config: Path | None) -> None:
    """Print the Jobs that the operator would create for MANIFEST, without a cluster.

    Model revision, data digest and step count are known only once prepare has run; they are marked as such.
    """
    from qlora_cli.manifests import ManifestError
    from qlora_cli.render import render as render_manifest

    try:
        render_manifest(manifest, sys.stdout, config=config)
    except ManifestError as error:
        click.secho(str(error), fg="red", err=True)
        sys.exit(error.exit_code)
