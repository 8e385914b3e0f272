"""What importing Hugging Face's libraries costs a step, and that they work all the same."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.libraries import NOT_USED, _compile_at_first_call, as_if_absent, importing_much
from tests.unit.trainer.jobs import Job

ROOT = Path(__file__).parents[3]
IMPORT_RECIPE = """
import json, sys
from qlora_trainer.libraries import NOT_USED, as_if_absent
from qlora_trainer.train import import_recipe
with as_if_absent(NOT_USED):
    import_recipe()
from torchvision import IMPORTED
print(json.dumps({"imported": IMPORTED, "compiler": "torch._inductor.compile_fx" in sys.modules}))
"""
RUN_A_STEP = """
import importlib.util, sys, types
from qlora_trainer.__main__ import main
def run(context):
    print("torchvision:", importlib.util.find_spec("torchvision") is not None)
sys.modules["qlora_trainer.train"] = types.SimpleNamespace(run=run)
main(["train"])
"""


@pytest.fixture
def rich_image(tmp_path: Path) -> Path:
    """A folder of packages that the trainer doesn't use, with metadata; each notes that it was imported."""
    folder = tmp_path / "packages"
    for name in NOT_USED:
        (folder / name).mkdir(parents=True)
        noted = "import sys\nIMPORTED = []\nsys.modules['torchvision'].IMPORTED.append(__name__)\n"
        (folder / name / "__init__.py").write_text(noted if name == "torchvision" else "import torchvision\n" + noted)
        metadata = folder / f"{name}-99.0.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0.0\n")
    return folder


def _python(code: str, packages: Path, **environment: str) -> str:
    """What the code prints, in a process of its own that has these packages."""
    path = f"{ROOT}/operator:{ROOT}/trainer_image:{packages}"
    env = {**os.environ, **environment, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Compiler:
    """Stands for torch.compile, and notes what it was asked for."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        self.compiled.append((function.__name__, options))
        return lambda *args, **kwargs: ("compiled", function(*args, **kwargs))


def add(a: int, b: int) -> int:
    return a + b


def test_a_training_imports_neither_what_it_does_not_use_nor_torch_s_compiler(rich_image: Path) -> None:
    # The one that is named was imported by the test itself, afterwards: the packages are given back.
    assert json.loads(_python(IMPORT_RECIPE, rich_image)) == {"imported": ["torchvision"], "compiler": False}


@pytest.mark.parametrize("own_code", [False, True])
def test_code_that_comes_with_a_model_finds_every_package(own_code: bool, job: Job, rich_image: Path) -> None:
    job.remote_code_allowed = own_code
    config = job.change(model={"trustRemoteCode": True}).config()
    assert f"torchvision: {own_code}" in _python(RUN_A_STEP, rich_image, **job.environment(config))


@pytest.mark.parametrize("backend", ["hf", "unsloth"])
def test_unsloth_finds_every_package(backend: str, job: Job, rich_image: Path) -> None:
    config = job.change(training={"backend": backend}).config()
    assert f"torchvision: {backend == 'unsloth'}" in _python(RUN_A_STEP, rich_image, **job.environment(config))


def test_a_package_is_absent_for_a_while(rich_image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(rich_image))
    with as_if_absent(["swanlab"]):
        assert importlib.util.find_spec("swanlab") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("swanlab")
    assert importlib.util.find_spec("swanlab") is not None


def test_a_package_that_is_imported_already_stays() -> None:
    with as_if_absent(["json"]):
        assert importlib.import_module("json") is json


def test_installed_packages_are_read_once() -> None:
    with as_if_absent([]):
        assert importlib.metadata.packages_distributions() is importlib.metadata.packages_distributions()
    assert importlib.metadata.packages_distributions() is not importlib.metadata.packages_distributions()


def test_nothing_that_the_image_holds_is_kept_out() -> None:
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements/trainer.txt").read_text(), re.MULTILINE))
    distributions = importlib.metadata.packages_distributions()
    packages = {name for name, owners in distributions.items() if {owner.lower() for owner in owners} & pinned}
    assert len(packages) > len(pinned) / 2  # the image's set is installed here too
    assert not NOT_USED & (packages | pinned)


def test_the_garbage_collector_rests_while_much_is_imported() -> None:
    with importing_much():
        resting = not gc.isenabled()
    gc.unfreeze()
    assert (resting, gc.isenabled()) == (True, True)


def test_the_garbage_collector_works_again_after_an_import_that_failed() -> None:
    with pytest.raises(ImportError), importing_much():
        raise ImportError
    gc.unfreeze()
    assert gc.isenabled()


@pytest.mark.parametrize("options", [{}, {"dynamic": False}])
def test_a_function_is_compiled_once_when_it_is_called_first(options: dict[str, Any]) -> None:
    compiler = Compiler()
    decorator = partial(_compile_at_first_call, compiler)
    function = decorator(**options)(add) if options else decorator(add)
    assert (function.__name__, compiler.compiled) == ("add", [])
    assert [function(1, b=2), function(3, 4)] == [("compiled", 3), ("compiled", 7)]
    assert compiler.compiled == [("add", options)]
