#!/usr/bin/env bash
# Everything of hmpo that needs a GPU, in at most eight minutes; what is measured is kept part by part.
#
#   scripts/gpu_check.sh                    all parts, in order of value
#   scripts/gpu_check.sh smoke head         some of them
#   GPU_CHECK_DEVICE=cpu scripts/gpu_check.sh   the same lines on a CPU, at tiny sizes
#
# Results and one log, at most 10 files, go to $OUT (gpu-results where it is not set) as they come.
# hmpo need not be installed.
# OUT             folder of the results
# GPU_CHECK_MODEL folder of SmolLM2-135M-Instruct; else the fetched one, else random weights
# BENCH_COMMIT    name of the commit, where there is no git
# PYTHON          interpreter with torch (python3)
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${GPU_CHECK_DEVICE:-cuda}
out=$(mkdir -p "${OUT:-gpu-results}" && cd "${OUT:-gpu-results}" && pwd)
export BENCH_RESULTS=$out
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
tiny=() workers=8 slower=1
if [ "$device" = cpu ]; then
  tiny=(--tiny) workers=0 slower=5
  export CUDA_VISIBLE_DEVICES="" TRITON_INTERPRET=1
fi
log=$out/gpu_check_$device.log
table=()
failed=0

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * slower)) began=$SECONDS code how
  shift 2
  echo "== $name: $* (at most $limit s)" | tee -a "$log"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log" | cut -c1-400
  code=${PIPESTATUS[0]}
  case $code in 0) how=ok ;; 124 | 137) how=timeout ;; *) how="failed ($code)" ;; esac
  [ "$code" = 0 ] || failed=1
  table+=("$(printf '%-10s %5d s  %s' "$name" $((SECONDS - began)) "$how")")
}

run() { # one part by name
  case $1 in
    env) part env 20 "$python" benchmarks/gpu_smoke.py --environment ;;
    kernels) part kernels 40 "$python" -m pytest -q -o addopts= -o filterwarnings=default \
      -p no:cacheprovider -n "$workers" tests/logprobs/triton_cases.py ;;
    smoke) part smoke 60 "$python" benchmarks/gpu_smoke.py --device "$device" ;;
    head) part head 40 "$python" benchmarks/bench_gpu.py "${tiny[@]}" --device "$device" --part head ;;
    muonclip) part muonclip 60 "$python" benchmarks/bench_muonclip.py kernels ;;
    generate) part generate 65 "$python" benchmarks/bench_gpu.py "${tiny[@]}" --device "$device" \
      --part generate ;;
    smollm2) part smollm2 30 "$python" benchmarks/bench_gpu.py "${tiny[@]}" --device "$device" \
      --part smollm2 --model "${GPU_CHECK_MODEL:-smollm2}" ;;
    update) part update 50 "$python" benchmarks/bench_gpu.py "${tiny[@]}" --device "$device" \
      --part update ;;
    qlora | memory) part "$1" $([ "$1" = qlora ] && echo 35 || echo 80) \
      "$python" benchmarks/gpu_memory.py "${tiny[@]}" --device "$device" --part "$1" ;;
    *) echo "gpu_check.sh: no part $1" >&2 && exit 2 ;;
  esac
}

: >"$log"
for name in "${@:-}"; do
  if [ -z "$name" ]; then
    for each in env kernels smoke head muonclip generate smollm2 update qlora memory; do run "$each"; done
  else
    run "$name"
  fi
done
{
  echo "== part, time, how it ended"
  printf '%s\n' "${table[@]}"
} | tee -a "$log"
exit "$failed"
