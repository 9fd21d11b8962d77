"""The loop of async rewards: when it is closed, and that its end waits for nothing."""

import asyncio
import concurrent.futures.thread
import gc
import subprocess
import sys
import threading

from hmpo.rewards.values import EventLoop


async def one() -> int:
    return await asyncio.to_thread(int, "1")


def made() -> tuple[EventLoop, asyncio.AbstractEventLoop]:
    loop = EventLoop()
    assert loop.run(one()) == 1
    return loop, loop._runner.get_loop()


def test_garbage_that_is_collected_under_a_lock_of_this_thread_waits_for_nothing() -> None:
    """As it was seen: within the submission of a thread's work, in another running loop."""
    done = threading.Event()

    def work() -> None:
        left, inner = made()
        ring = [left]
        ring.append(ring)  # only the collector of garbage frees it

        async def collected() -> None:
            nonlocal left, ring
            with concurrent.futures.thread._global_shutdown_lock:
                del left, ring
                gc.collect()

        other = EventLoop()
        other.run(collected())
        assert not inner.is_closed()
        assert other.run(one()) == 1 and inner.is_closed()
        other.close()
        done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert done.is_set()


def test_a_closed_loop_is_closed_at_once_and_made_anew() -> None:
    loop, inner = made()
    loop.close()
    assert inner.is_closed()
    loop.close()
    assert loop.run(one()) == 1 and loop._runner.get_loop() is not inner
    loop.close()


def test_a_loop_that_is_open_at_the_end_of_its_process_is_closed_there() -> None:
    script = (
        "import asyncio\n"
        "from hmpo.rewards.values import EventLoop\n"
        "async def wait():\n"
        "    try:\n"
        "        await asyncio.sleep(60)\n"
        "    finally:\n"
        "        print('cancelled')\n"
        "async def begin():\n"
        "    loop.task = asyncio.create_task(wait())\n"
        "    await asyncio.sleep(0)\n"
        "loop = EventLoop()\n"
        "loop.run(begin())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout == "cancelled\n"
