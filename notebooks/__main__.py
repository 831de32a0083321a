"""Runs the notebooks from top to bottom; fails on an error, and on anything said to stderr.

    python -m notebooks            # runs them all, changes nothing
    python -m notebooks --write    # and keeps the outputs

Warnings go to stderr, so none passes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from parq_fn.foundation.command import Parser, command

HERE = Path(__file__).parent


def run(path: Path) -> Any:
    """The notebook with the outputs of a run in a kernel of its own, in this folder."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
    ).execute()
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = joined(cell.outputs)
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"{path.name} wrote to stderr:\n{output['text']}")
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """The outputs with what follows one another on one stream in one: where it is cut is chance."""
    found: list[Any] = []
    for output in outputs:
        last = found[-1] if found else {}
        if output["output_type"] == "stream" and last.get("name") == output["name"]:
            last["text"] += output["text"]
        else:
            found.append(output)
    return found


def check_kept(path: Path, notebook: Any) -> None:
    """Raises ValueError where a cell's kept outputs are not of the kinds that a run gives."""
    import nbformat

    kept = nbformat.read(path, as_version=4)
    for old, new in zip(kept.cells, notebook.cells, strict=True):
        kinds = [
            [(o["output_type"], *sorted(o.get("data", ()))) for o in cell.get("outputs", ())]
            for cell in (old, new)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{path.name}: kept outputs {kinds[0]} of a cell, a run gives {kinds[1]}; "
                "run python -m notebooks --write"
            )


def main() -> None:
    parser = Parser("notebooks", __doc__)
    parser.add_argument("names", nargs="*", help="of notebooks, or how they begin; all by default")
    parser.add_argument("--write", action="store_true", help="keep the outputs")
    chosen = parser.parse_args()
    found = [
        path
        for path in sorted(HERE.glob("*.ipynb"))
        if not chosen.names or any(path.name.startswith(name) for name in chosen.names)
    ]
    if not found:
        parser.error(f"no notebook is named {' or '.join(chosen.names)}")
    import nbformat

    for path in found:
        begin = time.perf_counter()
        notebook = run(path)
        if chosen.write:
            nbformat.write(notebook, path)
        else:
            check_kept(path, notebook)
        print(f"{path.name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    command(main)
