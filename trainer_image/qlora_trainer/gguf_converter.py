"""llama.cpp's converter in a process of its own: python -m qlora_trainer.gguf_converter CONVERTER ARGUMENT...

It takes configs and tokenizers from transformers and computes with torch alone. So transformers is imported as if torch
were absent: with its model classes, importing would take more CPU time than converting a small model.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from qlora_trainer.libraries import import_transformers

if __name__ == "__main__":
    import_transformers(with_torch=False)
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
