"""The catalogue of well-known models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_vram import catalog

ROOT = Path(__file__).parents[3]


def test_names_are_unique_whatever_their_case() -> None:
    names = [name.casefold() for entry in catalog.entries() for name in entry.names]
    assert len(catalog.entries()) >= 40
    assert len(names) == len(set(names))


@pytest.mark.parametrize("entry", catalog.entries(), ids=lambda entry: entry.names[0])
def test_every_entry_has_facts_and_plausible_files(entry: catalog.Entry) -> None:
    facts = catalog.lookup(entry.names[-1])
    assert facts is not None
    assert facts.weight_bytes == entry.weight_bytes
    # Two or four bytes a parameter; some files hold a shared head twice, or buffers.
    assert min(entry.weight_bytes / (size * facts.parameters) - 1 for size in (2, 4)) >= -0.51
    assert any(0 <= entry.weight_bytes / (size * facts.parameters) - 1 < 0.3 for size in (2, 4))


def test_a_name_is_found_in_any_case_and_an_unknown_one_is_not() -> None:
    assert catalog.lookup("META-LLAMA/meta-llama-3-8b") == catalog.lookup("meta-llama/Meta-Llama-3-8B")
    assert catalog.lookup("meta-llama/Meta-Llama-3-9B") is None


def test_nothing_heavy_is_imported_for_it() -> None:
    script = (
        "import sys; from qlora_vram import catalog; assert catalog.lookup('Qwen/Qwen2-7B'); "
        "print(sorted({'torch', 'transformers', 'numpy', 'yaml', 'rich'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env={"PYTHONPATH": f"{ROOT}/operator"}, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
