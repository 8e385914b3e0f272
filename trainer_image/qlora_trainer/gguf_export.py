"""GGUF: the merged model for llama.cpp, made by its own converter and quantizer (trainer_image/llama-cpp.sh)."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from qlora_trainer.settings import usable_cpus
from qlorajob.errors import ExitCode, Reason, StepError

logger = logging.getLogger(__name__)

TOOLS = Path(sys.prefix) / "share" / "llama.cpp"
"""Beside the Python that runs this: the converter runs in it, too."""
CONVERTER, QUANTIZER, RUNTIME = "convert_hf_to_gguf.py", "llama-quantize", "llama-completion"
END = " [end of text]\n"
"""What llama-completion adds where the model ends by itself."""
FIELD = "merge.gguf"
CONVERTED: Final = {"f16": "f16", "q8_0": "q8_0"}
"""What the converter writes by itself, by spec.merge.gguf.quantization."""
QUANTIZED: Final = {"q4_k_m": "Q4_K_M"}
"""What the quantizer makes of the converter's best 16-bit type."""
_STOPPED_BY = (signal.SIGKILL, signal.SIGTERM)


def export(model: Path, folder: Path, name: str, quantization: str, *, base: str, trust_remote_code: bool) -> Path:
    """Write a model folder as one GGUF file called after `name` into `folder`, and return its path.

    In the file the model is called `base`, as the one that it was made from: llama.cpp reads some tokenizers by that
    name. Where it found phi3 in the name of a folder, it looked for tokens that only Phi-3 has, and refused the file.
    Takes the disk of the 16-bit file beside the result's, and the memory of a few tensors. Raises StepError.
    """
    path = folder / f"{_safe(name)}-{quantization}.gguf"
    with _readable(model, folder, code=trust_remote_code) as readable:
        if quantization in CONVERTED:
            _convert(readable, path, CONVERTED[quantization], "--model-name", base)
            return path
        exact = folder / "converted.gguf"
        _convert(readable, exact, "auto", "--model-name", base)
    command = [str(TOOLS / QUANTIZER), str(exact), str(path), QUANTIZED[quantization], str(usable_cpus())]
    _run(command, tool=QUANTIZER)
    exact.unlink()
    return path


def answer(file: Path, text: str, max_new_tokens: int, *, bos: str | None = None) -> str:
    """llama.cpp's greedy answer to a text that is put as it is. Raises StepError when the file doesn't work.

    Where the text begins with the token `bos`, as many chat templates write it, llama.cpp adds none before it.
    The file is mapped: where it is larger than the memory, every token reads it anew.
    """
    # A token is a byte or more. The model's own limit may take more memory than its weights.
    longest = len(text.encode()) + max_new_tokens + 8
    alone = ("--override-kv", "tokenizer.ggml.add_bos_token=bool:false") if bos and text.startswith(bos) else ()
    said = _run(
        [
            *(str(TOOLS / RUNTIME), "--model", str(file), "--prompt", text, "--no-escape"),
            *("--predict", str(max_new_tokens), "--ctx-size", str(longest), "--temp", "0"),
            *alone,
            *("--threads", str(usable_cpus()), "--no-conversation", "--no-display-prompt", "--no-warmup"),
        ],
        tool=RUNTIME,
    )
    return said.removesuffix("\n\n").removesuffix(END)


def check(metadata: Path, scratch: Path, *, trust_remote_code: bool) -> None:
    """Refuse a model whose architecture or tokenizer llama.cpp doesn't know: its config and tokenizer tell.

    Args:
        metadata: folder with config and tokenizer; weights aren't looked at.
        scratch: folder for a file of a few MB.
    """
    if not all((TOOLS / tool).exists() for tool in (CONVERTER, QUANTIZER, RUNTIME)):
        message = f"{FIELD}: this trainer image has no llama.cpp; leave it out, or use an image that has it"
        raise StepError(Reason.UNSUPPORTED, message, field=FIELD)
    path = scratch / "vocabulary.gguf"
    with _readable(metadata, scratch, code=trust_remote_code) as readable:
        _convert(readable, path, "f16", "--vocab-only")
    path.unlink()


@contextmanager
def _readable(model: Path, scratch: Path, *, code: bool) -> Iterator[Path]:
    """The model's folder as the converter may see it: it would run Python code in there without asking."""
    with TemporaryDirectory(dir=scratch) as folder:
        for file in model.iterdir():
            if file.is_file() and (code or file.suffix != ".py"):
                (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def _convert(model: Path, path: Path, kind: str, *options: str) -> None:
    # Code of the model's own may want all of transformers.
    runner = () if any(model.glob("*.py")) else ("-m", "qlora_trainer.gguf_converter")
    command = [sys.executable, *runner, str(TOOLS / CONVERTER)]
    _run([*command, str(model), "--outfile", str(path), "--outtype", kind, *options], tool=CONVERTER)


def _run(command: list[str], *, tool: str) -> str:
    """Run a tool; what it wrote to standard output. All that it said goes to the log where it fails."""
    environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        logger.info("%s done", tool)
        return done.stdout
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    logger.error("%s failed", tool, extra={"exit_code": done.returncode, "output": "\n".join(lines[-40:])})
    raise _failure(tool, done.returncode, lines)


def _failure(tool: str, code: int, lines: list[str]) -> StepError | OSError:
    if code < 0 and -code in _STOPPED_BY:
        message = f"{tool} was stopped by signal {-code}, as happens where memory is short; it is tried again"
        return StepError(Reason.OUT_OF_MEMORY, message, field=FIELD, code=ExitCode.TRANSIENT)
    if any(os.strerror(errno.ENOSPC) in line for line in lines):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = next((line.strip() for line in reversed(lines) if _TELLING.search(line)), lines[-1] if lines else "nothing")
    message = f"{FIELD}: llama.cpp can't take this model ({said[:300]}); leave merge.gguf out"
    return StepError(Reason.UNSUPPORTED, message, field=FIELD)


_TELLING = re.compile(r"Error\b|not supported|not recognized|failed to", re.IGNORECASE)


def _safe(name: str) -> str:
    """A file name that every shell and S3 browser takes as it is."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
