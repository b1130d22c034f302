"""Several Python threads in different transforms at once."""

import threading

import torch

import torchlift
from torchlift import grad, vjp, vmap


def run_all(*works):
    errors = []

    def guarded(work):
        try:
            for _ in range(30):
                work()
            assert torchlift._C.open_levels() == 0
        except BaseException as error:  # noqa: BLE001: reported by the test
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_different_transforms_at_once():
    x = torch.randn(6, 3, dtype=torch.float64)

    def mapped():
        torch.testing.assert_close(vmap(vmap(torch.sin))(x), x.sin())

    def per_sample():
        got = vmap(grad(lambda v: v.sin().sum()))(x)
        torch.testing.assert_close(got, x.cos())

    def second():
        got = grad(lambda v: grad(lambda u: u.sin().sum())(v).sum())(x[0])
        torch.testing.assert_close(got, -x[0].sin())

    def pulled():
        torch.testing.assert_close(vjp(torch.sin, x)[1](torch.ones_like(x))[0], x.cos())

    run_all(mapped, per_sample, second, pulled)


def test_threads_that_switch_inside_a_transform():
    """Both are inside vmap at the same time, at the same depth."""
    barrier = threading.Barrier(2)
    x = torch.randn(4, 3)

    def work():
        def f(v):
            barrier.wait(timeout=30)
            y = v.sin()
            barrier.wait(timeout=30)
            return y * v.sum()

        torch.testing.assert_close(vmap(f)(x), x.sin() * x.sum(1, keepdim=True))

    run_all(work, work)


def test_a_tensor_of_another_thread_is_refused():
    caught = []

    def f(v):
        def other():
            try:
                vmap(lambda u: u + v)(torch.ones(5))
            except RuntimeError as error:
                caught.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return v

    vmap(f)(torch.ones(4))
    assert len(caught) == 1 and "another" in caught[0]


def test_exceptions_in_one_thread_leave_the_other_alone():
    x = torch.randn(4, 3)

    def failing():
        try:
            vmap(grad(lambda v: 1 / 0))(x)
        except ZeroDivisionError:
            pass

    def working():
        torch.testing.assert_close(vmap(grad(lambda v: v.sin().sum()))(x), x.cos())

    run_all(failing, working, failing, working)
