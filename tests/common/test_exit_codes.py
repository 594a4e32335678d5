"""Exit codes: what a program's end becomes on stderr and for the shell."""

import signal
import subprocess
import sys

import pytest

from ksub_ds.common.errors import RunFailed, UserError
from ksub_ds.common.exit_codes import BROKEN_PIPE, INTERRUPTED, exit_code_of_signal, run_main
from ksub_ds.common.rank_env import rank_info


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (lambda: None, 0, ""),
        (lambda: 75, 75, ""),
        (raising(UserError("--out: is missing")), 2, "error: --out: is missing\n"),
        (raising(UserError("a\nb\x1b[31m: is missing")), 2, "error: a\\nb\\x1b[31m: is missing\n"),
        (raising(UserError("r\udce9: is missing")), 2, "error: r\\udce9: is missing\n"),
        (
            raising(OSError(36, "File name too long", "aaa")),
            2,
            "error: aaa: File name too long; fix it, then run the same command again to resume\n",
        ),
        (raising(RunFailed("a rank")), 70, "failed: a rank; run the same command again to resume\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted; run the same command again to resume\n"),
    ],
)
def test_one_line_and_a_code(main, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main) == code
    assert capsys.readouterr().err == line


def test_other_errors_and_exits_pass() -> None:
    with pytest.raises(SystemExit):
        run_main(raising(SystemExit(0)))
    for error in (KeyError("a bug"), ConnectionResetError(104, "by peer"), OSError(5, "Input/output error")):
        with pytest.raises(type(error)):
            run_main(raising(error))


def test_an_error_of_all_ranks_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, agreed, lines in (("0", True, 1), ("1", True, 0), ("1", False, 1), ("one", True, 1)):
        monkeypatch.setenv("RANK", rank)
        assert run_main(raising(UserError("no such file", agreed=agreed))) == 2
        assert capsys.readouterr().err.count("error: no such file") == lines


def test_codes_of_signals() -> None:
    assert exit_code_of_signal(signal.SIGINT) == INTERRUPTED and exit_code_of_signal(signal.SIGPIPE) == BROKEN_PIPE


PROGRAM = "import sys; from ksub_ds.common.exit_codes import run_main; sys.exit(run_main(lambda: print('x' * 10**6)))"


def test_a_reader_that_has_exited() -> None:
    writer = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()
    assert (writer.wait(60), writer.stderr.read()) == (141, b"")


def test_the_import_is_cheap() -> None:
    program = (
        "import sys; sys.argv[0] = 'ksub'; import ksub_ds.common.exit_codes\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "tyro", "transformers"} & set(done.stdout.split())


@pytest.mark.parametrize(("rank", "size"), [("5", "1"), ("-1", "2"), ("0", "0"), ("0", "-3")])
def test_a_place_outside_the_run_is_refused(rank: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that waits for ranks of which it is none would wait for ever."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=f"^RANK={rank} WORLD_SIZE={size}: .* unset RANK WORLD_SIZE, or"):
        rank_info()
