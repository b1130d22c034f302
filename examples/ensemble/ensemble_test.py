"""The example in a small form."""

import bazel  # tools/bazel.py


def test_python(example, tmp_path):
    found = example.run(members=3, count=600, epochs=40)
    assert found["accuracy"] > 0.8
    assert found["uncertainty"][found["wrong"]].mean() > found["uncertainty"][~found["wrong"]].mean()
    for change in ("turned", "mixed"):  # unsure where it is wrong
        (_, first, before), (_, last, after) = found[change][0], found[change][-1]
        assert first == found["accuracy"] and last < 0.5
        assert after > 1.3 * before
    example.draw(tmp_path / "picture.png", found)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_cpp(example):
    bazel.run("build", *bazel.PLAIN, "//examples/ensemble:ensemble")
    program = bazel.bin_dir() / "examples" / "ensemble" / "ensemble"
    found = example.run_cpp(program, members=3, count=600, epochs=40)
    assert found["accuracy"] > 0.8
    assert found["wrong"] > found["right"] and found["noise"] > found["right"]
