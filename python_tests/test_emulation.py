"""The emulated CUDA backend itself: what it computes, and which broken rules it finds."""

import functools
import json
import math
import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "python_tests" / "emulation_cases.cu"
SOURCES = [CASES, *sorted((ROOT / "csrc" / "emulation").glob("*.cpp"))]
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-DFACELT_EMULATION", f"-I{ROOT / 'csrc'}", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]
SCHEDULES = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]
FULL_RUNS = ["sums", "shuffles", "votes", "atomics", "template_shared", "two_instances", "vectors"]


def compile_source(arguments, **options):
    command = [*COMPILER, *FLAGS, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, **options
    )


def sanitizers_work(folder):
    program = folder / "probe"
    built = compile_source(
        [*SANITIZERS, "-x", "c++", "-", "-o", program], input="int main() { return 0; }"
    )
    return built.returncode == 0 and subprocess.run([program], check=False).returncode == 0


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """The paths of the plain and of the sanitized executable; None where sanitizers do not work."""
    folder = tmp_path_factory.mktemp("emulation")
    variants = {"plain": ["-O1"]}
    if sanitizers_work(folder):
        variants["sanitized"] = ["-O0", *SANITIZERS]

    def compile_object(variant, source):
        target = folder / f"{variant}-{source.stem}.o"
        built = compile_source([*variants[variant], "-x", "c++", "-c", source, "-o", target])
        assert built.returncode == 0, built.stderr
        return target

    def link(variant, objects):
        program = folder / variant
        built = compile_source([*variants[variant], *objects, "-pthread", "-o", program])
        assert built.returncode == 0, built.stderr
        return program

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {
            variant: [pool.submit(compile_object, variant, source) for source in SOURCES]
            for variant in variants
        }
        programs = {name: link(name, [f.result() for f in jobs]) for name, jobs in objects.items()}
    return {"sanitized": None, **programs}


def run_case(program, case, schedule="forward", seed=0):
    return subprocess.run(
        [program, case, schedule, str(seed)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": ""},
    )


@pytest.fixture(params=["plain", "sanitized"])
def answer(request, builds):
    """Runs a case and returns what it printed: a result, or an error."""
    program = builds[request.param]
    if program is None:
        pytest.skip(f"{COMPILER[0]} cannot build with {SANITIZERS[0]}")

    def run(case, schedule="forward", seed=0):
        done = run_case(program, case, schedule, seed)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def result(answer):
    return lambda *arguments: answer(*arguments)["result"]


@pytest.fixture
def error(answer):
    return lambda *arguments: answer(*arguments)["error"]


@pytest.fixture
def sanitizer_report(builds):
    if builds["sanitized"] is None:
        pytest.skip(f"{COMPILER[0]} cannot build with {SANITIZERS[0]}")

    def run(case):
        done = run_case(builds["sanitized"], case)
        assert done.returncode != 0, done.stdout
        return done.stderr

    return run


@functools.cache
def sites():
    found = {}
    for number, line in enumerate(CASES.read_text().splitlines(), 1):
        if match := re.search(r"// site: (\w+)", line):
            found[match[1]] = f"{CASES}:{number}"
    return found


@pytest.mark.parametrize("case", FULL_RUNS)
def test_all_schedules_give_the_same_bits(result, case):
    assert len({tuple(result(case, *schedule)) for schedule in SCHEDULES}) == 1


def test_block_reduction(result):
    rows = [[0.1 * i for i in range(300 * row, 300 * row + 300)] for row in range(5)]
    expected = [f(row) for row in rows for f in (sum, lambda r: sum(x * x for x in r))]
    assert result("sums") == pytest.approx(expected, rel=1e-6)


def test_shuffles(result):
    def value(lane):
        return 100 + 3 * lane

    lanes = range(32)
    expected = [value((lane + 5) % 32) for lane in lanes]
    expected += [value(lane ^ 6) for lane in lanes]
    expected += [value(lane - 3 if lane >= 3 else lane) for lane in lanes]
    expected += [value(lane + 3 if lane < 29 else lane) for lane in lanes]
    assert result("shuffles") == 5 * expected


def test_votes_and_integer_reductions(result):
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    values = [3 * lane - 40 for lane in range(32)]
    largest_unsigned = max(value % 2**32 for value in values)
    integers = [sum(values), min(values), max(values), largest_unsigned, 0xFFFF, 0xFFFF0000]
    # One digit a question: the second answer of each pair counts 10.
    assert result("votes") == 64 * [ballot, 1, 1, *integers, 10020, 1, 1]


def test_integer_atomics(result):
    ids = range(64)
    mixed = [i * 37 % 101 - 50 for i in ids]
    signed = [sum(i - 1 for i in ids), max(mixed), min(mixed), 2**20 - 1]
    unsigned = [0, 2**32 - 1, 7, 2**31, sum(ids)]
    wide = [64 * 2**33, 63 * 2**32, 2**40, 2**45]
    assert result("atomics") == [*signed, *unsigned, *wide, 65]


def test_a_template_has_a_shared_array_per_instantiation(result):
    assert result("template_shared") == [
        1000 * size + size + size - 1 - i for size in (32, 64) for i in range(size)
    ]
    assert result("two_instances") == 32 * [12]


def test_vector_access(result):
    assert result("vectors") == [4 * i + 3 - j for i in range(32) for j in range(4)]


def test_the_order_of_blocks_and_threads(result):
    count, block = 384, 32
    assert result("indices", "forward") == list(range(count))
    assert result("indices", "reverse") == list(range(count))[::-1]
    order = result("indices", "random", 7)
    assert sorted(order) == list(range(count))
    assert order == result("indices", "random", 7)
    assert order != result("indices", "random", 8)
    block_order = [i // block for i in order]
    assert block_order[::block] != sorted(block_order[::block])
    assert order[:block] not in (sorted(order[:block]), sorted(order[:block], reverse=True))
    assert len(set(block_order[:block])) == 1, "blocks do not overlap"


def test_two_host_threads(result):
    assert result("two_host_threads") == [1, 1]


def test_dynamic_shared_memory(result, error):
    assert result("dynamic") == [48 * 256 - 1, 1, 0]
    assert result("dynamic_allowed") == [227 * 256 - 1, 1, 0]
    assert "49156 of dynamic shared memory" in error("dynamic_not_allowed")
    assert "232452 bytes of dynamic shared memory" in error("dynamic_too_large")


def test_a_missing_barrier_shows(result):
    assert len({tuple(result("missing_barrier", *schedule)) for schedule in SCHEDULES}) == 4


def test_unwritten_shared_memory_is_poisoned_in_every_block(result):
    values = result("unwritten_shared")
    assert all(math.isnan(value) for value in values[0::3] + values[2::3])
    assert values[1::3] == 32 * [-1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_divergent_barrier(error, schedule):
    message = error("divergent_barrier", *schedule)
    a, b = sites()["divergent_barrier_a"], sites()["divergent_barrier_b"]
    assert message.startswith(f"{a}: __syncthreads not reached by all threads of its block:")
    assert f"threads 0-31 wait at __syncthreads ({a})" in message
    assert f"threads 32-63 wait at __syncthreads ({b})" in message
    assert schedule[0] == "random" or f"block ({int(schedule[0] == 'reverse')}, 0, 0)" in message
    assert f"launched at {sites()['once']}" in message


def test_a_return_before_a_barrier(error):
    message = error("return_before_barrier")
    site = sites()["return_before_barrier"]
    assert message.startswith(f"{site}: __syncthreads not reached by all threads of its block:")
    assert f"threads 0-39 wait at __syncthreads ({site})" in message
    assert "threads 40-63 have returned" in message


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_divergent_shuffle(error, schedule):
    message = error("divergent_kinds", *schedule)
    shuffle, barrier = sites()["divergent_kinds_shuffle"], sites()["divergent_kinds_barrier"]
    assert message.startswith(f"{shuffle}: __shfl_sync not reached by all threads of its warp:")
    assert f"threads 0-15, 32-47 wait at __shfl_sync ({shuffle})" in message
    assert f"threads 16-31, 48-63 wait at __syncthreads ({barrier})" in message


def test_two_kinds_of_shuffle_on_one_line(error):
    message = error("different_shuffles")
    assert message.startswith(sites()["different_shuffles"])
    assert "threads 0, 2, 4, 6, 8, 10, 12, 14, ... (16 in all) wait at __shfl_down_sync" in message
    assert "threads 1, 3, 5, 7, 9, 11, 13, 15, ... (16 in all) wait at __shfl_up_sync" in message


def test_a_shuffle_of_part_of_a_warp(error):
    mask, width = error("partial_mask"), error("partial_width")
    assert mask.startswith(f"{sites()['partial_mask']}: __shfl_down_sync with mask 0x0000ffff")
    assert "thread (0, 0, 0)" in mask
    assert width.startswith(sites()["partial_width"])


@pytest.mark.parametrize(
    "case, array, size, byte",
    [
        ("shared_overrun", "tile", 128, 128),
        ("shared_underrun", "tile", 128, -4),
        ("dynamic_overrun", "rows", 124, 124),
    ],
)
def test_a_store_out_of_a_shared_array(builds, case, array, size, byte):
    message = json.loads(run_case(builds["plain"], case).stdout)["error"]
    site = sites()[case.replace("under", "over")]
    assert message.startswith(f"{site}: shared array '{array}' of {size} bytes was written out")
    assert f"at byte {byte}, in block (0, 0, 0)" in message


def test_sanitizers_stop_at_an_overrun(sanitizer_report):
    for case, sign in [
        ("shared_overrun", "index 32 out of bounds"),
        ("dynamic_overrun", "use-after-poison"),
        ("global_overrun", "heap-buffer-overflow"),
    ]:
        report = sanitizer_report(case)
        assert sign in report and CASES.name in report


@pytest.mark.parametrize("case", ["misaligned_load", "misaligned_store", "misaligned_shared"])
def test_a_misaligned_vector_access(error, case):
    assert error(case).startswith(f"{sites()[case]}: misaligned vector access, by thread")


def test_static_shared_memory_is_limited(answer, error):
    assert answer("static_full") == {"result": []}
    assert error("static_limit").startswith(f"{sites()['static_limit']}: launch refused: 49160")
    both = error("static_and_dynamic")
    assert both.startswith(f"{sites()['static_and_dynamic']}: launch refused: 32768")
    assert "16385 of dynamic" in both


@pytest.mark.parametrize(
    "case, reason",
    [
        ("block_33", "33 threads, which is not a multiple of 32"),
        ("block_0", "block (32, 0, 1) is not within"),
        ("block_1056", "block (33, 32, 1) is not within"),
        ("block_z", "block (1, 1, 96) is not within"),
        ("grid_0", "grid (0, 1, 1) is not within"),
        ("grid_x", "grid (2147483648, 1, 1) is not within"),
        ("grid_y", "grid (1, 65536, 1) is not within"),
        ("grid_z", "grid (1, 1, 65536) is not within"),
    ],
)
def test_launch_limits(error, case, reason):
    message = error(case)
    assert message.startswith(f"{sites()['launch_limit']}: launch refused: ")
    assert reason in message


def test_the_largest_launches(answer):
    assert answer("largest_block") == {"result": []}
    assert answer("largest_grid") == {"result": []}


def test_an_exception_of_device_code(answer):
    assert answer("throwing") == {"other_error": "thrown in device code"}


def test_launches_work_after_errors_and_reuse_their_stacks(result):
    assert result("recovery") == [200, 0, 1]


def test_device_code_stays_within_a_launch(error):
    assert error("launching").startswith(f"{sites()['launching']}: launch from device code")
    assert error("outside").startswith(f"{sites()['outside']}: device code runs outside a launch")


def test_unknown_schedule(error):
    assert "none of forward, reverse and random" in error("sums", "sideways")


@pytest.mark.parametrize("function", ["Add", "Max", "Min", "Exch", "CAS"])
def test_float_atomics_do_not_compile(function):
    def compiles(number):
        arguments = "x, x" if function == "CAS" else "x"
        code = f"""#include "emulation/runtime.h"
        {number} f({number}* p, {number} x) {{ return atomic{function}(p, {arguments}); }}"""
        return compile_source(["-x", "c++", "-fsyntax-only", "-"], input=code)

    refused = compiles("float")
    assert refused.returncode != 0 and "atomics are for int" in refused.stderr
    assert compiles("double").returncode != 0
    assert compiles("unsigned").returncode == 0
