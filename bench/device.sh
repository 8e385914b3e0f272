#!/usr/bin/env bash
# What a device run does: install the carried wheels, run what the arguments say.  bench/device.sh setup|test|one ARGS
set -u
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false UNSLOTH_DISABLE_STATISTICS=1
export PYTHONPATH=/tmp/site:.:operator:trainer_image
case "$1" in
  setup) python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl ;;
  test) timeout 150 python3 -m pytest -c /dev/null --rootdir . --noconftest -q -p no:cacheprovider tests/gpu "${@:2}" ;;
  one) timeout "${LIMIT:-90}" python3 -m bench.train.worker "${@:2}" ;;
esac
