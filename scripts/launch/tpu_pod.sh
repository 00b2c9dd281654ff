#!/bin/sh
# On every worker of a TPU pod slice. Usage, from one's own machine, with the provider's ssh command for all workers:
#   ... ssh NAME --worker=all --command="cd dsv3_jax && scripts/launch/tpu_pod.sh train configs/v3_671b.yaml parallel.fsdp=-1"
# Workers find each other by TPU_WORKER_HOSTNAMES and TPU_WORKER_ID. Where an image does not set these (bare TPU VMs), set
# DSV3_COORDINATOR (worker 0's address and a port), DSV3_PROCESSES and DSV3_PROCESS_ID instead.
set -eu
: "${DSV3_COORDINATOR:=}" "${TPU_WORKER_HOSTNAMES:=}"
if [ -z "$DSV3_COORDINATOR$TPU_WORKER_HOSTNAMES" ]; then
    echo "tpu_pod.sh: neither TPU_WORKER_HOSTNAMES nor DSV3_COORDINATOR is set on $(hostname)" >&2
    exit 2
fi
[ -n "$DSV3_COORDINATOR" ] || unset DSV3_COORDINATOR
exec .venv/bin/dsv3 "$@"
