"""How much memory a process may have: the machine's, or less where its groups say so."""

from hmpo.run.machine import machine_bytes


def test_the_limit_is_the_least_of_the_machine_and_its_groups(tmp_path) -> None:
    whole = machine_bytes(tmp_path)
    assert whole is not None and whole > 2**28
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("3:cpu:/a\n0::/outer/inner\n")
    inner = tmp_path / "sys/fs/cgroup/outer/inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    assert machine_bytes(tmp_path) == whole
    (inner.parent / "memory.max").write_text(f"{2**27}\n")
    assert machine_bytes(tmp_path) == 2**27
    (tmp_path / "proc/self/cgroup").write_text("9:cpu,memory:/old\n")
    old = tmp_path / "sys/fs/cgroup/memory/old"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine_bytes(tmp_path) == whole
    (old / "memory.limit_in_bytes").write_text(f"{2**26}\n")
    assert machine_bytes(tmp_path) == 2**26
