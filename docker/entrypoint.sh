#!/bin/sh
# What `docker run IMAGE …` means: options of `slipstream serve`, or a command of slipstream. People also write
# `docker run IMAGE slipstream serve …`, as other images want it, and Kubernetes' args repeat what is here already.
set -eu
command=
while [ "${1:-}" = slipstream ] || [ "${1:-}" = serve ]; do
  [ "$1" = slipstream ] || command=serve
  shift
done
case "${1:-}" in
  "" | -*) command=serve ;;
esac
exec slipstream ${command:+"$command"} "$@"
