"""The cache folder and the compiler: damage, full disks, crashes, other processes, and what is compiled at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attncc
from attncc import BuildError, CompiledAttention
from attncc.runtime import cache, cpp_toolchain
from attncc.syntax.parser import _lark

SPEC = "attention cached(window: int = 3):\n    mask = causal and q_idx - kv_idx < window\n"
INTERPRETED = "triton:interpret"
TARGETS = pytest.mark.parametrize("target", ["cpp", INTERPRETED])
ROOT = Path(__file__).parent.parent


def operands(
    M: int = 5, N: int = 7, B: int = 1, H: int = 2, D: int = 8, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, rows, D, generator=generator).to(dtype) for rows in (M, N, N)]


def assert_right(attn: CompiledAttention) -> None:
    torch.testing.assert_close(attn(*operands()).double(), attn.reference(*operands()), rtol=1e-5, atol=1e-6)


def build(target: str | None = None) -> CompiledAttention:
    return attncc.build(SPEC, target=target)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for a test."""
    path = tmp_path / "cache"
    monkeypatch.setenv("ATTNCC_CACHE", str(path))
    return path


@pytest.fixture(autouse=True)
def temporary_folders() -> Iterator[None]:
    """No test takes over another one's temporary folder, or belief that a folder can be written."""
    yield
    cache._usable.cache_clear()
    cache._temporary.cache_clear()


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def libraries(place: Path) -> list[Path]:
    return sorted(path for path in place.glob("*.so") if not path.name.startswith("."))


# --- what is compiled ------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The sources that the C++ compiler has been called for."""
    sources: list[Path] = []
    original = cpp_toolchain.compile_library

    def compile_library(compiler: object, options: object, source: Path, output: Path) -> None:
        sources.append(source)
        original(compiler, options, source, output)  # type: ignore[arg-type]

    monkeypatch.setattr("attncc.runtime.cpp.compile_library", compile_library)
    return sources


CALLS: list[Callable[[CompiledAttention], object]] = [
    lambda attn: attn(*operands()),
    lambda attn: attn(*operands(M=1)),
    lambda attn: attn(*operands(M=64, N=300)),
    lambda attn: attn(*operands(B=3, H=4)),
    lambda attn: attn(*operands(M=0)),
    lambda attn: attn(*operands(N=0)),
    lambda attn: attn(*operands(), window=1),
    lambda attn: attn(*operands(), window=-(2**31)),
    lambda attn: attn(*operands(), q_offset=-3),
    lambda attn: attn(*operands(), return_lse=True),
    lambda attn: attn(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands())),
    lambda attn: attn(operands()[0], *(x[:, :1] for x in operands()[1:])),
]


def test_lengths_batch_heads_strides_and_scalars_compile_nothing(folder: Path, compilations: list[Path]) -> None:
    attn = build("cpp")
    for call in CALLS:
        call(attn)
        assert len(compilations) == 1
    assert len(libraries(folder)) == 1


def test_lengths_batch_heads_and_scalars_generate_nothing_for_triton(folder: Path) -> None:
    attn = build(INTERPRETED)
    CALLS[0](attn)
    before = contents(folder)
    for call in CALLS:
        call(attn)
    assert contents(folder) == before


def test_types_and_widths_compile(folder: Path, compilations: list[Path]) -> None:
    attn = build("cpp")
    for number, call in enumerate((operands(), operands(dtype=torch.bfloat16), operands(D=16)), start=1):
        attn(*call)
        assert len(compilations) == number
    q, k, v = operands()
    attn(q, k, v[..., :4])
    assert len(compilations) == 4
    assert len(libraries(folder)) == 4


def test_another_build_of_the_same_compiles_nothing(folder: Path, compilations: list[Path]) -> None:
    for _ in range(2):
        assert_right(build("cpp"))
    assert len(compilations) == 1
    # Another text, and another key of what is known of it; the same kernel.
    assert_right(attncc.build("# the same\n" + SPEC, target="cpp"))
    assert len(compilations) == 1
    assert {path.suffix for path in folder.iterdir()} >= {".so", ".cpp", ".pickle"}


def test_a_change_of_the_compiler_compiles_again(folder: Path, compilations: list[Path], fake_compiler: Fake) -> None:
    assert_right(build("cpp"))
    fake_compiler('exec g++ "$@"')
    assert_right(build("cpp"))
    fake_compiler('exec  g++ "$@"')
    assert_right(build("cpp"))
    assert len(compilations) == 3


# --- damage ----------------------------------------------------------------------------------------------------------


def _digest_of_garbage(content: bytes) -> bytes:
    return hashlib.sha256(b"garbage").digest() + b"garbage"


def _garbage_with_digest(content: bytes) -> bytes:
    return b"garbage" + hashlib.sha256(b"garbage").digest()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "one byte missing": lambda content: content[:-1],
    "one byte changed": lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    "garbage": lambda content: b"\x00garbage" * 100,
    "garbage after its digest": _digest_of_garbage,
    "garbage before its digest": _garbage_with_digest,
}


@pytest.mark.representative(3)
@TARGETS
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, target: str, damage: Callable[[bytes], bytes]
) -> None:
    """Every file, one after the other: parser tables, pickles, libraries, modules."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    _lark.cache_clear()
    assert_right(build(target))
    whole = contents(folder)
    assert {Path(name).suffix for name in whole} == {".lark", ".pickle"} | (
        {".so", ".cpp"} if target == "cpp" else {".py"}
    )
    for name, content in whole.items():
        if name.endswith(".cpp"):  # for people to read
            continue
        # In a folder of its own: this process still holds what it has loaded from another one.
        copy = folder.with_name(f"damaged {name}")
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(damage(content))
        if name.endswith(".lark"):  # Read where a specification has to be parsed.
            _lark.cache_clear()
            for path in copy.glob("*.pickle"):
                path.unlink()
        monkeypatch.setenv("ATTNCC_CACHE", str(copy))
        assert_right(build(target))
        assert (copy / name).read_bytes() != damage(content)
        assert contents(copy).keys() == whole.keys()


@TARGETS
def test_missing_files_are_made_again(folder: Path, target: str) -> None:
    assert_right(build(target))
    names = contents(folder).keys()
    for name in names:
        (folder / name).unlink()
        assert_right(build(target))
    assert contents(folder).keys() >= {name for name in names if not name.endswith(".cpp")}


@TARGETS
def test_a_folder_that_disappears_is_made_again(folder: Path, target: str) -> None:
    attn = build(target)
    shutil.rmtree(folder)
    assert_right(attn)
    shutil.rmtree(folder)
    assert_right(build(target))
    assert list(folder.iterdir())


@TARGETS
def test_a_folder_where_a_file_should_be(folder: Path, target: str) -> None:
    assert_right(build(target))
    for name in contents(folder):
        (folder / name).unlink()
        (folder / name).mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_right(build(target))


# --- folders that cannot be written, full disks -----------------------------------------------------------------------


@TARGETS
def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ATTNCC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"cannot write to the cache folder .*file/cache \(Not a directory\)"):
        attn = build(target)
    assert_right(attn)
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATTNCC_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="there is no home folder"):
        assert_right(build("cpp"))
    assert not list(tmp_path.iterdir())


def test_the_user_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNCC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "attncc"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "attncc"
    monkeypatch.setenv("ATTNCC_CACHE", "here")
    monkeypatch.chdir(tmp_path)
    assert cache.folder() == tmp_path / "here"


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@TARGETS
@pytest.mark.parametrize("operation", ["write_bytes", "replace"])
def test_a_disk_that_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch, target: str, operation: str) -> None:
    """It fills up after the folder was found to be writable; the temporary folder lies elsewhere."""
    original = getattr(Path, operation)

    def full(self: Path, *args: object) -> object:
        return _full() if self.parent == folder else original(self, *args)

    monkeypatch.setattr(Path, operation, full)
    with pytest.warns(UserWarning, match=r"cannot write to the cache folder .* \(No space left on device\)"):
        assert_right(build(target))
    assert not contents(folder)


@TARGETS
def test_every_disk_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr(Path, "replace", _full)
    with pytest.warns(UserWarning, match="No space left on device"), pytest.raises(BuildError) as caught:
        assert_right(build(target))
    assert [d.code for d in caught.value.diagnostics] == ["A0504"]
    assert "there is no place to write a kernel to: No space left on device" in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not contents(folder)


def test_no_folder_can_be_made_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A specification is still checked; a kernel has no place."""
    monkeypatch.setattr("tempfile.TemporaryFile", _full)
    monkeypatch.setattr("tempfile.mkdtemp", _full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attn = build("cpp")
        assert "cached_forward" in attn.source()
        with pytest.raises(BuildError) as caught:
            attn(*operands())
    assert [d.code for d in caught.value.diagnostics] == ["A0504"]
    assert str(folder) in str(caught.value)


def test_a_small_file_system_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, of 64 KB: the library does not fit, the pickles may."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("file systems may not be mounted here")
    try:
        monkeypatch.setenv("ATTNCC_CACHE", str(small))
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            attn = build("cpp")
            with warnings.catch_warnings(record=True):
                q, k, v = operands(dtype=dtype)
                torch.testing.assert_close(attn(q, k, v).double(), attn.reference(q, k, v), rtol=3e-2, atol=3e-2)
        assert not list(small.glob(".*"))
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        cache._usable.cache_clear()
        with pytest.warns(UserWarning, match="Read-only file system"):
            assert_right(build("cpp"))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# --- compilers -------------------------------------------------------------------------------------------------------

Fake = Callable[[str], Path]


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """`fake_compiler(script)`: makes $CXX a shell script. In it `output` is the file that it is to write."""

    def make(script: str) -> Path:
        path = tmp_path / "c++"
        find_output = 'for word; do [ "$previous" = -o ] && output=$word; previous=$word; done'
        path.write_text(f"#!/bin/sh\n{find_output}\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(path))
        cpp_toolchain._find_compiler.cache_clear()
        return path

    return make


def assert_fails(folder: Path, code: str, *words: str) -> None:
    """A build that fails, twice, with these words and nothing left behind but the source."""
    for _ in range(2):
        with pytest.raises(BuildError) as caught:
            build("cpp")(*operands())
        assert [d.code for d in caught.value.diagnostics] == [code]
        for word in words:
            assert word in str(caught.value)
    assert {path.suffix for path in folder.iterdir()} <= {".pickle", ".cpp", ".lark"}
    assert not list(folder.glob(".*"))


def test_a_compiler_that_fails_in_silence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    assert_fails(folder, "A0502", "it ended with status 1 and said nothing", "/bin/false -O3", "the source is kept at")
    assert "attncc_run" in next(folder.glob("*.cpp")).read_text()
    monkeypatch.delenv("CXX")
    assert_right(build("cpp"))


def test_a_compiler_that_says_why_it_fails(folder: Path, fake_compiler: Fake) -> None:
    fake_compiler("echo 'x.cpp:1: error: too old' >&2; echo 'note: upgrade' >&2; echo half > $output; exit 1")
    assert_fails(folder, "A0502", "x.cpp:1: error: too old")


@pytest.mark.parametrize(
    "script", ["exit 0", "echo garbage > $output", "head -c 5000 /bin/sh > $output", "rm -f $output"]
)
def test_a_compiler_that_writes_no_library(folder: Path, fake_compiler: Fake, script: str) -> None:
    fake_compiler(script)
    if script.startswith("rm"):
        with pytest.raises(BuildError) as caught, pytest.warns(UserWarning, match="No such file"):
            build("cpp")(*operands())
        assert [d.code for d in caught.value.diagnostics] == ["A0504"]
        return
    assert_fails(folder, "A0503", "cannot be loaded", "the command was:", "noexec")


def test_a_compiler_that_writes_another_library(folder: Path, fake_compiler: Fake) -> None:
    fake_compiler('echo "int other;" | g++ -shared -x c++ - -o $output')
    assert_fails(folder, "A0503", "it has no function attncc_run")


def test_a_compiler_that_is_killed(folder: Path, fake_compiler: Fake) -> None:
    fake_compiler("echo half > $output; kill -KILL $$")
    assert_fails(folder, "A0502", "it ended with status -9 and said nothing")


def test_a_compiler_whose_disk_is_full(folder: Path, fake_compiler: Fake) -> None:
    """What the linker says where it cannot write; in the temporary folder it can."""
    complaint = "/usr/bin/ld: final link failed: No space left on device"
    fake_compiler(
        f'case $output in {folder}/*) echo half > $output; echo "{complaint}" >&2; exit 1;; esac; exec g++ "$@"'
    )
    with pytest.warns(UserWarning, match=r"cannot write to the cache folder .* \(No space left on device\)"):
        assert_right(build("cpp"))
    assert {path.suffix for path in folder.iterdir()} <= {".pickle", ".cpp", ".lark"}


def test_a_compiler_without_room_anywhere(folder: Path, fake_compiler: Fake) -> None:
    fake_compiler('echo "fatal error: error writing to /tmp/x.s: No space left on device" >&2; exit 1')
    with pytest.warns(UserWarning, match="No space left"):
        assert_fails(folder, "A0504", "no place to write a kernel to: No space left on device")


def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    assert_fails(
        folder, "A0501", "there is no C++ compiler: g++, clang++ or c++ was not found", "install one", "set CXX"
    )


@pytest.mark.parametrize("command", ["no-such-compiler", "/no/such/compiler -O3", "/etc/passwd", "g++ 'unbalanced"])
def test_a_compiler_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("CXX", command)
    assert_fails(folder, "A0501", f"there is no C++ compiler: {command} was not found")


def test_a_compiler_that_cannot_be_run(folder: Path, fake_compiler: Fake) -> None:
    fake_compiler("").write_bytes(b"\x7fELF garbage")
    assert_fails(folder, "A0502", "Exec format error")


def test_a_compiler_with_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch, fake_compiler: Fake) -> None:
    """As `CXX="ccache g++ -pipe"`; the kernel depends on both programs."""
    wrapper = fake_compiler('exec "$@"')
    monkeypatch.setenv("CXX", f"{wrapper} g++ -pipe")
    cpp_toolchain._find_compiler.cache_clear()
    assert_right(build("cpp"))
    compiler = cpp_toolchain.find_compiler()
    assert compiler.command == (str(wrapper), "g++", "-pipe")
    assert str(Path(shutil.which("g++") or "").resolve()) in compiler.identity
    assert len(libraries(folder)) == 1


# --- other processes --------------------------------------------------------------------------------------------------

PROGRAM = f"""
import attncc, sys, torch
attn = attncc.build({SPEC!r}, target="cpp")
generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 2, rows, 8, generator=generator) for rows in (5, 7, 7))
torch.testing.assert_close(attn(q, k, v).double(), attn.reference(q, k, v), rtol=1e-5, atol=1e-6)
print("right")
"""


def start() -> subprocess.Popen[str]:
    """Another process that builds and calls."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for two minutes"
        time.sleep(0.02)


def test_two_processes_that_build_the_same(folder: Path, tmp_path: Path, fake_compiler: Fake) -> None:
    """Their compilers wait for one another, so that both write at the same time."""
    fake_compiler(
        f"touch {tmp_path}/started.$$\n"
        f"until [ $(ls {tmp_path}/started.* | wc -l) -ge 2 ]; do sleep 0.05; done\n"
        'exec g++ "$@"'
    )
    processes = [start(), start()]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert outputs == [("right\n", "")] * 2
    assert len(list(tmp_path.glob("started.*"))) == 2
    assert len(libraries(folder)) == 1
    assert not list(folder.glob(".*"))


def test_a_process_that_is_killed_while_it_builds(folder: Path, tmp_path: Path, fake_compiler: Fake) -> None:
    """What it left behind is not trusted, and removed once it is old."""
    waiting = tmp_path / "waiting"
    fake_compiler(f'if [ -e {waiting} ]; then echo half > $output; rm {waiting}; sleep 300; fi\nexec g++ "$@"')
    waiting.touch()
    process = start()
    wait_for(lambda: not waiting.exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not libraries(folder)
    (left,) = folder.glob(".*")
    assert left.read_text() == "half\n"

    assert_right(build("cpp"))
    (library,) = libraries(folder)
    library.unlink()
    assert left.exists(), "it might belong to a process that is still alive"
    os.utime(left, (0, 0))
    assert_right(build("cpp"))
    assert not list(folder.glob(".*"))
