"""Wheels that travel to a GPU machine, made small."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from bench.wheels import PACKAGES, pins, strip


def test_every_package_is_taken_at_its_pinned_version() -> None:
    assert [pin.partition("==")[0] for pin in pins()] == list(PACKAGES)


@pytest.mark.parametrize(
    ("wheel", "kept", "dropped"),
    [
        ("bitsandbytes-1-py3-none-any.whl", "bitsandbytes/libbitsandbytes_cuda130.so", "bitsandbytes/libcuda118.so"),
        ("unsloth-1-py3-none-any.whl", "unsloth/models/llama.py", "studio/frontend/dist/index.js"),
        (
            "botocore-1-py3-none-any.whl",
            "botocore/data/s3/2006-03-01/service-2.json",
            "botocore/data/ec2/1/service.json",
        ),
        ("botocore-1-py3-none-any.whl", "botocore/data/partitions.json", "botocore/data/sqs/1/service.json"),
    ],
)
def test_a_wheel_keeps_what_the_machine_needs(wheel: str, kept: str, dropped: str, tmp_path: Path) -> None:
    path = tmp_path / wheel
    with zipfile.ZipFile(path, "w") as file:
        for name in (kept, dropped):
            file.writestr(name, name)
    strip(path)
    with zipfile.ZipFile(path) as file:
        assert file.namelist() == [kept]
        assert file.read(kept).decode() == kept
