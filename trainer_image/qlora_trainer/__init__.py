"""The trainer image: `prepare`, `train` and `merge`, one readable file per command.

`python -m qlora_trainer prepare|train|merge` reads its RunConfig from the environment and leaves a RunReport behind.
"""

import os
import signal

if os.getpid() == 1:
    # A container's process 1: the kernel drops what it has no handler for, and until StopSignal is there, libraries are
    # imported. A pod that is asked to stop meanwhile would hold its GPU for the whole grace period.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
