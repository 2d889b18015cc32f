#!/usr/bin/env bash
# Starts a server on the default model and measures it at 1, 8 and 32 streams:   scripts/bench.sh [SLIPSTREAM]
set -euo pipefail
slipstream=${1:-slipstream}
port=${PORT:-8090}

"$slipstream" serve --port "$port" --log-level warning &
server=$!
trap 'kill -INT $server 2>/dev/null; wait $server' EXIT
for _ in $(seq 120); do
  kill -0 $server 2>/dev/null || exit 1
  curl --silent --fail --output /dev/null "http://127.0.0.1:$port/ready" && break
  sleep 0.5
done
for streams in 1 8 32; do
  "$slipstream" bench run --url "http://127.0.0.1:$port" --concurrency $streams --num-prompts $((streams * 4)) --ignore-eos
done
