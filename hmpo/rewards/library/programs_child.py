"""Runs one program and its tests behind a fence; standard library only, run as a script.

The request is JSON on standard input: {"code", "tests", "token", "seconds", "memory", "file"}. This
process waits, a child of it runs the program; what the child starts is below this process whatever
sessions it makes (Linux), and all of it is killed when the child has ended or the time is up. The
first line of output is "started", as soon as there is a process for the program, the last one
JSON: {"passed", "late", "no_network": whether the network was taken away}.

It is a fence against accidents, not against attackers: the program runs with the user's rights and
can read what the user can read.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

NEW_USER, NEW_NET = 0x10000000, 0x40000000
DEATH_SIGNAL, SUBREAPER = 1, 36
LINUX = sys.platform == "linux"


def without_network():
    """Move into a network namespace of our own, which has none; whether the kernel allows it."""
    if not LINUX:
        return False
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_NET) != 0:
        return False
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with contextlib.suppress(OSError):  # the ids are shown as nobody's then
            Path(f"/proc/self/{name}").write_text(text)
    return True


def limit(request):
    """Take the limits of the program: CPU, memory, files, no core."""
    import resource

    cpu = int(request["seconds"]) + 1
    for name, value in (
        ("RLIMIT_CPU", cpu),
        ("RLIMIT_AS", request["memory"]),
        ("RLIMIT_FSIZE", request["file"]),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", 256),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit on memory
            resource.setrlimit(getattr(resource, name), (value, value))


def run(request, told):
    """The child's life: the program, its tests, and the token where both went through."""
    if LINUX:
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
    os.write(1, b"started\n")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    code, tests, token = (request[name] for name in ("code", "tests", "token"))
    limit(request)
    names = {"__name__": "solution", "__builtins__": __builtins__}
    exec(compile(code, "solution.py", "exec"), names)
    exec(compile(tests, "tests.py", "exec"), names)
    os.write(told, token.encode())


def below(root):
    """Pids of all processes below one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    found, rest = [], [root]
    while rest:
        above = rest.pop()
        children = [pid for pid, parent in parents.items() if parent == above]
        found += children
        rest += children
    return found


def end_all(child):
    """Kill the child, its group and all below this process, until none is left."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        for pid in [child, *below(os.getpid())]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def main():
    """Run the request on standard input."""
    request = json.load(sys.stdin)
    reads, writes = os.pipe()
    if LINUX:
        ctypes.CDLL(None).prctl(SUBREAPER, 1)
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
    network = without_network()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            os.close(reads)
            run(request, writes)
        finally:
            os._exit(1)
    os.close(writes)
    said, deadline = b"", time.monotonic() + request["seconds"]
    while (left := deadline - time.monotonic()) > 0 and select.select([reads], [], [], left)[0]:
        piece = os.read(reads, 4096)
        said += piece[:4096]
        if not piece or len(said) > 4096 or said == request["token"].encode():
            break
    in_time = time.monotonic() < deadline
    end_all(child)
    passed = said == request["token"].encode()
    json.dump({"passed": passed, "late": not in_time, "no_network": network}, sys.stdout)


if __name__ == "__main__":
    main()
