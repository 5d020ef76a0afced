"""`import stagewise` is enough, as the documentation writes it."""

import subprocess
import sys


def test_the_folder_is_found_by_its_name() -> None:
    code = "import stagewise; assert callable(stagewise.parallel.split_sequences)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
