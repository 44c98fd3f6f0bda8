"""The pages are built without a warning: links, and every module that the reference names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_pages_are_built_without_warnings(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.read_text().startswith("# "), page
    reference = (tmp_path / "api" / "engine" / "index.html").read_text()
    assert "A model that remembers what it has read." in reference
    assert "StoreFullError" in reference
