#!/usr/bin/env bash
# Measurements on a GPU machine, one after the other, in a command of less than ten minutes (bench/README.md):
#   bench/session.sh PART[:SECONDS]...
#
# Every part has a time limit of its own, and none begins that the command's own limit would cut off. After each part
# what there is so far is in $OUT: results.tar.gz, laid out like docs/results, and logs.tar.gz.
set -u
out="${OUT:-/tmp/bench-out}"
scratch="${SCRATCH:-/tmp/bench-session}"
results="$scratch/results" logs="$scratch/logs" model=/tmp/weights/SmolLM2-135M-Instruct
deadline=$((SECONDS + ${LIMIT_SECONDS:-570}))
mkdir -p "$out" "$results/speed" "$results/vram" "$logs"
# What is there already is gone on with, not measured again.
cp -n docs/results/recipes.json "$results/"
cp -n docs/results/speed/results.json "$results/speed/"
cp -n docs/results/speed/curves-*.json "$results/speed/" 2> /dev/null
if [ -d docs/results/quality ]; then cp -rn docs/results/quality "$results/"; fi

keep() {
  tar -czf "$out/results.tar.gz" -C "$results" .
  tar -czf "$out/logs.tar.gz" -C "$logs" .
}

# part NAME SECONDS ARGUMENTS...: bench/device.sh with these; its output goes to a log, whose end is shown.
part() {
  local name="$1" limit="$2" left=$((deadline - SECONDS)) began=$SECONDS code
  shift 2
  if [ "$left" -lt 20 ]; then echo "== $name: no time left"; return; fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  timeout --signal=INT --kill-after=10 "$limit" bench/device.sh "$@" > "$logs/$name.log" 2>&1
  code=$?
  echo "== $name: exit $code after $((SECONDS - began)) s of $limit"
  tail -n 12 "$logs/$name.log" | cut -c 1-300
  keep
}

# quality NAME SECONDS DATA ARGUMENTS...
quality() {
  part "$1" "$2" python -m bench.quality --model "$model" --data ".bench/data/$3.jsonl" --out "$results" --workers 8 "${@:4}"
}

# measure PART SECONDS (0: as many as it may take)
measure() {
  local limit=$(($2 > 0 ? $2 : 600))
  case "$1" in
    startup) part "$1" "$limit" python -m bench.startup ${FILES:+--files $FILES} --out "$results/speed" ;;
    recipes) part "$1" "$limit" python -m bench.recipes --missing --out "$results" ;;
    # What --rounds asks for and there is no time for is gone on with by the same command, another day.
    speed) part "$1" "$limit" python -m bench.train --rounds 3 --steps 12 --warmup 4 --limit 120 --out "$results/speed" ;;
    quality) quality "$1" "$limit" languages --rank 16 64 --steps ${STEPS:-200 400} ;;
    quality-gsm8k) quality "$1" "$limit" gsm8k --rank 16 64 --steps ${STEPS:-200 400} --rows 8 --length 512 ;;
    curves-real) part "$1" "$limit" python -m bench.curves "$model" --name smollm2-135m --seeds 0 1 --out "$results/speed" ;;
    curves-random) part "$1" "$limit" python -m bench.curves tinyllama-1b --seeds 0 1 --out "$results/speed" ;;
    longest) part "$1" "$limit" python -m bench.train.worker ours 8b-131k --steps 1 --warmup 0 ;;
    profile) part "$1" "$limit" python -m bench.train.worker ours 8b-offload 8b-auto --steps 8 --warmup 4 --profile ;;
    # Lines that are printed one by one are results themselves, whatever ends the part.
    vram)
      part "$1" "$limit" python -m bench.vram.worker
      cp "$logs/vram.log" "$results/vram/measured.jsonl" && keep
      ;;
    tests) part "$1" "$limit" test ${TESTS:-tests/gpu} --deselect tests/gpu/test_out_of_memory.py ;;
    out-of-memory) part "$1" "$limit" test tests/gpu/test_out_of_memory.py ;;
    *) echo "== $1: no such part" ;;
  esac
}

part setup 90 setup
for carried in .bench/part-*; do
  if [ -d "$carried" ]; then part "weights-${carried##*-}" 90 weights "$carried"; fi
done
for wanted in "$@"; do
  name="${wanted%%:*}" seconds=0
  if [ "$name" != "$wanted" ]; then seconds="${wanted#*:}"; fi
  measure "$name" "$seconds"
done
keep
