"Cores and memory as a process may use them, and threads that keep to one core."
import math
import os
import subprocess
import sys
import threading

import pytest
import torch

from deepdemix.foundations.cores import available_cores, available_memory, cpu_quota, single_threaded_pool


def machine(root, group, **files):
    "A root folder with a process in a control group, and what its folders hold."
    for name, text in {"proc/self/cgroup": group, **files}.items():
        path = root / name.replace("CG", "sys/fs/cgroup")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "2:cpuset:/\n4:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f\n"


@pytest.mark.parametrize(
    "group, files, quota",
    [
        ("0::/\n", {"CG/cpu.max": "max 100000"}, math.inf),
        ("0::/\n", {"CG/cpu.max": "250000 100000\n"}, 2.5),
        ("0::/a/b\n", {"CG/a/b/cpu.max": "800000 100000", "CG/a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b\n", {"CG/a/b/cpu.max": "80000 40000", "CG/a/cpu.max": "300000 100000"}, 2),
        ("0::/../other\n", {"CG/cpu.max": "100000 100000"}, 1),
        (V1, {"CG/cpu,cpuacct/cpu.cfs_quota_us": "200000", "CG/cpu,cpuacct/cpu.cfs_period_us": "100000"}, 2),
        (V1, {"CG/cpu/docker/1f/cpu.cfs_quota_us": "50000", "CG/cpu/docker/1f/cpu.cfs_period_us": "100000"},
         0.5),
        (V1, {"CG/cpu/cpu.cfs_quota_us": "-1", "CG/cpu/cpu.cfs_period_us": "100000"}, math.inf),
        (
            V1 + "0::/\n",
            {"CG/cpu/cpu.cfs_quota_us": "-1",
             "CG/cpu/cpu.cfs_period_us": "100000",
             "CG/unified/cpu.max": "70000 10000"},
            7,
        ),
        ("nonsense\n", {"CG/cpu.max": "what is this"}, math.inf), ("0::/\n", {"CG/cpu.max": ""}, math.inf),
        ("0::/\n", {}, math.inf),
    ],
)
def test_quotas_of_both_versions(tmp_path, group, files, quota):
    root = machine(tmp_path, group, **files)
    assert cpu_quota(root) == quota
    allowed = len(os.sched_getaffinity(0))
    assert available_cores(root) == (allowed if quota == math.inf else max(1, min(allowed, math.ceil(quota))))


def test_affinity_counts():
    code = "import os; from deepdemix.foundations.cores import available_cores; print(available_cores())"
    cores = min(os.sched_getaffinity(0))
    done = subprocess.run(
        ["taskset", "-c", str(cores), sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    "group, files, memory",
    [
        ("0::/\n", {}, 4096e3), ("0::/\n", {"CG/memory.max": "max", "CG/memory.current": "5"}, 4096e3),
        (
            "0::/a\n",
            {"CG/a/memory.max": "900",
             "CG/a/memory.current": "500",
             "CG/a/memory.stat": "anon 3\ninactive_file 100\n"},
            500,
        ),
        ("0::/a\n", {"CG/a/memory.max": "900", "CG/a/memory.current": "950"}, 0),
        ("7:memory:/x\n",
         {"CG/memory/memory.limit_in_bytes": "3000", "CG/memory/memory.usage_in_bytes": "1000"}, 2000),
        (
            "7:memory:/x\n",
            {"CG/memory/x/memory.limit_in_bytes": str(2**63 - 4096),
             "CG/memory/x/memory.usage_in_bytes": "1000"},
            4096e3,
        ),
    ],
)
def test_memory_that_is_left(tmp_path, group, files, memory):
    files = {"proc/meminfo": "MemTotal: 8000 kB\nMemAvailable:    4000 kB\n", **files}
    assert available_memory(machine(tmp_path, group, **files)) == memory


def test_where_the_system_says_nothing(tmp_path): assert available_memory(tmp_path) == math.inf


def test_workers_keep_to_one_core_and_leave_the_caller_s_setting():
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        with single_threaded_pool(2) as pool:
            assert list(pool.map(lambda _: torch.get_num_threads(), range(6))) == [1] * 6
            assert torch.get_num_threads() == 3
            new = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            new.start()
            new.join()
        assert torch.get_num_threads() == 3 and seen == [3]
    finally: torch.set_num_threads(before)


def test_waiting_work_is_dropped_when_the_work_ends():
    done, go = [], threading.Event()
    with pytest.raises(ZeroDivisionError):
        with single_threaded_pool(1) as pool:
            pool.submit(lambda: done.append(go.wait(30)))
            for _ in range(50): pool.submit(done.append, "late")
            go.set()
            1 / 0
    assert done.count("late") < 50


def test_no_room_counts_the_machine_s_cores():
    "Everything that starts workers asks for the cores that it may use."
    from pathlib import Path
    rooms = [p for p in (Path(__file__).parents[1] / "deepdemix").rglob("*.py")
             if "cpu_count()" in p.read_text(encoding="utf-8")]
    assert [p.name for p in rooms if p.name != "cores.py"] == []
