"""How `python -m bench peers` finds other implementations' functions in a folder, and tells their files apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from peer_packages import write

from bench.peers import find_peers, foreign_code, identity, load

BOOM = "raise AssertionError('imported')\ndef flash_prefill(q):\n    pass\n"


def test_functions_are_found_by_name_without_importing(tmp_path: Path) -> None:
    other = BOOM.replace("flash_prefill", "flash_prefill_decode") + f'"""\n{BOOM}"""\n'
    write(tmp_path / "one", deep__er__b=BOOM, a=other)
    (only,) = find_peers(tmp_path / "one")
    assert (only.module, only.implementation, only.root) == ("one.deep.er.b", "one", tmp_path.resolve())
    write(tmp_path / "one", z=BOOM, __hidden=BOOM)
    write(tmp_path / "one" / ".git", y=BOOM)
    (nearest,) = find_peers(tmp_path)
    assert nearest.module == "one.z" and [file.name for file in nearest.also] == ["b.py"]
    (tmp_path / "one" / "z.py").write_text("")
    (tmp_path / "one" / "__init__.py").write_text(BOOM)
    assert find_peers(tmp_path / "one")[0].module == "one"


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    import triton\n    def flash_prefill(q):\n        pass\nexcept ImportError:\n    triton = None\n",
        "try:\n    import triton\nexcept ImportError:\n    def flash_prefill(q):\n        pass\n",
        "try:\n    import triton\nexcept ImportError:\n    pass\nelse:\n    def flash_prefill(q):\n        pass\n",
        "try:\n    import triton\nfinally:\n    def flash_prefill(q):\n        pass\n",
        "if True:\n    pass\nelif True:\n    if True:\n        def flash_prefill(q):\n            pass\n",
    ],
    ids=["try", "except", "else", "finally", "elif"],
)
def test_functions_are_found_under_guards(text: str, tmp_path: Path) -> None:
    write(tmp_path / "one", a=text)
    assert [peer.module for peer in find_peers(tmp_path)] == ["one.a"]
    (tmp_path / "one" / "a.py").write_text("class A:\n    def flash_prefill(q):\n        pass\n")
    assert find_peers(tmp_path) == []


def test_a_package_comes_before_loose_files_and_tests_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "kernels", ops__flash=BOOM, test_flash=BOOM, tests__copy=BOOM)
    write(tmp_path / "tests", reference=BOOM)
    (tmp_path / "tests" / "__init__.py").unlink()
    for name in ("example.py", "test_flash.py", "flash_test.py"):
        (tmp_path / name).write_text(BOOM)
    (found,) = find_peers(tmp_path)
    assert found.module == "kernels.ops.flash" and [file.name for file in found.also] == ["example.py"]
    (asked,) = find_peers(tmp_path, ["reference", "nowhere"])
    assert (asked.module, asked.root, asked.also) == ("reference", (tmp_path / "tests").resolve(), ())


def test_only_files_are_read(tmp_path: Path) -> None:
    write(tmp_path / "one", a=BOOM)
    (found,) = find_peers(tmp_path)
    before = identity(found, tmp_path)
    (tmp_path / "one" / "link.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "one" / "folder.py").mkdir()
    assert find_peers(tmp_path) == [found] and identity(found, tmp_path) == before


def test_the_digest_is_that_of_names_and_contents(tmp_path: Path) -> None:
    write(tmp_path / "one", a=BOOM, b="")
    (found,) = find_peers(tmp_path)
    digests = [identity(found, tmp_path)["peer_digest"]]
    (tmp_path / "one" / "b.py").write_text("x = 1\n")
    digests.append(identity(found, tmp_path)["peer_digest"])
    (tmp_path / "one" / "b.py").rename(tmp_path / "one" / "c.py")
    digests.append(identity(found, tmp_path)["peer_digest"])
    assert len(set(digests)) == 3
    (tmp_path / "one" / "c.py").write_text("")
    (tmp_path / "one" / "c.py").rename(tmp_path / "one" / "b.py")
    assert identity(found, tmp_path)["peer_digest"] == digests[0]


def test_a_name_that_is_taken_is_not_mistaken_for_the_peer(tmp_path: Path) -> None:
    write(tmp_path / "bench", attention="def flash_prefill(q):\n    pass\n")
    (found,) = find_peers(tmp_path)
    with foreign_code(found), pytest.raises(ImportError, match=r"bench\.attention is .*not the attention\.py"):
        load(found)
