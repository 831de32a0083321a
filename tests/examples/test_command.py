"""Programs end in one line where Ctrl-C or the system ends them."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.command import command, output_folder


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for refused in (file, file / "folder"):
        with pytest.raises(SystemExit, match=r"^error: .*file") as end:
            command(lambda refused=refused: output_folder(refused))
        assert "\n" not in str(end.value.code)


def test_a_program_that_may_not_write_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples import qat_simple_report

    monkeypatch.setattr(qat_simple_report, "run", pytest.fail)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: "):
        command(lambda: qat_simple_report.main(["--save-dir", str(tmp_path / "file")]))


@pytest.mark.parametrize("content", [None, b"no packed file"])
def test_a_file_that_is_missing_or_something_else_is_one_line(
    content: bytes | None, tmp_path: Path
) -> None:
    from examples import qat_simple_report

    file = tmp_path / "net.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"^error: .*net.safetensors") as end:
        command(lambda: qat_simple_report.main(["--evaluate", str(file)]))
    assert "\n" not in str(end.value.code)
