"""Hostfiles as people have them: tabs, comments, Windows' line ends, users and ports."""

from pathlib import Path

import pytest

from ksub_ds.cluster.hostfile import read_hostfile, write_hostfile
from ksub_ds.common.errors import UserError


@pytest.mark.parametrize(
    "content",
    [
        b"node1 slots=2\n10.0.0.2 slots=1\nfe80::1 slots=3\n",
        b"\xef\xbb\xbfnode1\tslots=2\r\n\r\n10.0.0.2 slots=1 # spare\r\n# fe80::2 slots=1\r\nfe80::1  slots=3",
    ],
)
def test_forms_that_are_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(content)
    hosts = read_hostfile(str(path))
    assert hosts == {"node1": 2, "10.0.0.2": 1, "fe80::1": 3}
    write_hostfile(path, hosts)
    assert read_hostfile(str(path)) == hosts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "root@node1 slots=1",
            "write `node1 slots=...`, and into ~/.ssh/config of this machine: Host node1, User root,",
        ),
        (
            "node1:2222 slots=1",
            "write `node1 slots=...`, and into ~/.ssh/config of this machine: Host node1, Port 2222,",
        ),
        ("a.b@n-1.x:22 slots=1", "Host n-1.x, User a.b, Port 22, a line each"),
        ("[::1]:22 slots=1", "'[::1]:22' is more than a name; write `::1 slots=...`, and into"),
        ("root@[fe80::1] slots=1", "Host fe80::1, User root,"),
        ("[::1] slots=1", "'[::1]' is more than a name; write `::1 slots=...`"),
        ("ssh://node1 slots=1", "line 2: 'ssh://' is not part of a name; write `node1 slots=...`"),
        ("ssh://root@node1:22/ slots=1", "'ssh://' is not part of a name; write `node1 slots=...`, and into ~/.ssh"),
        ("-oProxyCommand=x@node1 slots=1", "not `host slots=N`"),
        ("$(touch hurt)@node1 slots=1", "not `host slots=N`"),
        ("a;b@node1:22 slots=1", "not `host slots=N`"),
        ("node1", "not `host slots=N`"),
        ("node1:4", "not `host slots=N`"),
        ("node1 slots=0", "gives 'node1' no slots"),
        ("node2 slots=1\nNode2 slots=1", "line 3 names 'Node2' again; give each host one line"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"first slots=1\n{line}\n")
    with pytest.raises(UserError) as raised:
        read_hostfile(str(path))
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"--hostfile {path}: line ")


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes("node1 slots=1\n".encode("utf-16"))
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(str(path))
