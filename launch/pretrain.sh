#!/usr/bin/env bash
''':'
# Pretrain on every slot of a hostfile. Both of these work, and do the same:
#
#     launch/pretrain.sh --hostfile launch/hostfile.example --preset tiny --codes codes.safetensors --data shards --out run
#     deepspeed launch/pretrain.sh --hostfile launch/hostfile.example --preset tiny ...
#
# Launcher options (--hostfile, --include, --num_gpus, --master_port, ...) go to `deepspeed`, the rest to
# `python -m ksub_ds.pretrain`; launch/pretrain.sh --help lists both. No hyper-parameters live here.
#
# Two programs read this file. DeepSpeed gives what stands behind a script to the script, the hostfile
# too, and starts it as `python -u launch/pretrain.sh --local_rank=0 --hostfile FILE ...` on one machine.
# So to Python this part is a string, and to the shell all but this part is one.
set -eu
script=$0
if [ -n "${SLURM_SUBMIT_DIR:-}" ] && [ "${script##*/}" = slurm_script ]; then
    script=$SLURM_SUBMIT_DIR/launch/pretrain.sh # sbatch runs a copy from its spool folder
fi
root=$(cd "$(dirname "$script")/.." && pwd)
if ! command -v deepspeed >/dev/null && [ -x "$root/.venv/bin/deepspeed" ]; then
    PATH=$root/.venv/bin:$PATH
fi
if ! command -v deepspeed >/dev/null; then
    echo 'error: deepspeed is not on the PATH; run "make install", or activate the environment that has it' >&2
    exit 2
fi
if command -v python >/dev/null; then python=python; else python=python3; fi
exec "$python" "$script" "$@"
: <<'PYTHON'
'''

import os
import re
import runpy
import socket
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TAKES_VALUE = (
    "-H --hostfile -i --include -e --exclude --num_nodes --num_gpus --num_accelerators --master_addr --master_port "
    "--node_rank --launcher --launcher_args --ssh_port --bind_core_list --venv_script --log_level --enable_each_rank_log"
).split()
TAKES_NONE = "--no_ssh --no_ssh_check --force_multi --bind_cores_to_rank --save_pid -q --quiet".split()
# pdsh hands on only PYTHON*, NCCL* and a few others; these reach other hosts by ./.deepspeed_env. Secrets
# do not, and neither do values that a shell could read as more than a word: DeepSpeed does not quote them.
TRAVELS = re.compile(r"(HF_|OMP_|MKL_|TORCH_|TOKENIZERS_|KSUB_|WANDB_|DS_|CUDA_HOME$|LD_LIBRARY_PATH$)")
SECRET = re.compile(r"TOKEN$|KEY|SECRET|PASSWORD")
PLAIN_WORD = re.compile(r"[\w@%+=:,./-]*")


def fail(text):
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


def split_arguments(arguments):
    """(launcher options as {name: value or None}, the trainer's arguments)."""
    options, rest = {}, []
    arguments = iter(arguments)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in TAKES_VALUE:
            value = value if equals else next(arguments, None)
            if not value:
                fail(f"{name}: needs a value")
            options[{"-H": "--hostfile", "-i": "--include", "-e": "--exclude"}.get(name, name)] = value
        elif argument in TAKES_NONE:
            options[argument] = None
        elif name not in ("--local_rank", "--local-rank"):
            rest.append(argument)
    return options, rest


def read_hostfile(path):
    """{host: slots}. A hostfile that DeepSpeed would pass over in silence is an error here."""
    try:
        with open(path, encoding="utf-8") as stream:
            lines = stream.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--hostfile {path}: cannot be read ({getattr(error, 'strerror', error)})")
    hosts = {}
    for number, line in enumerate(lines, 1):
        line = line.split("#")[0].strip()
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if not line:
            continue
        if not found:
            fail(f"--hostfile {path}: line {number} is {line!r}, not `host slots=N`")
        host, slots = found[1], int(found[2])
        if host in hosts:
            fail(f"--hostfile {path}: line {number} names {host!r} again; give each host one line")
        if slots < 1:
            fail(f"--hostfile {path}: line {number} gives {host!r} no slots; write slots=1 or more, or remove the line")
        hosts[host] = slots
    if not hosts:
        fail(f"--hostfile {path}: names no host; write lines such as `localhost slots=2`")
    return hosts


def chosen_hosts(hosts, options):
    """The hosts that --include or --exclude leave."""
    for name in ("--include", "--exclude"):
        parts = [part for part in options.get(name, "").split("@") if part]
        unknown = [part for part in parts if part.split(":")[0] not in hosts]
        if unknown:
            fail(f"{name} {options[name]}: {unknown[0]!r} is not in the hostfile")
        named = {part.split(":")[0] for part in parts}
        if parts and name == "--include":
            return [host for host in hosts if host in named]
        whole = {part for part in parts if ":" not in part}
        hosts = {host: slots for host, slots in hosts.items() if host not in whole}
    return list(hosts)


def is_this_machine(host):
    if host in ("localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        with socket.socket() as probe:  # an address can be bound only where it lives
            probe.bind((socket.gethostbyname(host), 0))
        return True
    except OSError:
        return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def write_environment_file():
    """Let the variables that matter travel; one that is there already is the user's and stays."""
    if not os.path.exists(".deepspeed_env"):
        with open(".deepspeed_env", "w", encoding="utf-8") as stream:
            for name, value in sorted(os.environ.items()):
                if TRAVELS.match(name) and not SECRET.search(name) and PLAIN_WORD.fullmatch(value):
                    stream.write(f"{name}={value}\n")


def start(options, rest):
    """Replace this process by `deepspeed`, which starts one rank per slot."""
    for name in ("RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT CROSS_RANK CROSS_SIZE").split():
        os.environ.pop(name, None)
    if "--hostfile" in options:
        hosts = chosen_hosts(read_hostfile(options["--hostfile"]), options)
        if not hosts:
            fail("--exclude leaves no host")
        if len(hosts) == 1 and is_this_machine(hosts[0]) and "--force_multi" not in options:
            # One machine needs no sshd, and two runs on it must not meet on one port.
            options.setdefault("--no_ssh_check", None)
            options.setdefault("--master_addr", "127.0.0.1")
            options.setdefault("--master_port", free_port())
            if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
                os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would say so in a warning per process
        else:
            write_environment_file()
            os.environ.setdefault("PDSH_SSH_ARGS_APPEND", "-o ServerAliveInterval=15 -o ServerAliveCountMax=4")
    else:
        options.setdefault("--master_port", free_port())
    if not {"--log_level", "-q", "--quiet"} & options.keys():
        options["--log_level"] = "warning"
    command = ["deepspeed"]
    for name, value in options.items():
        command += [name] if value is None else [name, value]
    os.execvp("deepspeed", [*command, "--no_local_rank", "--module", "ksub_ds.pretrain", *rest])


def main():
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    options, rest = split_arguments(sys.argv[1:])
    under_launcher = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if {"-h", "--help"} & set(rest):
        print("launcher options, for deepspeed:", " ".join(TAKES_VALUE + TAKES_NONE), "\n", flush=True)
        os.execv(sys.executable, [sys.executable, "-m", "ksub_ds.pretrain", "--help"])
    if under_launcher and not options:  # `deepspeed [options] launch/pretrain.sh ARGS`: the ranks are right
        sys.path.insert(0, ROOT)
        sys.argv = [sys.argv[0], *rest]
        runpy.run_module("ksub_ds.pretrain", run_name="__main__", alter_sys=True)
    elif under_launcher and os.environ.get("LOCAL_RANK", "0") != "0":
        sys.exit(0)  # one such process per slot or GPU was started; the first one starts the run
    else:
        if under_launcher:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # the outer launcher's choice for one rank
        start(options, rest)


main()
PYTHON = ""
PYTHON
