#!/usr/bin/env bash
# One piece of a run on a GPU machine that nothing reaches: installs the carried wheels, runs what the arguments say.
#   bench/device.sh setup | weights PART | test [ARGS] | one VARIANT CASE... | python ARGS
set -u
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=/tmp/bytecode # the first process compiles, as the image's build does
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false UNSLOTH_DISABLE_STATISTICS=1
export PYTHONPATH=/tmp/site:.:operator:trainer_image:dev
case "$1" in
  setup)  # which compiles to bytecode too, as the trainer's image does
    test -e /tmp/site/.done && exit 0
    python3 -m pip install -q --no-index --no-deps --no-cache-dir --upgrade --target /tmp/site .whl/*.whl &&
      touch /tmp/site/.done ;;
  weights) python3 -m bench.weights take "$2" /tmp/weights ;;
  test)
    if [ $# -eq 1 ]; then set -- test tests/gpu; fi
    python3 -m pytest -c /dev/null --rootdir . --noconftest -q -s -p no:cacheprovider "${@:2}" ;;
  one) timeout "${LIMIT:-90}" python3 -m bench.train.worker "${@:2}" ;;
  python) python3 "${@:2}" ;;
esac
