#!/usr/bin/env bash
# A throw-away Slurm with two nodes on this machine, for tests/runtime/test_slurm.py. Needs root; no systemd, no cgroups.
#
#   bash tests/slurm_ci.sh install          # Debian's or Ubuntu's packages
#   bash tests/slurm_ci.sh start DIR PORT   # DIR short (unix sockets); uses the ports PORT, PORT+1, PORT+2
#   export SLURM_CONF=DIR/slurm.conf        # then sinfo, sbatch, … speak to it
#   bash tests/slurm_ci.sh stop DIR
set -euo pipefail

install() {
    for name in munged slurmctld slurmd sbatch; do
        command -v "$name" >/dev/null && continue
        export DEBIAN_FRONTEND=noninteractive
        apt-get -o DPkg::Lock::Timeout=120 update -qq
        apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
        return
    done
}

write_configuration() {
    # The nodes claim more cores, memory and GPUs than there are (config_overrides), so that a real job script fits;
    # a "GPU" is a second /dev/null. FirstJobId differs between clusters that run at the same time, as their ports do:
    # job scripts derive their own ports from it. cred_expire lets a requeued job start after 5 s instead of 120.
    cat >"$dir/slurm.conf" <<END
ClusterName=ci
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
FirstJobId=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
DependencyParameters=kill_invalid_depend
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=0
KillWait=5
MinJobAge=3600
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.self
SlurmdPidFile=$dir/slurmd-%n.self
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
NodeName=n[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=64 RealMemory=512000 Gres=gpu:8
PartitionName=ci Nodes=ALL Default=YES State=UP
END
    for number in {0..7}; do mknod "$dir/gpu$number" c 1 3; done
    echo "Name=gpu File=$dir/gpu[0-7]" >"$dir/gres.conf"
    { cat /etc/hosts; echo "127.0.0.1 n1 n2"; } >"$dir/hosts"
}

launch() { # launch NAME COMMAND …
    setsid "${@:2}" >"$dir/$1.out" 2>&1 </dev/null &
    echo $! >"$dir/$1.pid"
}

running() { # running NAME: its number, if it is ours still and neither dead nor a later process with that number
    pid=$(cat "$dir/$1.pid" 2>/dev/null) && tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$dir/"
}

halt() {
    if running "$1"; then
        kill "$pid"
        for _ in $(seq 100); do running "$1" || return 0; sleep 0.05; done
        kill -9 "$pid"
    fi
}

start() {
    [ ${#dir} -le 60 ] || { echo "$dir is too long for unix sockets" >&2; exit 2; }
    umask 022
    mkdir -p "$dir/state" "$dir/spool-n1" "$dir/spool-n2"
    (umask 077; head -c 128 /dev/urandom >"$dir/munge.key")
    write_configuration
    export SLURM_CONF=$dir/slurm.conf

    launch munged munged --foreground --force --num-threads=2 --key-file="$dir/munge.key" \
        --socket="$dir/munge.socket" --pid-file="$dir/munged.self" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
    for _ in $(seq 100); do munge -S "$dir/munge.socket" -n >/dev/null 2>&1 && break; sleep 0.05; done
    launch slurmctld slurmctld -D -i -f "$SLURM_CONF"
    for node in n1 n2; do # each with a host name of its own, and with /etc/hosts that knows both
        # shellcheck disable=SC2016  # expanded by the inner shell
        launch "slurmd-$node" unshare -m -u sh -c \
            'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; exec slurmd -D -f "$2/slurm.conf" -N "$1"' sh "$node" "$dir"
    done
    for _ in $(seq 300); do
        [ "$(timeout 10 sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" != 2 ] || return 0
        sleep 0.1
    done
    echo "Slurm did not come up" >&2
    tail -n 20 "$dir"/*.log "$dir"/*.out >&2
    exit 1
}

stop() {
    export SLURM_CONF=$dir/slurm.conf
    if running slurmctld; then
        timeout 10 scancel -Q --user=root || true
        for _ in $(seq 150); do
            [ -n "$(timeout 10 squeue -h -t running,completing,suspended 2>/dev/null)" ] || break
            sleep 0.1
        done
    fi
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do halt "$name"; done
}

action=${1:-} dir=${2:-} port=${3:-}
case $action in
    install | start | stop) "$action" ;;
    *) echo "usage: $0 install | start DIR PORT | stop DIR" >&2; exit 2 ;;
esac
