"""How much memory there is, from files laid out as Linux lays them out."""

from __future__ import annotations

from pathlib import Path

from lineshaft.base.machine import _left_by_groups, available_memory_bytes, large_blocks_returned, peak_memory_bytes, resident_memory_bytes


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_limit_of_cgroup_v2_leaves_what_is_not_used(tmp_path: Path) -> None:
    group(tmp_path / "a" / "b", memory__max="1000\n", memory__current="600\n", memory__stat="anon 5\ninactive_file 50\n")
    assert min(_left_by_groups(tmp_path, "0::/a/b\n")) == 450


def test_the_tightest_of_all_groups_above_counts(tmp_path: Path) -> None:
    group(tmp_path / "a", memory__max="700\n", memory__current="650\n")
    group(tmp_path / "a" / "b", memory__max="max\n", memory__current="600\n")
    assert min(_left_by_groups(tmp_path, "0::/a/b\n")) == 50


def test_cgroup_v1_is_read_beside_other_controllers(tmp_path: Path) -> None:
    stat = "total_inactive_file 7\n"
    group(tmp_path / "memory" / "c", memory__limit_in_bytes="900\n", memory__usage_in_bytes="100\n", memory__stat=stat)
    assert min(_left_by_groups(tmp_path, "5:cpu,cpuacct:/c\n4:memory:/c\n0::/\n")) == 807


def test_a_group_outside_this_container_sets_no_limit(tmp_path: Path) -> None:
    assert min(_left_by_groups(tmp_path, "0::/elsewhere\n")) == 1 << 62


def test_this_process_is_smaller_than_what_there_is() -> None:
    assert 0 < resident_memory_bytes() <= peak_memory_bytes()
    assert available_memory_bytes() > 0


def test_returning_large_blocks_changes_no_result() -> None:
    with large_blocks_returned():
        assert sum(bytearray(1 << 20)) == 0
