"""The command line of launch/pretrain.sh: options of the launcher, and the trainer's arguments."""

from dataclasses import dataclass, field

from ksub_ds.common.errors import UserError
from ksub_ds.common.option_help import hanging

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
    "--max-restarts": "restart after a failure, from the last good checkpoint, at most N times [0]",
    "--min-hosts": "continue with fewer hosts when some are lost, but not fewer than N [all]",
    "--host-wait": "seconds to wait for lost hosts before continuing without them or giving up [60]",
}


@dataclass(frozen=True)
class LaunchOptions:
    """The command line, divided."""

    deepspeed: dict[str, str | None] = field(default_factory=dict)  # None: an option without a value
    trainer: list[str] = field(default_factory=list)
    max_restarts: int = 0
    min_hosts: int | None = None  # None: all
    host_wait: int = 60

    def of_trainer(self, name: str) -> str:
        """Return the value of one of the trainer's options, or an empty text; the last one counts, as in tyro."""
        value = ""
        for index, word in enumerate(self.trainer):
            if word == name and index + 1 < len(self.trainer):
                value = self.trainer[index + 1]
            elif word.startswith(name + "="):
                value = word.removeprefix(name + "=")
        return value


def split_arguments(arguments: list[str]) -> LaunchOptions:
    """Divide a command line into launcher options and the trainer's arguments.

    Raises:
        UserError: an option lacks its value, or a number is not one.
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
    return LaunchOptions(deepspeed, trainer, **ours)


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 6:
        raise UserError(f"{name} {text}: must be a whole number, 0 or more")
    return int(text)


def help_text() -> str:
    """Return the launcher's part of --help, as wide as the terminal."""
    rows = [
        ("--hostfile FILE", "lines of `host slots=N`; without it, all GPUs of this machine"),
        ("--launcher NAME", "for several hosts: pdsh, ssh or openmpi [pdsh; ssh where it is missing]"),
        *((f"{name} N", text) for name, text in OURS.items()),
        ("passed to deepspeed", " ".join((*TAKES_VALUE[1:], *TAKES_NONE))),
    ]
    column = max(len(name) for name, _ in rows) + 4
    return "launcher options:\n" + "\n".join(hanging(f"  {name}".ljust(column) + text, column) for name, text in rows)
