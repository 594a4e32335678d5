"""What travels to every rank: one word that no shell can read as more than a word.

DeepSpeed's launchers build shell lines from arguments and variables without quoting them. So arguments,
variables and the working folder travel as one URL-safe base64 word, which the rank's supervisor unpacks.
"""

import base64
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

LAUNCH_ID = "KSUB_LAUNCH_ID"  # in the environment of every process of a launch, and of no other
# Variables that programs on other hosts need too, for `launch/pretrain.sh` and `launch/evaluate.sh` alike.
TRAVELS = re.compile(
    r"HF_|OMP_|MKL_|TORCH_|TORCHINDUCTOR_|PYTORCH_|TRITON_|TRANSFORMERS_|TOKENIZERS_|KSUB_|WANDB_|DS_"
    r"|NCCL_|GLOO_|FI_|UCX_"
    r"|(CC|CXX|CUDA_DEVICE_MAX_CONNECTIONS|CUDA_HOME|LD_LIBRARY_PATH|PYTHONPATH|XDG_CACHE_HOME)$"
)
SECRET = re.compile(r"TOKEN(?!IZERS|_PATH$)|KEY|SECRET|PASSWORD", re.IGNORECASE)
PLAIN_WORD = re.compile(r"[\w@%+=:,./-]*")


@dataclass(frozen=True)
class LaunchSpec:
    """What a rank runs, and where."""

    launch_id: str
    folder: str  # the working folder
    environment: dict[str, str]
    arguments: list[str]  # of `python -m ksub_ds.pretrain`

    def pack(self) -> str:
        """Return the spec as one word of letters, digits, - and _."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode().rstrip("=")

    @staticmethod
    def unpack(word: str) -> "LaunchSpec":
        """Return the spec that was packed into a word."""
        return LaunchSpec(**json.loads(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))))


def travelling_environment() -> dict[str, str]:
    """Return the variables of this process that programs on other hosts need too; secrets are never among them."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if TRAVELS.match(name) and not SECRET.search(name) and name != LAUNCH_ID
    }


def write_environment_file(path: Path, folder: Path) -> None:
    """Write DeepSpeed's environment file: what travels, then the user's own (~/.deepspeed_env, ./.deepspeed_env).

    It reaches the launcher's own processes on every host before they start Python (LD_LIBRARY_PATH). DeepSpeed
    writes the values into a shell line, so only plain words go in.

    Args:
        path: the file to write.
        folder: the working folder, which may hold a .deepspeed_env.
    """
    values = {name: value for name, value in travelling_environment().items() if PLAIN_WORD.fullmatch(value)}
    for home in (Path.home(), folder):
        source = home / ".deepspeed_env"
        if source.is_file():
            lines = source.read_text(encoding="utf-8").splitlines()
            values |= dict(line.strip().split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    path.write_text("".join(f"{name}={value}\n" for name, value in values.items()), encoding="utf-8")
