#!/usr/bin/env bash
# A GPU session in commands of less than ten minutes each: bench/session.sh 1|2|3|4 (bench/README.md).
#
# Every part has a time limit of its own, and none begins that the command's own limit would cut off. After each part
# what there is so far is in $OUT: results.tar.gz, laid out like docs/results, and logs.tar.gz.
set -u
number="$1"
out="${OUT:-/tmp/bench-out}"
scratch="${SCRATCH:-/tmp/bench-session}"
results="$scratch/results" logs="$scratch/logs"
deadline=$((SECONDS + ${LIMIT_SECONDS:-570}))
mkdir -p "$out" "$results/speed" "$results/vram" "$logs"
# What is there already is gone on with, not measured again.
cp -rn docs/results/recipes.json "$results/" 2> /dev/null
cp -rn docs/results/speed/results.json "$results/speed/" 2> /dev/null

keep() {
  tar -czf "$out/results.tar.gz" -C "$results" .
  tar -czf "$out/logs.tar.gz" -C "$logs" .
}

# part NAME SECONDS COMMAND...: its output goes to a log, whose end is shown.
part() {
  local name="$1" limit="$2" left=$((deadline - SECONDS)) began=$SECONDS code
  shift 2
  if [ "$left" -lt 20 ]; then echo "== $name: no time left"; return; fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  timeout --signal=INT --kill-after=10 "$limit" "$@" > "$logs/$name.log" 2>&1
  code=$?
  echo "== $name: exit $code after $((SECONDS - began)) s of $limit"
  tail -n 12 "$logs/$name.log" | cut -c 1-300
  keep
}

device() { part "$1" "$2" bench/device.sh "${@:3}"; }
# Lines that are printed one by one are results themselves, whatever ends the part.
vram() { part vram "$1" bash -c "bench/device.sh python -m bench.vram.worker >> '$results/vram/measured.jsonl'"; }
weights() { if [ -d ".bench/part-$1" ]; then device "weights-$1" 90 weights ".bench/part-$1"; fi; }

device "setup-$number" 90 setup
case "$number" in
  1)
    weights 0
    device recipes 400 python -m bench.recipes --missing --out "$results"
    device tests 130 test tests/gpu --deselect tests/gpu/test_out_of_memory.py
    ;;
  2)
    weights 1
    # What --rounds asks for and there is no time for is gone on with by the same command, another day.
    device train 470 python -m bench.train --rounds 3 --steps 12 --warmup 4 --limit 180 --out "$results/speed"
    ;;
  3)
    weights 2
    model=/tmp/weights/SmolLM2-135M-Instruct
    if [ -f "$model/config.json" ]; then
      device quality 330 python -m bench.quality --model "$model" --data .bench/data/languages.jsonl --out "$results"
      device curves-smollm2 170 python -m bench.curves "$model" --name smollm2-135m --seeds 0 1 --out "$results/speed"
    else
      echo "== real weights: not all parts were carried"
    fi
    ;;
  4) # for a session of its own, with what is left of the others
    device startup 240 python -m bench.startup --out "$results/speed"
    vram 200
    device out-of-memory 150 test tests/gpu/test_out_of_memory.py
    device curves-random 200 python -m bench.curves tinyllama-1b --seeds 0 1 --out "$results/speed"
    device longest 120 python -m bench.train.worker ours 8b-131k --steps 1 --warmup 0
    ;;
esac
keep
