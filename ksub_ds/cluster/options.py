"""The command line of launch/pretrain.sh: launcher options apart, everything else for the trainer."""

from dataclasses import dataclass, field

from ksub_ds.common.errors import UserError

# DeepSpeed's own, passed on as they are.
TAKES_VALUE = (
    *("--hostfile", "--include", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators", "--master_addr"),
    *("--master_port", "--node_rank", "--launcher", "--launcher_args", "--ssh_port", "--bind_core_list"),
    *("--venv_script", "--log_level", "--enable_each_rank_log"),
)
TAKES_NONE = ("--no_ssh", "--no_ssh_check", "--force_multi", "--bind_cores_to_rank", "--save_pid", "-q", "--quiet")
SHORT = {"-H": "--hostfile", "-i": "--include", "-e": "--exclude"}
# Ours.
OURS = {
    "--max-restarts": "start again after a failure, from the last good checkpoint, at most N times [0]",
    "--min-hosts": "go on with fewer hosts when some are lost, but not fewer than N [all]",
    "--host-wait": "seconds to wait for lost hosts before going on without them or giving up [60]",
}


@dataclass(frozen=True)
class Options:
    """What the launcher was told."""

    deepspeed: dict[str, str | None] = field(default_factory=dict)  # a name without a value has None
    trainer: list[str] = field(default_factory=list)
    max_restarts: int = 0
    min_hosts: int | None = None  # None: all
    host_wait: int = 60

    def of_trainer(self, name: str) -> str:
        """The value of one of the trainer's options, or nothing. As tyro, the last one counts."""
        value = ""
        for index, word in enumerate(self.trainer):
            if word == name and index + 1 < len(self.trainer):
                value = self.trainer[index + 1]
            elif word.startswith(name + "="):
                value = word.removeprefix(name + "=")
        return value


def split_arguments(arguments: list[str]) -> Options:
    """Tell launcher options from the trainer's arguments.

    Raises:
        UserError: an option without its value, or a number that is none.
    """
    deepspeed: dict[str, str | None] = {}
    ours: dict[str, int] = {}
    trainer: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        name = SHORT.get(name, name)
        if name in TAKES_VALUE or name in OURS:
            value = value if equals else next(words, "")
            if not value:
                raise UserError(f"{name}: needs a value")
            if name in OURS:
                ours[name[2:].replace("-", "_")] = _number(name, value)
            else:
                deepspeed[name] = value
        elif word in TAKES_NONE:
            deepspeed[word] = None
        elif name not in ("--local_rank", "--local-rank"):
            trainer.append(word)
    return Options(deepspeed, trainer, **ours)


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 6:
        raise UserError(f"{name} {text}: must be a whole number, 0 or more")
    return int(text)


def help_text() -> str:
    """The launcher's part of --help."""
    lines = ["launcher options:", "  --hostfile FILE    `host slots=N` a line; without it, all GPUs of this machine"]
    lines.append("  --launcher NAME    for several hosts: pdsh, ssh or openmpi [pdsh; ssh where it is missing]")
    lines += [f"  {name} N    {text}" for name, text in OURS.items()]
    lines.append("  for deepspeed: " + " ".join((*TAKES_VALUE[1:], *TAKES_NONE)))
    return "\n".join(lines)
