"""Patching Triton's interpreter: once, whoever asks, and all of it or nothing."""

import concurrent.futures
import time

import pytest

from fastmixer import interpreter

pytestmark = pytest.mark.skipif(not interpreter.is_interpreted(), reason="needs TRITON_INTERPRET=1")


def test_install_patches_once_from_many_threads(monkeypatch):
    calls = []

    def replacements() -> list:
        calls.append(1)
        time.sleep(0.05)  # long enough for all threads to come
        return []

    monkeypatch.setattr(interpreter, "_replacements", replacements)
    monkeypatch.setattr(interpreter, "_installed", False)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: interpreter.install(), range(32)))
    assert len(calls) == 1


def test_an_unknown_triton_is_named_and_left_alone(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.cast_impl
    monkeypatch.delattr(InterpreterBuilder, "create_dot")
    monkeypatch.setattr(interpreter, "_installed", False)
    for _ in range(2):  # what failed is not taken for done
        with pytest.raises(RuntimeError, match=r"triton [\d.]+ has no InterpreterBuilder\.create_dot"):
            interpreter.install()
    assert InterpreterBuilder.cast_impl is before
